"""Pre-trains: python -m mocov3_jax.train --config=FILE --workdir=DIR

Run the same command again to continue exactly where it stopped. The last line
on stdout is one JSON object with the results.
"""

from typing import Any

from mocov3_jax.config import command_line
from mocov3_jax.parallel import processes
from mocov3_jax.training.pretrain import pretrain


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  config = flags.config('Recipe, such as configs/digits.py.')
  workdir = flags.string('workdir', None, 'Folder of the run.', required=True)
  several = flags.processes()

  def act() -> dict[str, Any] | None:
    processes.start(*several())
    processes.enable_compilation_cache()
    results = pretrain(config.value, workdir.value)
    return results if processes.is_primary() else None

  return act


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
