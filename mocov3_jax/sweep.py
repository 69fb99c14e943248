"""Trains a grid: python -m mocov3_jax.sweep --config=FILE --workdir=DIR \\
    --grid optimizer.lr_per_256=5e-5,1e-4 \\
    --grid model.patch_embed=learned,frozen \\
    --seeds=3 [--config.FIELD=VALUE ...] [--evaluate=FILE ...] \\
    [--print=commands]

Trains one run for each combination, one after another, each in its own folder
in DIR. Run the same command again to continue; more values and seeds may be
added. If the same command is started several times, such as once per GPU, the
processes share the work. A table of means over the seeds comes last on stderr,
and on stdout as one JSON object.
"""

from mocov3_jax.config import command_line
from mocov3_jax.sweeps import grid as sweep_grid
from mocov3_jax.sweeps import sweep


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  config = flags.config('Recipe, such as configs/digits.py.')
  workdir = flags.string('workdir', None, 'Folder of the sweep.', required=True)
  grid = flags.repeated(
      'grid', 'FIELD=VALUE,VALUE,...: an axis. Put values that contain commas '
      'in brackets: data.std=(0.3,),(0.4,).',
  )
  seeds = flags.integer(
      'seeds', 1, 'Number of seeds of each grid point: 0, 1, ...; 1 = only the '
      'seed of the config.', at_least=1,
  )
  evaluate = flags.repeated(
      'evaluate', 'Protocol for each run that is done, such as '
      'configs/eval_linear.py:small.',
  )
  print_ = flags.string(
      'print', None, 'commands: print shell commands for the remaining runs, '
      'and run nothing.',
  )
  return lambda: sweep.main(
      sweep_grid.parse(
          flags.config_file, config.value, flags.overrides, grid.value,
          seeds.value,
      ),
      config.value, workdir.value, evaluate.value, print_.value,
  )


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
