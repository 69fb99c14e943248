"""Draws what training sees: python -m mocov3_jax.preview --config=FILE \\
    --out=views.png [--count=8]

One row per example: the original with the first crop (red) and the second
(blue), the two views, and the random parameters of each view. The examples and
the parameters are those of the run's first step.
"""

from mocov3_jax.config import command_line
from mocov3_jax.pictures import views


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  config = flags.config('Recipe, such as configs/digits.py.')
  out = flags.string('out', None, 'PNG to write.', required=True)
  count = flags.integer(
      'count', None, f'Examples to draw; {views.ROWS} if there are so many.'
  )
  return lambda: views.preview(config.value, out.value, count.value)


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
