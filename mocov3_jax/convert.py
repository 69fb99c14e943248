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

import collections
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
import numpy as np

from mocov3_jax import checks, models
from mocov3_jax.errors import UserError, unknown
from mocov3_jax.tools import (
  cli,
  notes,
  our_weights,
  torch_weights,
  weight_files,
)
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
    config: the recipe of the run, for a file. Then the optimizer's state is
      kept, and `train` can continue. None = what a file of ours tells of
      itself; else the architecture is read off the tensors.
    num_heads: attention heads of a ViT, for the latter; 0 = the paper's for
      its width.
    ignore: names in a file to leave out; a final * matches the rest.

  Returns:
    The results, flat.

  Raises:
    UserError: for a bad source, one that does not fit, or a target that
      exists; nothing is written then.
  """
  if encoder not in ENCODERS:
    raise unknown('--encoder', encoder, ENCODERS)
  if config is not None:
    checks.validate(config)
  to = absolute(target, '--to')
  one = to.name.endswith(weight_files.SUFFIXES) and (
      not to.name.endswith(torch_weights.FULL)
  )
  if encoder != 'query' and not one:
    raise UserError(
        f'--encoder={encoder}, but --to={target} gets both encoders. Allowed: '
        '.pth or .safetensors as --to.'
    )
  if to.exists():
    raise UserError(f'--to={target} exists. Allowed: a new path.')
  if absolute(source, '--from').is_dir():
    return _export(source, to, encoder, config is not None or num_heads
                   or ignore)
  weights, left_out = torch_weights.read(
      absolute(source, '--from'), config, num_heads, ignore
  )
  if target.endswith(weight_files.SUFFIXES):
    written = torch_weights.write(to, weights, encoder)
    return _report(source, target, weights, written, left_out)
  written, complete = our_weights.write(target, weights)
  result = _report(source, target, weights, written, left_out)
  if config is not None and not complete:
    notes.say(_incomplete(source, config.knn.queue_share))
  return result | {'can_continue': complete}


def _incomplete(source: str, queue_share: float) -> str:
  lacking = 'both encoders, heads, optimizer' if not queue_share else (
      f'no file has the queue of knn.queue_share={queue_share}; 0 needs none'
  )
  return (
      f'note: --from={source} has no complete state of this recipe '
      f'({lacking}); train cannot continue from --to.'
  )


def _export(
    source: str, target: epath.Path, encoder: str, unused: Any
) -> dict[str, Any]:
  if unused:
    raise UserError(
        f'--from={source} is a checkpoint of ours, which tells its '
        'architecture. Allowed: neither --config, --num_heads nor --ignore.'
    )
  if not target.name.endswith(weight_files.SUFFIXES):
    raise UserError(
        f'--to={target} is no kind of file that is known, and --from={source} '
        f'is a folder. Allowed: as --to, a file that ends with '
        f'{", ".join(weight_files.SUFFIXES)}.'
    )
  weights = our_weights.read(source)
  written = torch_weights.write(target, weights, encoder)
  return _report(source, str(target), weights, written, {})


def _report(
    source: str, target: str, weights: Weights, written: dict[Any, str],
    left_out: dict[str, str],
) -> dict[str, Any]:
  width = max(map(len, [*weights.names.values(), *left_out]), default=0)
  for path, array in weights.flat.items():
    if path in written:
      name = weights.names[path]
      print(f'{name:{width}}  ->  {written[path]}  {array.shape}')
  # Such as two moments of each tensor, which would bury the rest.
  lost = collections.Counter(p[0] for p in weights.flat if p not in written)
  for kind, count in lost.items():
    print(f'{kind}: {count} tensors  ->  (not in the target)')
  for name, reason in left_out.items():
    print(f'{name:{width}}  ->  (left out: {reason})')
  for text in weights.assumed:
    notes.say(f'note: assumed {text}')
  config = weights.config
  backbone = models.build_backbone(config.model, config.data.image_size)
  result = {
      'from': source,
      'to': target,
      'model': config.model.name,
      'image_size': config.data.image_size,
      'step': weights.step,
      'tensors': len(written),
      'values': int(sum(np.size(weights.flat[path]) for path in written)),
      'left_out': len(weights.flat) - len(written) + len(left_out),
  }
  if config.model.name in models.VITS:
    result['num_heads'] = backbone.num_heads
    result['positions'] = backbone.positions
  return result


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
  cli.run(
      lambda: convert(
          FROM.value, TO.value, ENCODER.value, CONFIG.value, NUM_HEADS.value,
          tuple(IGNORE.value),
      )
  )
