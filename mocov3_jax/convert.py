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

Prints every tensor: its name in A, its name in B, its shape. The last line on
stdout is one JSON object.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
import numpy as np

from mocov3_jax import checks
from mocov3_jax.errors import UserError, unknown
from mocov3_jax.tools import cli, our_weights, torch_weights, weight_files
from mocov3_jax.tools.weights import ENCODERS, Weights
from mocov3_jax.workdir import absolute


def convert(
    source: str, target: str, encoder: str = 'query',
    config: ConfigDict | None = None, num_heads: int = 0,
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
  """Reads `source` and writes `target`.

  Args:
    source: a folder of ours or a file.
    target: likewise; must not exist.
    encoder: 'query' or 'momentum': which of the two a backbone alone is.
    config: the recipe of the run, for a source that has none of its own. Then
      the optimizer's state is kept, and `train` can continue. None = the
      architecture is read off the tensors.
    num_heads: attention heads of a ViT, which no file but ours tells; 0 = the
      paper's for its width.
    ignore: tensors of the source to leave out; a final * matches the rest.

  Returns:
    The results, flat.

  Raises:
    UserError: for a bad source, one that does not fit, or a target that
      exists; nothing is written then.
  """
  if encoder not in ENCODERS:
    raise unknown('--encoder', encoder, ENCODERS)
  if config is not None:
    checks.validate(config, 1)
  from_file = source.endswith(weight_files.SUFFIXES)
  to_file = target.endswith(weight_files.SUFFIXES)
  if not from_file and not to_file:
    raise UserError(
        f'--from={source} and --to={target} are both folders. Allowed: one of '
        f'them a file that ends with {", ".join(weight_files.SUFFIXES)}.'
    )
  if absolute(target, '--to').exists():
    raise UserError(f'--to={target} exists. Allowed: a new path.')
  if from_file:
    weights, left_out = torch_weights.read(
        absolute(source, '--from'), config, num_heads, ignore
    )
  else:
    weights, left_out = our_weights.read(source), {}
  if to_file:
    written = torch_weights.write(absolute(target, '--to'), weights, encoder)
  else:
    written = our_weights.write(target, weights)
  return _report(source, target, weights, written, left_out)


def _report(
    source: str, target: str, weights: Weights, written: dict[Any, str],
    left_out: dict[str, str],
) -> dict[str, Any]:
  names = [weights.names[path] for path in weights.flat]
  width = max(map(len, names), default=0)
  for path, array in weights.flat.items():
    to = written[path] if path in written else '(not in the target)'
    print(f'{weights.names[path]:{width}}  ->  {to}  {array.shape}')
  for name, reason in left_out.items():
    print(f'{name:{width}}  ->  (left out: {reason})')
  done = [array for path, array in weights.flat.items() if path in written]
  return {
      'from': source,
      'to': target,
      'model': weights.config.model.name,
      'step': weights.step,
      'tensors': len(done),
      'values': int(sum(np.size(array) for array in done)),
      'left_out': len(weights.flat) - len(done) + len(left_out),
  }


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
      'num_heads', 0, 'Attention heads; 0 = those of the paper.'
  )
  IGNORE = flags.DEFINE_list(
      'ignore', [], 'Tensors to leave out; a final * matches the rest.'
  )
  cli.run(
      lambda: convert(
          FROM.value, TO.value, ENCODER.value, CONFIG.value, NUM_HEADS.value,
          tuple(IGNORE.value),
      )
  )
