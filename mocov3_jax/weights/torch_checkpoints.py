"""Reads files of PyTorch and safetensors as `Weights`, and writes them."""

from collections.abc import Mapping
import contextlib
import fnmatch
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.base import files as base_files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.runs.network import Path
from mocov3_jax.weights import files, infer_config, state_dict, torch_optimizer
from mocov3_jax.weights.state_dict import Place, Weights
from mocov3_jax.weights.torch_names import COUNTER

FULL = '.pth.tar'
# The release's names of its architectures, by our name and whether the stem is
# convolutional.
ARCHITECTURES = {
    ('vit_s', False): 'vit_small', ('vit_s', True): 'vit_conv_small',
    ('vit_b', False): 'vit_base', ('vit_b', True): 'vit_conv_base',
}


def read(
    path: epath.Path, source: str, config: ConfigDict | None,
    num_heads: int, ignore: tuple[str, ...], heads_beside: int = 0,
) -> tuple[Weights, dict[str, str]]:
  """Reads a file and finds the place of each tensor.

  Args:
    path: path of the file.
    source: what messages call it, such as '--from=FILE'.
    config: config of the run; None = as a file of this project specifies, or
      else inferred from the tensors.
    num_heads: attention heads of a ViT that is inferred; 0 = the paper's
      number.
    ignore: names to leave out; a final * matches the rest.
    heads_beside: attention heads given by another file beside it; 0 = unknown.

  Returns:
    The weights, and the names of what was left out with the reasons.

  Raises:
    UserError: if it cannot be read, or does not fit the architecture.
  """
  file = files.read(path, source, ignore)
  dropped = _dropped(source, file, ignore)
  full = any(name.startswith('base_encoder.') for name in file.tensors)
  assumed = ()
  told = config is not None
  if not told:
    config = _described(source, file)
  # Only a recipe can tell what the optimizer's state means.
  moments = file.optimizer if full and config is not None else {}
  if config is None:
    config, assumed = _inferred(
        source, file, full, num_heads or heads_beside
    )
  elif num_heads:
    raise UserError(
        f'--num_heads={num_heads}, but the architecture of {source} is known. '
        'Allowed: model.num_heads in the config.'
    )
  checks.validate(config)
  tensors = {n: x for n, x in file.tensors.items() if n not in dropped}
  step = _step(tensors, file.description)
  places = _present(config, tensors) if full else state_dict.backbone_places(
      config, 'query', _classes(config, tensors)
  )
  known = state_dict.constants(config, places, step)
  flat = state_dict.from_torch(source, tensors, places, known, file.rounding)
  names = {place.path: name for name, place in places.items()}
  if moments:
    moments, moment_names = _moments(source, config, moments)
    names |= moment_names
  left_out = dict.fromkeys(dropped, 'ignored')
  left_out |= {n: 'not a weight' for n in known if n in tensors}
  kept = {*files.STATES} | ({'optimizer'} if moments else set())
  left_out |= {
      n: 'not a weight' for n in file.extra if n not in kept | {*dropped}
  }
  if 'optimizer' in left_out and full:
    left_out['optimizer'] = (
        'not a state of the release' if told else
        'kept only with --config, the recipe of the run'
    )
  return Weights(config, step, flat | moments, names, assumed), left_out


def _moments(
    source: str, config: ConfigDict, state: dict[int, dict[str, Any]]
) -> tuple[dict[Path, np.ndarray], dict[Path, str]]:
  # States are numbered over the whole model, even if the file lacks parts of
  # it.
  places = state_dict.full_places(config)
  known = state_dict.constants(config, places, 0)
  order = torch_optimizer.parameter_order([*places, *known])
  moments = torch_optimizer.read(source, state, order, places)
  owners = {place.path: name for name, place in places.items()}
  theirs = {ours: slot for slot, ours in torch_optimizer.MOMENTS.items()}
  return moments, {
      (slot, *rest): f'{owners["params", *rest]} ({theirs[slot]})'
      for slot, *rest in moments
  }


def _dropped(
    source: str, file: files.File, ignore: tuple[str, ...]
) -> list[str]:
  names = [*file.tensors, *file.extra]
  dropped = set()
  for pattern in ignore:
    found = fnmatch.filter(names, pattern)
    if not found:
      raise UserError(
          f'--ignore={pattern} names nothing in {source}. Use names of '
          'its tensors, or their beginning and a *.'
      )
    dropped.update(found)
  return sorted(dropped)


def _present(
    config: ConfigDict, tensors: Mapping[str, np.ndarray]
) -> dict[str, Place]:
  # Some checkpoints lack parts that only training needs. A part that is there
  # must be complete.
  parts = (
      'momentum_encoder.', 'predictor.',
      f'base_encoder.{state_dict.head_name(config)}.',
  )
  absent = tuple(
      part for part in parts if not any(n.startswith(part) for n in tensors)
  )
  return {
      name: place for name, place in state_dict.full_places(config).items()
      if not name.startswith(absent)
  }


def _described(source: str, file: files.File) -> ConfigDict | None:
  if not file.description:
    return None
  try:
    return workdir_lib.complete(
        ConfigDict(base_files.parse(file.description)['config']),
        config_lib.schema(), source,
    )
  except (
      ValueError, TypeError, KeyError, AttributeError, UserError
  ) as e:
    raise UserError(
        f'{source}: its description of the architecture is not one of this '
        f'version: {e} Use --config, the recipe of the run.'
    ) from e


def _inferred(
    source: str, file: files.File, full: bool, num_heads: int
) -> tuple[ConfigDict, tuple[str, ...]]:
  def under(prefix):
    return {
        name.removeprefix(prefix): x for name, x in file.tensors.items()
        if name.startswith(prefix)
    }

  if num_heads < 0:
    raise UserError(f'--num_heads={num_heads}. Allowed: 0 or more.')
  backbone = under('base_encoder.') if full else file.tensors
  try:
    frozen = not full or not _has_moments(
        file, 'base_encoder.patch_embed.proj.weight'
    )
    config = infer_config.config_of(
        source, backbone, num_heads, frozen, file.rounding
    )
    if full:
      head = f'base_encoder.{state_dict.head_name(config)}.'
      infer_config.set_heads(config, under(head), under('predictor.'))
  except (ValueError, TypeError, IndexError, ZeroDivisionError) as e:
    raise UserError(
        f'{source}: its tensors have shapes of no ViT or ResNet ({e}). '
        'Use checkpoints of MoCo v3, and backbones with the names of timm '
        'or torchvision.'
    ) from e
  return config, _assumed(source, config, full, num_heads)


def _assumed(
    source: str, config: ConfigDict, full: bool, num_heads: int
) -> tuple[str, ...]:
  """Returns what is assumed since no tensor specifies it, in words."""
  assumed = [
      f'normalisation: mean {config.data.mean}, std {config.data.std}',
      f'data.source: {config.data.source} (name another one to evaluate and '
      'extract)',
  ]
  if config.model.name in models.RESNETS:
    return (f'image size: {config.data.image_size}', *assumed)
  if num_heads:
    return tuple(assumed)
  _, width, heads = models.VITS[config.model.name]
  if not full and config.model.name == 'vit_s':
    raise UserError(
        f'{source}: the number of attention heads cannot be inferred from '
        f'weights, and ViTs of width {width} come with 12 (MoCo v3) and with 6 '
        '(DeiT, timm). '
        'Use convert with --num_heads=12 or --num_heads=6.'
    )
  return (f'attention heads: {heads}', *assumed)


def _has_moments(file: files.File, name: str) -> bool:
  if not file.optimizer:
    return False
  order = torch_optimizer.parameter_order(file.tensors)
  return name in order and order.index(name) in file.optimizer


def _classes(config: ConfigDict, tensors: Mapping[str, np.ndarray]) -> int:
  name = f'{state_dict.head_name(config)}.weight'
  return len(tensors[name]) if name in tensors and tensors[name].ndim else 0


def _step(tensors: Mapping[str, np.ndarray], description: str) -> int:
  if description:
    with contextlib.suppress(ValueError, KeyError, TypeError):
      return _whole(base_files.parse(description)['step'])
  # Both views of a step pass each BatchNorm of the query encoder.
  counts = [
      int(x) for n, x in tensors.items() if n.endswith(COUNTER) and not x.ndim
  ]
  return max(counts, default=0) // 2


def _whole(step: Any) -> int:
  if type(step) is not int or not 0 <= step < 2**31:
    raise ValueError(f'step {step!r}')
  return step


def write(
    path: epath.Path, source: Weights, encoder: str
) -> dict[Path, str]:
  """Writes a file, of the kind given by its suffix.

  Args:
    path: ends with .pth.tar (everything), .pth or .safetensors (a backbone).
    source: what to write.
    encoder: 'query' or 'momentum': whose backbone to write.

  Returns:
    The name of each array that was written, by its path.

  Raises:
    UserError: if the source lacks something.
  """
  config = source.config
  full = path.name.endswith(FULL)
  classifier = ('params', 'classifier', 'bias')
  classes = 0
  if classifier in source.flat and encoder == 'query':
    classes = len(source.flat[classifier])
  places = (
      state_dict.full_places(config) if full
      else state_dict.backbone_places(config, encoder, classes)
  )
  tensors = state_dict.to_torch(source, places)
  written = {place.path: name for name, place in places.items()}
  description = json.dumps(
      {'config': workdir_lib.to_json(config), 'step': source.step}
  )
  if full:
    content, moments = _release(source, tensors, places)
    files.write_torch(path, content, description)
    return written | moments
  if path.name.endswith(files.SAFETENSORS):
    files.write_safetensors(path, tensors, description)
  else:
    files.write_torch(path, {'model': tensors}, description)
  return written


def _release(
    source: Weights, tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
) -> tuple[dict[str, Any], dict[Path, str]]:
  """Returns the dict that the release saves, and the moments' names in it."""
  model = source.config.model
  key = model.name, model.patch_embed == 'conv'
  optimizer, names = torch_optimizer.write(source, tensors, places)
  # The release counts epochs of ImageNet.
  images = config_lib.IMAGENET_IMAGES
  steps_per_epoch = max(1, images // source.config.batch_size)
  content = {
      'epoch': source.step // steps_per_epoch,
      'arch': ARCHITECTURES[key] if key in ARCHITECTURES else model.name,
      'state_dict': {f'module.{n}': x for n, x in tensors.items()},
  }
  if names:
    content['optimizer'] = optimizer
    # PyTorch's defaults; bfloat16 needs no loss scaling.
    content['scaler'] = {
        'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5,
        'growth_interval': 2000, '_growth_tracker': 0,
    }
  return content, names
