"""Evaluates: python -m mocov3_jax.evaluate --config=configs/eval_knn.py \\
    --config.checkpoint=DIR --workdir=OUT

DIR is the workdir of a training run (its newest checkpoint) or one of its
folders checkpoints/<step>. The protocols: configs/eval_knn.py, eval_linear.py,
eval_logistic.py, eval_finetune.py. The last line on stdout is one JSON object.
It is also written to OUT/result.json and added as a line to results.jsonl in
the run's workdir. The same command continues a linear probe or a fine-tuning
that was stopped. Several processes can share the work; start them as for train.
"""

from typing import Any

from mocov3_jax import protocols
from mocov3_jax.config import command_line
from mocov3_jax.parallel import processes


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  config = flags.config('Protocol, such as configs/eval_knn.py.')
  workdir = flags.string(
      'workdir', None, 'Folder of the evaluation.', required=True
  )
  several = flags.processes()

  def act() -> dict[str, Any] | None:
    processes.start(*several())
    results = protocols.evaluate(config.value, workdir.value)
    return results if processes.is_primary() else None

  return act


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
