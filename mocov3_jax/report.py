"""A report on runs: python -m mocov3_jax.report RUN [RUN ...] \\
    --out=report.html

RUN is the workdir of a pre-training run, or a folder of them (a sweep).
--out ends with
  .html  one page with charts to hover over and zoom; opens from disk, loads
         nothing
  .png   a figure of the same
  .csv   a line a run
or --format=html|png|csv says which. A report that is there is replaced. The
last line on stdout is one JSON object.
"""

from absl import flags

from mocov3_jax.base import console
from mocov3_jax.config import command_line
from mocov3_jax.reports import report

if __name__ == '__main__':
  OUT = flags.DEFINE_string(
      'out', None, 'The file; its folder exists.', required=True
  )
  FORMAT = flags.DEFINE_string(
      'format', '', 'html, png or csv; default: as --out ends.'
  )
  command_line.run(
      lambda words: report.report(
          words, OUT.value, FORMAT.value,
          note=console.say,
      ),
      words=True,
  )
