"""Trains a grid: python -m mocov3_jax.sweep --config=FILE --workdir=DIR \\
    --grid optimizer.lr_per_256=5e-5,1e-4 \\
    --grid model.patch_embed=learned,frozen \\
    --seeds=3 [--config.FIELD=VALUE ...] [--evaluate=FILE ...] \\
    [--print=commands]

A run for each combination, one after another, each in a folder of DIR. Run the
same line again to continue; more values and seeds may be added. The same line
started several times, such as once a GPU, shares the work. A table over the
seeds comes last on stderr, and on stdout as one JSON object.
"""

from absl import flags
from ml_collections import config_flags

from mocov3_jax.config import command_line
from mocov3_jax.sweeps import grid as sweep_grid
from mocov3_jax.sweeps import sweep

if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/digits.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder of the sweep.', required=True
  )
  GRID = flags.DEFINE_multi_string(
      'grid', [], 'FIELD=VALUE,VALUE,...: an axis. Values with commas stand in '
      'brackets: data.std=(0.3,),(0.4,).'
  )
  SEEDS = flags.DEFINE_integer(
      'seeds', 1, 'Of each grid point: 0, 1, ...; 1 = that of the config.',
      lower_bound=1,
  )
  EVALUATE = flags.DEFINE_multi_string(
      'evaluate', [], 'Protocol for each run that is done, such as '
      'configs/eval_linear.py:small.'
  )
  PRINT = flags.DEFINE_string(
      'print', None, '"commands" prints a line of shell for each run that is '
      'left, such as for launch/sweep_array.sbatch, and runs nothing.'
  )
  flags.mark_flag_as_required('config')
  command_line.run(
      lambda: sweep.main(
          sweep_grid.parse(
              flags.FLAGS['config'].config_filename, CONFIG.value,
              flags.FLAGS['config'].override_values, GRID.value, SEEDS.value,
          ),
          CONFIG.value, WORKDIR.value, EVALUATE.value, PRINT.value,
      )
  )
