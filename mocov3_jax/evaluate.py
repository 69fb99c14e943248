"""Evaluates: python -m mocov3_jax.evaluate --config=configs/eval_knn.py \\
    --config.checkpoint=DIR --workdir=OUT

DIR is the workdir of a training run (its newest checkpoint) or one of its
folders checkpoints/<step>. The last line on stdout is one JSON object, which
OUT/result.json holds as well.
"""

import functools
import json
from typing import Any

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_flags

from mocov3_jax import checkpoint, checks, models, sharding
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.data import catalog, pipeline, sources
from mocov3_jax.errors import UserError, unknown
from mocov3_jax.evals import features, knn
from mocov3_jax.tools import cli

PROTOCOLS = ('knn',)


def evaluate(config: ConfigDict, path: str) -> dict[str, Any]:
  """Runs one protocol on the online network of a checkpoint.

  Args:
    config: as `eval_config()`, after overrides.
    path: of the folder for result.json.

  Returns:
    The results, flat.

  Raises:
    UserError: for bad input, before anything is written (but a listing of an
      image folder, beside the workdir).
  """
  checks.validate_eval(config, jax.device_count())
  if config.protocol not in PROTOCOLS:
    raise unknown('protocol', config.protocol, PROTOCOLS)
  run, folder = checkpoint.find(config.checkpoint)
  trained = workdir_lib.read_config(run)
  splits = load_source(config, trained, workdir_lib.absolute(path).parent)
  mesh = sharding.make_mesh()
  model = models.build(trained.model, trained.head, trained.data.image_size)
  extract = features.extractor(
      model, trained.data, mesh, config.batch_size,
      pipeline.Workers(config.data.threads),
  )
  protocol = knn.build(config.knn, extract, splits)
  variables = restore_network(trained, model, mesh, folder)
  with workdir_lib.claimed(path, config) as workdir:
    result = protocol(variables['params'], variables['batch_stats'])
    result |= {
        'protocol': config.protocol,
        'checkpoint': str(folder),
        'step': int(folder.name),
        'train_images': len(splits.train),
        'test_images': len(splits.test),
    }
    text = json.dumps(result, indent=2) + '\n'
    workdir_lib.write_whole(workdir / 'result.json', text)
    return result


def load_source(
    config: ConfigDict, trained: ConfigDict, parent: epath.Path
) -> sources.Splits:
  """Opens the data to evaluate on; lists folders into `parent`/.listings.

  Raises:
    UserError: if it is none, has no labels, or does not fit the network.
  """
  data = config.data if config.data.source else trained.data
  splits = catalog.load(data.source, data.labels, parent / '.listings')
  if splits.test is None:
    raise UserError(
        f'data.source={data.source!r} with data.labels={data.labels!r} has no '
        'labels, which kNN needs. Allowed: a labelled source; a folder with a '
        'subfolder a class; or data.labels=FILE.csv.'
    )
  channels = sources.channels(splits.train)
  if channels != len(trained.data.mean):
    raise UserError(
        f'data.source={data.source!r} has {channels} channels, but the network '
        f'was trained on {len(trained.data.mean)}.'
    )
  return splits


def restore_network(
    trained: ConfigDict, model: models.Network, mesh: jax.sharding.Mesh,
    folder: epath.Path,
) -> dict[str, Any]:
  """Restores {'params', 'batch_stats'} of the online network alone."""
  size, channels = trained.data.image_size, len(trained.data.mean)
  views = jnp.zeros((2, 2, size, size, channels))
  shapes = jax.eval_shape(
      functools.partial(model.init, train=True), jax.random.key(0), views
  )
  abstract = checkpoint.abstract(shapes, sharding.replicated(mesh))
  return checkpoint.restore_part(folder, dict(abstract))


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Protocol, such as configs/eval_knn.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder for result.json.', required=True
  )
  flags.mark_flag_as_required('config')
  cli.run(lambda: evaluate(CONFIG.value, WORKDIR.value))
