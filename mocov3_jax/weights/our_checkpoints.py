"""Reads checkpoints of this project as `Weights`, and writes them."""

from typing import Any

from flax.traverse_util import unflatten_dict
import jax
import numpy as np

from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.method.train_step import TrainState, abstract_state
from mocov3_jax.runs import checkpoints as checkpoints_lib
from mocov3_jax.runs import network
from mocov3_jax.runs.network import Path
from mocov3_jax.weights.state_dict import Weights
from mocov3_jax.weights.torch_optimizer import MOMENTS

NETWORKS = ('params', 'batch_stats', 'target_params', 'target_batch_stats')
SLOTS = tuple(MOMENTS.values())


def read(path: str) -> Weights:
  """Reads all networks and moments of a checkpoint.

  Args:
    path: as for `network.locate`.

  Raises:
    UserError: if there is no checkpoint, or it cannot be read.
  """
  config, folder = network.locate(path)
  flat = {}
  for keys, array in leaves(checkpoints_lib.restore_whole(folder)):
    if keys[0] in NETWORKS:
      flat[keys] = array
    for slot in SLOTS:
      if keys[0] == 'opt_state' and slot in keys:
        flat[keys[keys.index(slot) :]] = array
  names = {keys: '/'.join(keys) for keys in flat}
  return Weights(config, int(folder.name), flat, names)


def leaves(tree: Any) -> list[tuple[Path, np.ndarray]]:
  """Returns the leaves of any tree, each with the names on its path."""
  found, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(_keys(path), leaf) for path, leaf in found]


def _keys(path: tuple[Any, ...]) -> Path:
  return tuple(
      jax.tree_util.keystr((key,), simple=True) for key in path
  )


def write(path: str, weights: Weights) -> tuple[dict[Path, str], bool]:
  """Writes a workdir with one checkpoint.

  If the weights are complete, the checkpoint holds a TrainState, with which
  `train` can continue; else it holds what there is of the networks.

  Args:
    path: path of the workdir.
    weights: what to write.

  Returns:
    The name of each array that was written, by its path; and whether `train`
    can continue.

  Raises:
    UserError: if it cannot be written.
  """
  state, written = train_state(weights)
  complete = state is not None
  if not complete:
    written = {k for k in weights.flat if k[0] in NETWORKS}
    state = unflatten_dict({k: weights.flat[k] for k in written})
  network.write(path, weights.config, weights.step, state)
  return {keys: '/'.join(keys) for keys in written}, complete


def train_state(weights: Weights) -> tuple[TrainState | None, set[Path]]:
  """Returns the state of the run, and the paths of the arrays in it.

  The state is None if a part of it is missing.
  """
  config = weights.config
  size, channels = config.data.image_size, len(config.data.mean)
  # The schedules are not part of the state; any will do.
  method = build_method(config, config_lib.Plan(1, 1, 0, 1.0))
  abstract = abstract_state(method, (size, size, channels))
  used = set()

  def value(path, leaf):
    keys = _keys(path)
    if keys[-1] in ('step', 'count'):
      return np.asarray(weights.step, leaf.dtype)
    if keys[0] == 'past_keys':  # No file has them; zeros mean none.
      return np.zeros(leaf.shape, leaf.dtype)
    for slot in SLOTS:
      if keys[0] == 'opt_state' and slot in keys:
        keys = keys[keys.index(slot) :]
    used.add(keys)
    return weights.flat[keys]

  try:
    return jax.tree_util.tree_map_with_path(value, abstract), used
  except KeyError:
    return None, set()
