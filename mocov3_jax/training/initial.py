"""Pre-trained weights that a pre-training run starts from.

The backbone comes from another run, from a file that `convert` has converted,
or from a timm folder. It is copied into the online and the target network. The
heads are initialised at random unless the config asks for those of the
checkpoint. The optimizer state is always fresh.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import math
import types
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.method.train_step import TrainState, encoder
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.runs import checkpoints, network
from mocov3_jax.weights import state_dict, timm_folder

PyTree = Any
Path = tuple[str, ...]
Shapes = Mapping[Path, tuple[int, ...]]
# Learned positions, which are resized if the number of patches differs.
POSITIONS = 'backbone', 'pos_embed'
# How many tensors an error message names, at most.
NAMED = 4
# The entries of environment.json about the initial weights.
SOURCE, SHA256 = 'init', 'init_sha256'


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where weights come from.

  Attributes:
    name: a name for messages.
    config: the config of its network.
    parts: 'backbone' and the heads that the source has.
    read: (mesh, parts) -> params and batch_stats on every device of the mesh.
    assumed: settings of the network that the source does not specify and that
      are therefore assumed, in words.
  """

  name: str
  config: ConfigDict
  parts: frozenset[str]
  read: Callable[[Mesh, tuple[str, ...]], tuple[PyTree, PyTree]]
  assumed: tuple[str, ...] = ()


def _open(given: str) -> _Source:
  """Opens the source that `init.checkpoint` names.

  Raises:
    UserError: if there is no such source, or it cannot be read.
  """
  if given.startswith(timm_folder.PREFIX):
    return _timm(given)
  found = network.find(given)
  return _Source(
      str(found.folder), found.config,
      frozenset(
          path[1] for path in checkpoints.held(found.folder)
          if path[0] == 'params'
      ),
      lambda mesh, parts: network.restore(found, mesh, 'query', parts),
  )


def _timm(given: str) -> _Source:
  source = f'init.checkpoint={given}'
  weights, _ = timm_folder.read(given, 'init.checkpoint')
  state_dict.require_finite(source, weights)
  tree = unflatten_dict(weights.flat)

  def read(mesh, parts):
    params, batch_stats = (
        {part: tree[field][part] for part in parts if part in tree[field]}
        if field in tree else {} for field in ('params', 'batch_stats')
    )
    return jax.device_put((params, batch_stats), sharding.replicated(mesh))

  folder = files.absolute(
      given.removeprefix(timm_folder.PREFIX), 'init.checkpoint'
  )
  return _Source(
      f'{timm_folder.PREFIX}{folder}', weights.config, frozenset({'backbone'}),
      read, tuple(
          text for text in weights.assumed if text.startswith('attention heads')
      ),
  )


def config_of(given: str) -> ConfigDict:
  """Returns the config of a checkpoint's run, without its own `init` settings.

  Args:
    given: a value of `init.checkpoint`.

  Raises:
    UserError: if there is no such checkpoint.
  """
  if not given:
    raise UserError(
        'continue.py names no checkpoint. Use --config=continue.py:CHECKPOINT, '
        'the workdir of a run or timm:FOLDER.'
    )
  found = _open(given).config.copy_and_resolve_references()
  found.init.update({'checkpoint': '', 'heads': False})
  found.init.freeze_backbone_epochs = 0.0
  return found.lock()


class Beginning(NamedTuple):
  """How a run begins; by default, with its random initial state.

  Attributes:
    change: changes the fresh state, which it may donate.
    notes: lines to print when the run begins.
    environment: entries for environment.json.
  """

  change: Callable[[TrainState], TrainState] = lambda state: state
  notes: tuple[str, ...] = ()
  environment: Mapping[str, str] = types.MappingProxyType({})


class Initial:
  """The weights that `config.init` names; found and read when needed.

  Attributes:
    environment: their entries for environment.json; empty for a run that has
      begun without recording them.
    notes: lines to print about them when the run begins.
  """

  def __init__(
      self, config: ConfigDict, mesh: Mesh,
      environment: dict[str, str] | None = None,
  ):
    """Prepares the weights; for a new run, reads and checks them.

    Args:
      config: the run's config, with `init.checkpoint` set.
      mesh: the mesh to restore onto.
      environment: the entries that the run recorded when it began; None = it
        begins now.
    """
    self._config, self._mesh = config, mesh
    self.notes = ()
    if environment is None:
      # Reading the weights here reports errors before a workdir is made.
      environment = {
          SHA256: network.digest(self.weights),
          SOURCE: self._source.name,
      }
      self.notes = tuple(self._notes())
    self.environment = environment

  @functools.cached_property
  def _source(self) -> _Source:
    return _open(self._config.init.checkpoint)

  @functools.cached_property
  def _parts(self) -> tuple[str, ...]:
    """The parts to take: 'backbone', and the heads if asked for."""
    if not self._config.init.heads:
      return ('backbone',)
    heads = sorted({path[0] for path in _shapes(self._config)} - {'backbone'})
    missing = [name for name in heads if name not in self._source.parts]
    if missing:
      raise UserError(
          'init.heads=True, but init.checkpoint='
          f'{self._config.init.checkpoint!r} has no '
          f'{" and no ".join(missing)}. Use init.heads=False, for fresh ones.'
      )
    return ('backbone', *heads)

  def _check(self) -> None:
    """Raises UserError, with the differences, if the weights do not fit."""
    wanted, found = (
        {p: s for p, s in _shapes(config).items() if p[0] in self._parts}
        for config in (self._config, self._source.config)
    )
    differ = [
        f'{"/".join(path)}: {found[path] if path in found else "absent"} '
        f'there, {wanted[path] if path in wanted else "absent"} here'
        for path in sorted(wanted.keys() | found.keys())
        if not (path in wanted and path in found and (
            wanted[path] == found[path] or path == POSITIONS
        ))
    ]
    # Networks with equal shapes can still compute different things.
    theirs, ours = map(_settings, (self._source.config, self._config))
    differ += [
        f'model.{name}: {theirs[name]!r} there, {ours[name]!r} here'
        for name in ours if not differ and theirs[name] != ours[name]
    ]
    if differ:
      more = f'\n  and {len(differ) - NAMED} more' * (len(differ) > NAMED)
      raise UserError(
          f'init.checkpoint={self._config.init.checkpoint!r} does not fit this '
          'model:\n  ' + '\n  '.join(differ[:NAMED]) + more + '\nUse the same '
          'model.name, sizes, num_heads, patch_size, patch_embed, positions '
          'and readout as there (data.image_size may differ), or another '
          'checkpoint.'
      )

  @functools.cached_property
  def weights(self) -> tuple[PyTree, PyTree]:
    """Params and batch_stats of the parts to take, on every device.

    Raises:
      UserError: if the checkpoint does not exist, does not fit, cannot be read,
        or holds values that are not finite.
    """
    self._check()
    params, batch_stats = self._source.read(self._mesh, self._parts)
    flat = flatten_dict(params)
    if POSITIONS in flat:
      size = self._config.data.image_size // self._config.model.patch_size
      flat[POSITIONS] = _resized(
          flat[POSITIONS], size, self._config.model.readout == 'cls'
      )
    return unflatten_dict(flat), batch_stats

  def _notes(self) -> Iterator[str]:
    theirs, ours = self._source.config.data, self._config.data
    resized = ''
    if theirs.image_size != ours.image_size:
      resized = (
          f'; trained at {theirs.image_size} pixels, continued at '
          f'{ours.image_size}'
      )
      settings = _settings(self._config)
      positions = settings['positions'] if settings else 'none'
      if positions != 'none':
        resized += ', with positions ' + (
            'resized' if positions == 'learned' else 'computed anew'
        )
    heads = 'with its heads' if self._config.init.heads else 'with fresh heads'
    yield f'begins with {self._source.name}, {heads}{resized}'
    for name in 'mean', 'std':
      if not np.allclose(theirs[name], ours[name], atol=1e-3):
        yield (
            f'trained with data.{name}={_rounded(theirs[name])}, continued '
            f'with {_rounded(ours[name])}: kNN at step 0 is not that of the '
            'checkpoint'
        )
    for text in self._source.assumed:
      yield (
          'not recorded in init.checkpoint, so assumed from its width: '
          f'{text}'
      )

  def begin(self, state: TrainState) -> TrainState:
    """Copies the weights into both networks of a fresh state.

    Args:
      state: the fresh state; it is donated.

    Returns:
      The state with these weights.
    """
    where = jax.tree.map(lambda x: x.sharding, state)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=where)
    def put(state, weights):
      params, batch_stats = weights
      params = state.params | params
      batch_stats = state.batch_stats | batch_stats
      return state.replace(**jax.tree.map(jnp.copy, {
          'params': params, 'batch_stats': batch_stats,
          'target_params': encoder(params),
          'target_batch_stats': encoder(batch_stats),
      }))

    return put(state, self.weights)


def _settings(config: ConfigDict) -> dict[str, Any]:
  """Returns the settings that affect features but not the tensors' shapes."""
  backbone = models.build_backbone(config.model, config.data.image_size)
  if not isinstance(backbone, ViT):
    return {}
  return {
      'num_heads': backbone.num_heads, 'readout': backbone.readout,
      'positions': backbone.positions,
  }


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
  return tuple(round(value, 3) for value in values)


def _resized(table: jax.Array, size: int, has_class: bool) -> jax.Array:
  """Resizes learned positions [1, T, D] to size x size patches, antialiased."""
  first, grid = table[:, :has_class], table[:, has_class:]
  side = math.isqrt(grid.shape[1])
  if side == size:
    return table
  grid = grid.reshape(1, side, side, -1)
  grid = jax.image.resize(
      grid, (1, size, size, grid.shape[-1]), 'bicubic', antialias=True
  )
  return jnp.concatenate([first, grid.reshape(1, size**2, -1)], axis=1)


def find(config: ConfigDict, mesh: Mesh, path: str) -> Beginning:
  """Returns how a run begins: with the weights of `init.checkpoint`, if any.

  A run that has begun no longer needs them, and the checkpoint they came from
  may be gone. They are then read only if the run turns out to have no
  checkpoint to continue from.

  Args:
    config: the run's config.
    mesh: the mesh to restore onto.
    path: the workdir.

  Raises:
    UserError: see `Initial.weights`.
  """
  if not config.init.checkpoint:
    return Beginning()
  noted = processes.from_primary(lambda: _noted(path))
  found = Initial(config, mesh, noted['environment'])
  return Beginning(found.begin, found.notes, found.environment)


def _noted(path: str) -> dict[str, Any]:
  workdir = files.run_path(path, '--workdir')
  if not any(
      checkpoints.is_step(step.name)
      for step in files.entries(workdir / 'checkpoints')
  ):
    return {'environment': None}
  found = files.read_object(workdir / 'environment.json')
  return {'environment': {
      name: str(found[name]) for name in (SOURCE, SHA256) if name in found
  }}


def _shapes(config: ConfigDict) -> Shapes:
  """Returns the shape of each parameter and statistic of a network, by path."""
  return {
      path[1:]: x.shape for path, x in network.network_shapes(config).items()
  }
