"""Evaluates: python -m mocov3_jax.evaluate --config=configs/eval_knn.py \\
    --config.checkpoint=DIR --workdir=OUT

DIR is the workdir of a training run (its newest checkpoint) or one of its
folders checkpoints/<step>. The last line on stdout is one JSON object, which
OUT/result.json holds as well.
"""

import json
from typing import Any

from absl import flags
from etils import epath
import jax
from ml_collections import ConfigDict, config_flags

from mocov3_jax import checks, sharding
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.data import catalog, pipeline, sources
from mocov3_jax.errors import UserError, unknown
from mocov3_jax.evals import features, knn
from mocov3_jax.tools import cli, trained

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
  run = trained.find(config.checkpoint)
  splits = load_source(
      config, run.config, workdir_lib.absolute(path).parent
  )
  mesh = sharding.make_mesh()
  extract = features.extractor(
      run.model, run.config.data, mesh, config.batch_size,
      pipeline.Workers(config.data.threads),
  )
  protocol = knn.build(config.knn, extract, splits)
  params, batch_stats = trained.restore(run, mesh)
  with workdir_lib.claimed(path, config) as workdir:
    result = protocol(params, batch_stats)
    result |= {
        'protocol': config.protocol,
        'checkpoint': str(run.folder),
        'step': run.step,
        'train_images': len(splits.train),
        'test_images': len(splits.test),
    }
    text = json.dumps(result, indent=2) + '\n'
    workdir_lib.write_whole(workdir / 'result.json', text)
    return result


def load_source(
    config: ConfigDict, training: ConfigDict, parent: epath.Path
) -> sources.Splits:
  """Opens the data to evaluate on; lists folders into `parent`/.listings.

  Raises:
    UserError: if it is none, has no labels, or does not fit the network.
  """
  data = config.data if config.data.source else training.data
  splits = catalog.load(data.source, data.labels, parent / '.listings')
  if splits.test is None:
    raise UserError(
        f'data.source={data.source!r} with data.labels={data.labels!r} has no '
        'labels, which kNN needs. Allowed: a labelled source; a folder with a '
        'subfolder a class; or data.labels=FILE.csv.'
    )
  sources.check_channels(splits, data.source, len(training.data.mean))
  return splits


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Protocol, such as configs/eval_knn.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder for result.json.', required=True
  )
  flags.mark_flag_as_required('config')
  cli.run(lambda: evaluate(CONFIG.value, WORKDIR.value))
