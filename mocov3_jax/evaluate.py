"""Evaluates: python -m mocov3_jax.evaluate --config=configs/eval_knn.py \\
    --config.checkpoint=DIR --workdir=OUT

DIR is the workdir of a training run (its newest checkpoint) or one of its
folders checkpoints/<step>. The protocols: configs/eval_knn.py, eval_linear.py,
eval_logistic.py, eval_finetune.py. The last line on stdout is one JSON object,
which OUT/result.json holds as well; a line of results.jsonl in the run's
workdir has the same. A linear probe or a fine-tuning that was stopped goes on
with the same line.
"""

from absl import flags
from ml_collections import config_flags

from mocov3_jax import protocols
from mocov3_jax.config import command_line

if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Protocol, such as configs/eval_knn.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder of the evaluation.', required=True
  )
  flags.mark_flag_as_required('config')
  command_line.run(lambda: protocols.evaluate(CONFIG.value, WORKDIR.value))
