"""Plans a run on TPUs or GPUs that are not there: python -m mocov3_jax.plan \\
    --config=FILE --topology=v5e:16x16

Compiles the real step of a recipe at full size with the real TPU compiler, on
any machine, and tells whether it fits, what it computes, moves and sends; what
time each part of the model takes at the least; and what time at an assumed
share of the chip's peak (--mfu). Nothing is measured, unless this machine has
the planned chips. Needs the compiler, which the extra `tpu` brings. Takes
minutes.

--schedule reads the program's final instructions as well, for a bound that
tells far more: what the compiler made of attention, norms, re-layouts.
--images_per_chip=8,16,32 compares shares of the batch. For GPUs
(--topology=h100:8, the extra `gpu-plan`) it tells memory and kernels alone.

A table goes to stderr; the last line on stdout is one JSON object.
"""

from mocov3_jax.config import command_line
from mocov3_jax.planning.plan import plan


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns what they ask for."""
  config = flags.config('Recipe, such as configs/imagenet/vit_b16.py.')
  topology = flags.string(
      'topology', None, 'Chip and shape, such as v5e:16x16, or h100:8.',
      required=True
  )
  images = flags.integer(
      'images', 0, 'In the training set; 0 = as many as the source has.'
  )
  price = flags.number('price', 0.0, 'Of a chip for an hour, dollars.')
  mfu = flags.number(
      'mfu', 0.4, 'Share of the chips\' peak that the estimate takes.'
  )
  propose = flags.switch('propose', True, 'Try what fits, if it does not.')
  schedule = flags.switch(
      'schedule', False, 'Read the final schedule of the program.'
  )
  dump = flags.string(
      'dump', '', 'New folder for the texts that the compiler printed.'
  )
  shares = flags.names(
      'images_per_chip', 'Images a chip to compare, such as 8,16,32.'
  )
  return lambda: plan(
      config.value, topology.value, images.value, price.value, mfu.value,
      propose.value, schedule.value, dump.value, shares.value,
  )


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
