"""Draws what training sees: python -m mocov3_jax.preview --config=FILE \\
    --out=views.png [--count=8]

A row an example: the original with the first crop (red) and the second
(blue), the two views, and what was drawn for each. They are the examples,
and the draws, of the run's first step.
"""

from absl import flags
from ml_collections import config_flags

from mocov3_jax.config import command_line
from mocov3_jax.pictures import views
from mocov3_jax.pictures.views import ROWS

if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/digits.py.'
  )
  OUT = flags.DEFINE_string('out', None, 'PNG to write.', required=True)
  COUNT = flags.DEFINE_integer(
      'count', None, f'Examples to draw; {ROWS} if there are so many.'
  )
  flags.mark_flag_as_required('config')
  command_line.run(lambda: views.preview(CONFIG.value, OUT.value, COUNT.value))
