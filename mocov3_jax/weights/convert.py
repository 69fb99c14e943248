"""Converts weights between files and checkpoints."""

import collections
from collections.abc import Iterable
from typing import Any

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
    source: a checkpoint folder of this project, timm:FOLDER, or a file.
    target: likewise; must not exist.
    encoder: 'query' or 'momentum': which encoder to write, if the target holds
      only one backbone.
    config: the recipe of the run, for a file. With it the optimizer's state is
      kept, and `train` can continue. None = what a file of this project says of
      itself; for other files the architecture is inferred from the tensors.
    num_heads: attention heads of a ViT whose architecture is inferred; 0 = the
      paper's number for its width.
    ignore: names in a file to leave out; a final * matches the rest.

  Returns:
    The results, as a flat dict.

  Raises:
    UserError: for a bad source, one that does not fit, or a target that
      exists; nothing is written then.
  """
  if encoder not in ENCODERS:
    raise unknown('--encoder', encoder, ENCODERS)
  if config is not None:
    checks.validate(config)
  timm = target.startswith(timm_folder.PREFIX)
  to = absolute(target.removeprefix(timm_folder.PREFIX), '--to')
  one = timm or to.name.endswith(files.SUFFIXES) and (
      not to.name.endswith(torch_checkpoints.FULL)
  )
  if encoder != 'query' and not one:
    raise UserError(
        f'--encoder={encoder}, but --to={target} gets both encoders. Use '
        '.pth, .safetensors or timm:FOLDER as --to.'
    )
  if to.exists():
    raise UserError(f'--to={target} exists. Use a new path.')
  ours = not source.startswith(timm_folder.PREFIX) and (
      run_path(source, '--from').is_dir()
  )
  to_file = target.endswith(files.SUFFIXES)
  if ours and not (timm or to_file):
    raise UserError(
        f'--to={target} is not a known kind of file, and --from={source} is a '
        'folder. Use timm:FOLDER as --to, or a file that ends with '
        f'{", ".join(files.SUFFIXES)}.'
    )
  weights, left_out = _read(source, ours, config, num_heads, ignore)
  require_finite(f'--from={source}', weights)
  if timm:
    run, names = _run_of(source) if ours else ('', ())
    written = timm_folder.write(
        to, weights, encoder, run, _class_names(weights, encoder, names)
    )
    return _report(source, target, weights, written, left_out)
  if to_file:
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


def _read(
    source: str, ours: bool, config: ConfigDict | None, num_heads: int,
    ignore: tuple[str, ...],
) -> tuple[Weights, dict[str, str]]:
  """Reads a folder of this project (`ours`), a folder of timm, or a file.

  Returns:
    The weights, and the names of what was left out with the reasons.
  """
  if source.startswith(timm_folder.PREFIX):
    return timm_folder.read(source, '--from', config, num_heads, ignore)
  if ours:
    _refuse_unused(source, config is not None or num_heads or ignore)
    return our_checkpoints.read(source), {}
  return torch_checkpoints.read(
      absolute(source, '--from'), f'--from={source}', config, num_heads, ignore
  )


def _run_of(source: str) -> tuple[str, Any]:
  """Returns the workdir of a folder of this project, and its class names."""
  _, folder = network.locate(source)
  return str(folder.parent.parent), network.class_names(folder)


def _class_names(
    weights: Weights, encoder: str, names: Any
) -> Iterable[str]:
  """Returns a name for each output of the classifier, if one is written."""
  classes = ('params', 'classifier', 'bias')
  if encoder != 'query' or classes not in weights.flat:
    return ()
  return names or tuple(map(str, range(len(weights.flat[classes]))))


def _refuse_unused(source: str, unused: Any) -> None:
  if unused:
    raise UserError(
        f'--from={source} is a checkpoint of this project, whose architecture '
        'is known. Leave out --config, --num_heads and --ignore.'
    )


def _report(
    source: str, target: str, weights: Weights, written: dict[Any, str],
    left_out: dict[str, str],
) -> dict[str, Any]:
  width = max(map(len, [*weights.names.values(), *left_out]), default=0)
  for path, array in weights.flat.items():
    if path in written:
      name = console.shown(weights.names[path])
      print(f'{name:{width}}  ->  {written[path]}  {array.shape}')
  # Only counted: the two moments of each tensor, say, would bury the rest.
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
