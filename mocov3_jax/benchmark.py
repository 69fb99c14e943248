"""Measures: python -m mocov3_jax.benchmark input|augment|step --config=FILE

input    images a second that the host reads and crops, by the number of
         threads, beside the original's chain of Pillow operations (all of the
         augmentation on the host) on as many cores.
augment  what the augmentation of crops on the device adds to a training step,
         in FLOPs (as the compiler counts them) and in time.
step     images a second, use of the device, memory and compile time of the
         whole training step, taking turns with the same step in PyTorch.
         --suite: for several networks, at the largest batch that fits.

A table goes to stderr; the last line on stdout is one JSON object.
"""

from absl import flags
from ml_collections import config_flags

from mocov3_jax.benchmarks import host, step
from mocov3_jax.config import command_line

if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/folder.py:/my/photos.'
  )
  IMAGES = flags.DEFINE_integer(
      'images', 640, 'input: images to read at each turn.', lower_bound=1
  )
  ROUNDS = flags.DEFINE_integer(
      'rounds', 5, 'Turns of each contender.', lower_bound=1
  )
  STEPS = flags.DEFINE_integer(
      'steps', 10, 'step: steps in a turn.', lower_bound=1
  )
  AGAINST = flags.DEFINE_string(
      'against', 'compiled',
      'step: PyTorch as it is compared with, "compiled" by torch.compile, '
      '"eager", or "none".',
  )
  PROFILE = flags.DEFINE_string(
      'profile', None, 'step: folder for a profile of our step.'
  )
  SUITE = flags.DEFINE_bool(
      'suite', False, 'step: ViT-S, ViT-B, ViT-L and ResNet-50 instead.'
  )
  flags.mark_flag_as_required('config')
  command_line.run({
      'input': lambda: host.benchmark_input(
          CONFIG.value, IMAGES.value, ROUNDS.value
      ),
      'augment': lambda: host.benchmark_augment(CONFIG.value, ROUNDS.value),
      'step': lambda: step.main(
          CONFIG.value, AGAINST.value, ROUNDS.value, STEPS.value,
          PROFILE.value, SUITE.value,
      ),
  })
