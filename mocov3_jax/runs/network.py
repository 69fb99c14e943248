"""Finds, restores and writes the network of a checkpoint."""

from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.base import console, files
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.runs import checkpoints
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.runs.checkpoints import PyTree

Path = tuple[str, ...]

# The two encoders have three pairs of names. The paper and TrainState call the
# networks online and target, the release's checkpoints call the encoders
# base_encoder and momentum_encoder, and `--encoder` says query and momentum.
ENCODERS = {'query': 'base_encoder', 'momentum': 'momentum_encoder'}
# The fields of TrainState for the collections of each encoder.
FIELDS = {
    'base_encoder': {'params': 'params', 'batch_stats': 'batch_stats'},
    'momentum_encoder': {
        'params': 'target_params', 'batch_stats': 'target_batch_stats'
    },
}
# An evaluation that trains saves its network in this folder of its workdir.
NETWORK = 'network'
CLASSES = 'classes.json'


@dataclasses.dataclass(frozen=True)
class Trained:
  """A checkpoint, with its config and network.

  Attributes:
    config: the run's config.
    folder: the checkpoint's folder, checkpoints/<step>.
    model: the network.
  """

  config: ConfigDict
  folder: epath.Path
  model: models.Network

  @property
  def step(self) -> int:
    """The number of updates done."""
    return int(self.folder.name)


def locate(path: str) -> tuple[ConfigDict, epath.Path]:
  """Finds a checkpoint and the config of its network.

  Args:
    path: a workdir (then its newest checkpoint) or one checkpoints/<step>. For
      the workdir of a linear probe or fine-tuning, the checkpoint is the
      network that it saved.

  Returns:
    The config, and the folder of the checkpoint.

  Raises:
    UserError: if there is no checkpoint, or this version cannot use its config.
  """
  run, folder = checkpoints.find(path)
  if run == files.run_path(path) and 'protocol' in workdir_lib.read_config(run):
    left = run / NETWORK
    if not left.exists():
      raise UserError(
          f'{run} is the workdir of an evaluation that has not saved its '
          f'network there ({NETWORK}/): it was stopped, or was run by an '
          'earlier version. Try the same evaluate command once more; it '
          'completes what is missing.'
      )
    run, folder = checkpoints.find(str(left))
  return workdir_lib.read_training_config(run), folder


def find(path: str) -> Trained:
  """Finds a checkpoint, without reading its arrays; see `locate`."""
  config, folder = locate(path)
  model = models.build(config.model, config.head, config.data.image_size)
  return Trained(config, folder, model)


def write(
    path: str, config: ConfigDict, step: int, tree: PyTree,
    classes: Sequence[str] = (),
) -> None:
  """Writes a workdir with one checkpoint; call it in all processes of a run.

  Args:
    path: the workdir; left unchanged if it already has this checkpoint.
    config: the network's config.
    step: the number of updates done.
    tree: some or all fields of a TrainState.
    classes: names of the classes, if `tree` has a classifier.

  Raises:
    UserError: if it cannot be written, or holds another run.
  """
  with workdir_lib.claimed(path, config, config_lib.schema()) as workdir:
    if classes and processes.is_primary():
      files.write_json(workdir / CLASSES, {'classes': list(classes)})
    found = checkpoints.Checkpoints(workdir, 1, 0, console.say)
    with contextlib.closing(found):
      found.save(step, tree, {})


def restore(
    trained: Trained, mesh: Mesh, encoder: str = 'query',
    parts: tuple[str, ...] = ('backbone',),
) -> tuple[PyTree, PyTree]:
  """Restores some parts of one encoder onto every device.

  Args:
    trained: the checkpoint, from `find`.
    mesh: the mesh to restore onto.
    encoder: 'query' or 'momentum'.
    parts: 'backbone', 'projector' or both.

  Returns:
    The params and batch_stats of these parts.

  Raises:
    UserError: if the parts cannot be read, do not fit the config or are not
      finite, or if the encoder is unknown.
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
        'Use --layer=backbone --encoder=query for the weights of a '
        'backbone alone.'
    )
  restored = _restore(trained.folder, shapes, mesh)
  batch_stats = fields['batch_stats']
  return restored[fields['params']], (
      restored[batch_stats] if batch_stats in restored else {}
  )


def restore_classifier(
    trained: Trained, mesh: Mesh
) -> tuple[dict[str, jax.Array], list[str]]:
  """Restores the linear classifier on top of the backbone's features.

  Args:
    trained: the checkpoint, from `find`.
    mesh: the mesh to restore onto.

  Returns:
    'kernel' [D, C] and 'bias' [C], float32; and the names of the classes, empty
    if they are not known.

  Raises:
    UserError: if the checkpoint has no classifier, or it cannot be read.
  """
  parts = checkpoints.shapes(trained.folder)
  shapes = {
      path: jax.ShapeDtypeStruct(shape, jnp.float32)
      for path, shape in parts.items() if path[:2] == ('params', 'classifier')
  }
  if not shapes:
    raise UserError(
        f'{trained.folder} has no classifier. Try the workdir of a linear '
        'probe or of a fine-tuning, or what convert makes of a file that has '
        'one.'
    )
  restored = _restore(trained.folder, shapes, mesh)['params']['classifier']
  file = trained.folder.parent.parent / CLASSES
  classes = class_names(trained.folder)
  count = len(restored['bias'])
  if classes and not (
      isinstance(classes, list) and len(classes) == count
      and all(isinstance(name, str) for name in classes)
  ):
    raise UserError(
        f'{file} does not name the {count} classes of the classifier. Use the '
        'file that the evaluation wrote; or remove it, to get numbers instead '
        'of names.'
    )
  return restored, classes


def class_names(folder: epath.Path) -> Any:
  """Returns the class names stored in the workdir of a checkpoint.

  Args:
    folder: a checkpoints/<step>.

  Returns:
    The content of the file, unchecked; an empty list if there is no file.
  """
  found = files.read_object(folder.parent.parent / CLASSES)
  return found['classes'] if 'classes' in found else []


def _restore(
    folder: epath.Path, shapes: dict[Path, jax.ShapeDtypeStruct], mesh: Mesh
) -> PyTree:
  abstract = sharding.placed(
      unflatten_dict(shapes), sharding.replicated(mesh)
  )
  restored = checkpoints.restore_part(folder, abstract)
  finite = jax.device_get(jax.tree.map(_all_finite, restored))
  for path, holds in flatten_dict(finite).items():
    if not holds:
      raise UserError(
          f'{"/".join(path)} of {folder} holds values that are NaN or '
          'infinite. Use weights that are finite; an earlier checkpoint.'
      )
  return restored


def digest(tree: PyTree) -> str:
  """Returns the SHA-256 of all arrays of a tree."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


def network_shapes(config: ConfigDict) -> dict[Path, jax.ShapeDtypeStruct]:
  """Returns the shapes of the network's parameters and statistics, by path.

  Raises:
    UserError: if the config does not describe a valid network.
  """
  size, channels = config.data.image_size, len(config.data.mean)
  network = models.build(config.model, config.head, size)
  views = jax.ShapeDtypeStruct((2, 2, size, size, channels), jnp.float32)
  shapes = jax.eval_shape(
      lambda views: network.init(jax.random.key(0), views, train=True), views
  )
  return flatten_dict(shapes)
