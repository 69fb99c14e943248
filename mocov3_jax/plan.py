"""Plans a run on TPUs or GPUs elsewhere: python -m mocov3_jax.plan \\
    --config=FILE --topology=v5e:16x16

Compiles the full-size training step of a recipe with the real TPU compiler, on
any machine. Shows whether the step fits into memory; what it computes, moves
and communicates; a lower bound on the time of each part of the model; and an
estimate of the time at an assumed share of the chip's peak (--mfu). Nothing is
measured unless this machine has the planned chips. Needs the compiler, which
the extra `tpu` installs. Takes minutes.

--schedule also reads the program's final instructions, for a much more detailed
bound: what the compiler made of attention, norms and re-layouts.
--images_per_chip=8,16,32 compares batch sizes per chip. For GPUs
(--topology=h100:8, the extra `gpu-plan`), only memory and kernels are shown.

A table goes to stderr; the last line on stdout is one JSON object.
"""

from mocov3_jax.config import command_line
from mocov3_jax.planning.plan import plan


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  config = flags.config('Recipe, such as configs/imagenet/vit_b16.py.')
  topology = flags.string(
      'topology', None, 'Chip and shape, such as v5e:16x16, or h100:8.',
      required=True
  )
  images = flags.integer(
      'images', 0, 'Training images; 0 = as many as the source has.'
  )
  price = flags.number('price', 0.0, 'Price of a chip per hour, dollars.')
  mfu = flags.number(
      'mfu', 0.4, 'Share of the chips\' peak that the estimate assumes.'
  )
  propose = flags.switch(
      'propose', True, 'If the run does not fit, look for changes with which '
      'it does.',
  )
  schedule = flags.switch(
      'schedule', False, 'Read the final schedule of the program.'
  )
  dump = flags.string(
      'dump', '', 'New folder in which to keep what the compiler prints.'
  )
  shares = flags.names(
      'images_per_chip', 'Numbers of images per chip to compare, such as '
      '8,16,32.',
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
