"""The network of a checkpoint, for whoever wants to use it."""

import dataclasses

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import checkpoints
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.runs.checkpoints import PyTree

Path = tuple[str, ...]

# One network has three vocabularies. The paper and TrainState have an online
# and a target network; the release's checkpoints call their encoders
# base_encoder and momentum_encoder; `--encoder` says query and momentum.
ENCODERS = {'query': 'base_encoder', 'momentum': 'momentum_encoder'}
# The fields of TrainState for the collections of each encoder.
FIELDS = {
    'base_encoder': {'params': 'params', 'batch_stats': 'batch_stats'},
    'momentum_encoder': {
        'params': 'target_params', 'batch_stats': 'target_batch_stats'
    },
}


@dataclasses.dataclass(frozen=True)
class Trained:
  """A checkpoint and what its config describes.

  Attributes:
    config: of the run.
    folder: of the checkpoint, checkpoints/<step>.
    model: the network.
  """

  config: ConfigDict
  folder: epath.Path
  model: models.Network

  @property
  def step(self) -> int:
    """Updates done."""
    return int(self.folder.name)


def find(path: str) -> Trained:
  """Finds a checkpoint, without reading its arrays.

  Args:
    path: a workdir (then its newest checkpoint) or one checkpoints/<step>.

  Raises:
    UserError: if there is none, or its config is not one of this version.
  """
  run, folder = checkpoints.find(path)
  config = workdir_lib.read_training_config(run)
  model = models.build(config.model, config.head, config.data.image_size)
  return Trained(config, folder, model)


def restore(
    trained: Trained, mesh: Mesh, encoder: str = 'query',
    parts: tuple[str, ...] = ('backbone',),
) -> tuple[PyTree, PyTree]:
  """Restores some parts of one encoder onto every device.

  Args:
    trained: as `find` returns it.
    mesh: to restore onto.
    encoder: 'query' or 'momentum'.
    parts: 'backbone', 'projector'.

  Returns:
    Their params and batch_stats.

  Raises:
    UserError: if they cannot be read, do not fit the config, are not finite,
      or for another encoder.
  """
  if encoder not in ENCODERS:
    raise unknown('encoder', encoder, ENCODERS)
  fields = FIELDS[ENCODERS[encoder]]
  shapes = {
      (fields[path[0]], *path[1:]): shape
      for path, shape in network_shapes(trained.config).items()
      if path[1] in parts
  }
  missing = {path[:2] for path in shapes} - checkpoints.held(trained.folder)
  if missing:
    raise UserError(
        f'{trained.folder} has no {", ".join(sorted(map("/".join, missing)))}. '
        'Allowed: --layer=backbone --encoder=query for the weights of a '
        'backbone alone.'
    )
  abstract = sharding.placed(
      unflatten_dict(shapes), sharding.replicated(mesh)
  )
  restored = checkpoints.restore_part(trained.folder, abstract)
  finite = jax.device_get(jax.tree.map(_all_finite, restored))
  for path, holds in flatten_dict(finite).items():
    if not holds:
      raise UserError(
          f'{"/".join(path)} of {trained.folder} holds values that are NaN or '
          'infinite. Allowed: weights that are finite; an earlier checkpoint.'
      )
  batch_stats = fields['batch_stats']
  return restored[fields['params']], (
      restored[batch_stats] if batch_stats in restored else {}
  )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


def network_shapes(config: ConfigDict) -> dict[Path, jax.ShapeDtypeStruct]:
  """Returns shapes of all parameters and statistics of the network, by path.

  Raises:
    UserError: if the config describes none.
  """
  size, channels = config.data.image_size, len(config.data.mean)
  network = models.build(config.model, config.head, size)
  views = jax.ShapeDtypeStruct((2, 2, size, size, channels), jnp.float32)
  shapes = jax.eval_shape(
      lambda views: network.init(jax.random.key(0), views, train=True), views
  )
  return flatten_dict(shapes)
