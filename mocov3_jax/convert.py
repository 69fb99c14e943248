"""Converts weights: python -m mocov3_jax.convert --from=A --to=B

A and B are each one of
  a folder           a checkpoint of ours: the workdir of a run (its newest
                     checkpoint) or one of its folders checkpoints/<step>; as B,
                     a new workdir
  FILE.pth.tar       a checkpoint of the MoCo v3 release: both encoders, heads,
                     predictor, statistics, and the optimizer's state
  FILE.pth           a backbone, with or without a linear classifier (the
                     release's linear probe, DeiT): PyTorch's file
  FILE.safetensors   the same with the names of timm
  timm:FOLDER        a folder for timm and the Hub: weights, config.json, card

Prints every tensor that it writes: its name in A, its name in B, its shape. The
last line on stdout is one JSON object.
"""

from mocov3_jax.config import command_line
from mocov3_jax.weights.convert import convert


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  source = flags.string('from', None, 'Source.', required=True)
  target = flags.string('to', None, 'Target; must not exist.', required=True)
  encoder = flags.string(
      'encoder', 'query', 'Encoder to write, if the target holds a single '
      'backbone: query or momentum.',
  )
  config = flags.config(
      'Recipe of the run, if --from is a PyTorch file.', required=False
  )
  num_heads = flags.integer(
      'num_heads', 0, 'Attention heads; 0 = as in the file or, if it does not '
      'say, in the paper.',
  )
  ignore = flags.names(
      'ignore', 'Tensors to leave out; a final * matches the rest.'
  )
  return lambda: convert(
      source.value, target.value, encoder.value, config.value, num_heads.value,
      tuple(ignore.value),
  )


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
