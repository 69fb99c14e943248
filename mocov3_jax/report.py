"""A report on runs: python -m mocov3_jax.report RUN [RUN ...] \\
    --out=report.html

RUN is the workdir of a pre-training run, or a folder of them (a sweep).
--out ends with
  .html  one page with charts to hover over and zoom; opens from disk, loads
         nothing
  .png   the same as a figure
  .csv   one line per run
or --format=html|png|csv selects the format. An existing report is replaced. The
last line on stdout is one JSON object.
"""

from mocov3_jax.base import console
from mocov3_jax.config import command_line
from mocov3_jax.reports.report import report


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns what they ask for, given the runs."""
  out = flags.string('out', None, 'The file; its folder exists.', required=True)
  format_ = flags.string(
      'format', '', 'html, png or csv; default: as --out ends.'
  )
  return lambda runs: report(
      runs, out.value, format_.value, note=console.say
  )


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv, words=True)


if __name__ == '__main__':
  command_line.execute(main)
