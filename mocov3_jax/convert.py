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

Prints every tensor that it writes: its name in A, its name in B, its shape. The
last line on stdout is one JSON object.
"""

from absl import flags
from ml_collections import config_flags

from mocov3_jax.config import command_line
from mocov3_jax.weights import convert

if __name__ == '__main__':
  FROM = flags.DEFINE_string('from', None, 'Source.', required=True)
  TO = flags.DEFINE_string('to', None, 'Target; must not exist.', required=True)
  ENCODER = flags.DEFINE_string(
      'encoder', 'query', 'Which encoder a backbone alone is: query, momentum.'
  )
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe of the run, for files of PyTorch.'
  )
  NUM_HEADS = flags.DEFINE_integer(
      'num_heads', 0, 'Attention heads; 0 = as the file or the paper says.'
  )
  IGNORE = flags.DEFINE_list(
      'ignore', [], 'Tensors to leave out; a final * matches the rest.'
  )
  command_line.run(
      lambda: convert.convert(
          FROM.value, TO.value, ENCODER.value, CONFIG.value, NUM_HEADS.value,
          tuple(IGNORE.value),
      )
  )
