"""Converts weights between files and checkpoints."""

import collections
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.base.files import absolute, run_path
from mocov3_jax.config import checks
from mocov3_jax.runs import network
from mocov3_jax.runs.network import ENCODERS
from mocov3_jax.weights import (
  files,
  our_checkpoints,
  timm_folder,
  torch_checkpoints,
)
from mocov3_jax.weights.state_dict import Weights, require_finite


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
  if target.startswith(timm_folder.PREFIX):
    return _export_folder(source, target, encoder, config, num_heads, ignore)
  to = absolute(target, '--to')
  one = to.name.endswith(files.SUFFIXES) and (
      not to.name.endswith(torch_checkpoints.FULL)
  )
  if encoder != 'query' and not one:
    raise UserError(
        f'--encoder={encoder}, but --to={target} gets both encoders. Use '
        '.pth or .safetensors as --to.'
    )
  if to.exists():
    raise UserError(f'--to={target} exists. Use a new path.')
  if source.startswith(timm_folder.PREFIX):
    weights, left_out = timm_folder.read(
        source, '--from', config, num_heads, ignore
    )
  elif run_path(source, '--from').is_dir():
    return _export(source, to, encoder, config is not None or num_heads
                   or ignore)
  else:
    weights, left_out = torch_checkpoints.read(
        absolute(source, '--from'), f'--from={source}', config, num_heads,
        ignore,
    )
  require_finite(f'--from={source}', weights)
  if target.endswith(files.SUFFIXES):
    written = torch_checkpoints.write(to, weights, encoder)
    return _report(source, target, weights, written, left_out)
  written, complete = our_checkpoints.write(target, weights)
  result = _report(source, target, weights, written, left_out)
  if config is not None and not complete:
    console.say(
        f'note: --from={source} has no complete state of this recipe (both '
        'encoders, heads, optimizer); train cannot continue from --to.'
    )
  return result | {'can_continue': complete}


def _export_folder(
    source: str, target: str, encoder: str, config: ConfigDict | None,
    num_heads: int, ignore: tuple[str, ...],
) -> dict[str, Any]:
  """Writes a folder for timm, of a run of ours or of a file."""
  to = absolute(target.removeprefix(timm_folder.PREFIX), '--to')
  if to.exists():
    raise UserError(f'--to={target} exists. Use a new path.')
  left_out, names, run = {}, (), ''
  if run_path(source, '--from').is_dir():
    _refuse_unused(source, config is not None or num_heads or ignore)
    weights = our_checkpoints.read(source)
    _, folder = network.locate(source)
    run = str(folder.parent.parent)
    names = network.class_names(folder)
  else:
    weights, left_out = torch_checkpoints.read(
        absolute(source, '--from'), f'--from={source}', config, num_heads,
        ignore,
    )
  classes = ('params', 'classifier', 'bias')
  if encoder == 'query' and classes in weights.flat:
    count = len(weights.flat[classes])
    names = names or tuple(map(str, range(count)))
  else:
    names = ()
  require_finite(f'--from={source}', weights)
  written = timm_folder.write(to, weights, encoder, run, names)
  return _report(source, target, weights, written, left_out)


def _refuse_unused(source: str, unused: Any) -> None:
  if unused:
    raise UserError(
        f'--from={source} is a checkpoint of ours, which tells its '
        'architecture. Leave out --config, --num_heads and --ignore.'
    )


def _export(
    source: str, target: epath.Path, encoder: str, unused: Any
) -> dict[str, Any]:
  _refuse_unused(source, unused)
  if not target.name.endswith(files.SUFFIXES):
    raise UserError(
        f'--to={target} is no kind of file that is known, and --from={source} '
        f'is a folder. Use, as --to, a file that ends with '
        f'{", ".join(files.SUFFIXES)}.'
    )
  weights = our_checkpoints.read(source)
  require_finite(f'--from={source}', weights)
  written = torch_checkpoints.write(target, weights, encoder)
  return _report(source, str(target), weights, written, {})


def _report(
    source: str, target: str, weights: Weights, written: dict[Any, str],
    left_out: dict[str, str],
) -> dict[str, Any]:
  width = max(map(len, [*weights.names.values(), *left_out]), default=0)
  for path, array in weights.flat.items():
    if path in written:
      name = console.shown(weights.names[path])
      print(f'{name:{width}}  ->  {written[path]}  {array.shape}')
  # Such as two moments of each tensor, which would bury the rest.
  lost = collections.Counter(p[0] for p in weights.flat if p not in written)
  for kind, count in lost.items():
    print(f'{kind}: {count} tensors  ->  (not in the target)')
  for name, reason in left_out.items():
    print(f'{console.shown(name):{width}}  ->  (left out: {reason})')
  for text in weights.assumed:
    console.say(f'note: assumed {text}')
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
