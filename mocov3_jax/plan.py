"""Plans a run on TPUs that are not there: python -m mocov3_jax.plan \\
    --config=FILE --topology=v5e:16x16

Compiles the real step of a recipe at full size with the real TPU compiler, on
any machine, and tells whether it fits, what it computes, moves and sends, and
what time that takes by the chip's published peaks. Nothing is measured. Needs
the compiler: pip install -r requirements-tpu-plan.txt. Takes minutes.

A table goes to stderr; the last line on stdout is one JSON object.
"""

from absl import flags
from ml_collections import config_flags

from mocov3_jax.config import command_line
from mocov3_jax.config import training as config_lib
from mocov3_jax.planning import plan

if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/imagenet/vit_b16.py.'
  )
  TOPOLOGY = flags.DEFINE_string(
      'topology', None, 'Chip and shape, such as v5e:16x16.', required=True
  )
  IMAGES = flags.DEFINE_integer(
      'images', config_lib.IMAGENET_IMAGES, 'In the training set.'
  )
  PRICE = flags.DEFINE_float('price', 0.0, 'Of a chip for an hour.')
  PROPOSE = flags.DEFINE_bool('propose', True, 'Try what fits, if it does not.')
  flags.mark_flag_as_required('config')
  command_line.run(
      lambda: plan.plan(
          CONFIG.value, TOPOLOGY.value, IMAGES.value, PRICE.value, PROPOSE.value
      )
  )
