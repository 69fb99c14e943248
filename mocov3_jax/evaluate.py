"""Evaluates: python -m mocov3_jax.evaluate --config=configs/eval_knn.py \\
    --config.checkpoint=DIR --workdir=OUT

DIR is the workdir of a training run (its newest checkpoint) or one of its
folders checkpoints/<step>. The protocols: configs/eval_knn.py, eval_linear.py,
eval_logistic.py, eval_finetune.py. The last line on stdout is one JSON object,
which OUT/result.json holds as well; a line of results.jsonl in the run's
workdir has the same. A linear probe or a fine-tuning that was stopped goes on
with the same line.
"""

from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np

from mocov3_jax import checks
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.data import sources
from mocov3_jax.errors import unknown
from mocov3_jax.evals import knn, logistic
from mocov3_jax.tools import cli, compilation, evaluation, finetuning, probing
from mocov3_jax.tools.evaluation import Setup


def evaluate_knn(setup: Setup, path: str) -> dict[str, Any]:
  """Weighted nearest neighbours, for all k and temperatures."""
  with evaluation.claimed(setup, path):
    found = knn.table(
        setup.config.knn, setup.extract, setup.splits, setup.mesh,
        setup.variables['params'], setup.variables['batch_stats'],
    )
  images = found.pop('test_images')
  return {f'knn/{k}': v for k, v in found.items()} | {'test/images': images}


def evaluate_logistic(setup: Setup, path: str) -> dict[str, Any]:
  """Logistic regression on the features of whole images."""
  c = setup.config.logistic
  with evaluation.claimed(setup, path):
    parts = []
    for source in setup.splits.train, setup.splits.test:
      source, labels = sources.labelled(source)
      found, read = setup.extract(
          setup.variables['params'], setup.variables['batch_stats'], source
      )
      parts += [np.asarray(jax.device_get(found)), labels[read]]
    result = logistic.classify(*parts, c.inverse_penalties, c.iterations)
  return {f'logistic/{k}': v for k, v in result.items()} | {
      'test/images': len(parts[3])
  }


PROTOCOLS = {
    'knn': evaluate_knn,
    'linear': probing.probe,
    'logistic': evaluate_logistic,
    'finetune': finetuning.finetune,
}


def evaluate(config: ConfigDict, path: str) -> dict[str, Any]:
  """Runs one protocol on a checkpoint.

  Args:
    config: as `eval_config()`, after overrides.
    path: the workdir of the evaluation.

  Returns:
    The results; see `tools.evaluation.record` and the protocol.

  Raises:
    UserError: for bad input, before anything is written (but a listing of an
      image folder, beside the workdir).
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  compilation.keep_compiled()
  checks.validate_eval(config, jax.device_count())
  if config.protocol not in PROTOCOLS:
    raise unknown('protocol', config.protocol, PROTOCOLS)
  setup = evaluation.prepare(config, path)
  results = PROTOCOLS[config.protocol](setup, path)
  return evaluation.record(setup, results, workdir_lib.absolute(path))


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Protocol, such as configs/eval_knn.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder of the evaluation.', required=True
  )
  flags.mark_flag_as_required('config')
  cli.run(lambda: evaluate(CONFIG.value, WORKDIR.value))
