"""Measures: python -m mocov3_jax.benchmark WORD --config=FILE

input    images per second that the host reads and crops, by the number of
         threads and processes, compared with the original's chain of Pillow
         operations (all augmentation on the host) on the same number of cores;
         the most that Python's interpreter lock allows; and what chips need.
augment  what the augmentation of crops on the device adds to a training step,
         in FLOPs (as the compiler counts them) and in time.
step     images per second, utilisation of the device, memory and compile time
         of the whole training step, alternating with the same step in PyTorch.
         --suite: for several networks, each at the largest batch that fits.
attention  milliseconds of each implementation of attention in one block.
losses   the first losses of a run on this machine's device and on its CPU.

A table goes to stderr; the last line on stdout is one JSON object.
"""

from mocov3_jax.benchmarks import attention, host, losses, step
from mocov3_jax.config import command_line


def define(flags: command_line.Flags) -> dict[str, command_line.Action]:
  """Defines the flags; returns what they ask for, by the word given."""
  config = flags.config('Recipe, such as configs/folder.py:/my/photos.')
  images = flags.integer(
      'images', 640, 'input: images to read per round.', at_least=1
  )
  rounds = flags.integer(
      'rounds', 5, 'Measurements of each of the compared variants.', at_least=1
  )
  steps = flags.integer(
      'steps', 10, 'step, attention: steps per round; losses: steps in total.',
      at_least=1,
  )
  against = flags.string(
      'against', 'compiled',
      'step: the PyTorch variant to compare with: "compiled" by '
      'torch.compile, "eager", or "none".',
  )
  profile = flags.string(
      'profile', None, 'step: folder for a profile of our step.'
  )
  suite = flags.switch(
      'suite', False, 'step: ViT-S, ViT-B, ViT-L and ResNet-50 instead.'
  )
  return {
      'input': lambda: host.benchmark_input(
          config.value, images.value, rounds.value
      ),
      'augment': lambda: host.benchmark_augment(config.value, rounds.value),
      'attention': lambda: attention.benchmark_attention(
          config.value, rounds.value, steps.value
      ),
      'losses': lambda: losses.benchmark_losses(config.value, steps.value),
      'step': lambda: step.main(
          config.value, against.value, rounds.value, steps.value,
          profile.value, suite.value,
      ),
  }


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
