"""The network of a checkpoint, for whoever wants to use it."""

import dataclasses

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax import checkpoint, models, saved, sharding
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.checkpoint import PyTree
from mocov3_jax.errors import UserError, unknown
from mocov3_jax.tools import torch_names, weights


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
  run, folder = saved.find(path)
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
    UserError: if they cannot be read, do not fit the config, or for another
      encoder.
  """
  if encoder not in weights.ENCODERS:
    raise unknown('encoder', encoder, weights.ENCODERS)
  fields = weights.FIELDS[weights.ENCODERS[encoder]]
  shapes = {
      (fields[path[0]], *path[1:]): shape
      for path, shape in weights.network_shapes(trained.config).items()
      if path[1] in parts
  }
  missing = {path[:2] for path in shapes} - saved.held(trained.folder)
  if missing:
    raise UserError(
        f'{trained.folder} has no {", ".join(sorted(map("/".join, missing)))}. '
        'Allowed: --layer=backbone --encoder=query for the weights of a '
        'backbone alone.'
    )
  abstract = checkpoint.abstract(
      torch_names.unflatten(shapes), sharding.replicated(mesh)
  )
  restored = saved.restore_part(trained.folder, abstract)
  batch_stats = fields['batch_stats']
  return restored[fields['params']], (
      restored[batch_stats] if batch_stats in restored else {}
  )
