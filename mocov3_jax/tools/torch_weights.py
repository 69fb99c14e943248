"""Files of PyTorch and safetensors as `Weights`, and back."""

from collections.abc import Mapping
import fnmatch
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import config as config_lib
from mocov3_jax.errors import UserError
from mocov3_jax.tools import infer, torch_names, weight_files, weights
from mocov3_jax.tools.torch_names import COUNTER, Path
from mocov3_jax.tools.weights import Place, Weights
from mocov3_jax.workdir import to_json

FULL = '.pth.tar'
# Under which a safetensors file of ours tells its architecture.
METADATA = 'mocov3_jax'
# The release's names of its architectures, by ours and the patch embedding.
ARCHITECTURES = {
    ('vit_s', False): 'vit_small', ('vit_s', True): 'vit_conv_small',
    ('vit_b', False): 'vit_base', ('vit_b', True): 'vit_conv_base',
}
# The release counts epochs of ImageNet.
IMAGENET_IMAGES = 1_281_167


def read(
    path: epath.Path, config: ConfigDict | None, num_heads: int,
    ignore: tuple[str, ...],
) -> tuple[Weights, dict[str, str]]:
  """Reads a file and finds the place of each tensor.

  Args:
    path: of the file.
    config: of the run; None = read off the tensors.
    num_heads: attention heads of a ViT; 0 = as the file says, or else the
      paper's.
    ignore: tensors to leave out; a final * matches the rest.

  Returns:
    The weights, and the names of what was left out with the reasons.

  Raises:
    UserError: if it cannot be read, or does not fit the architecture.
  """
  file = weight_files.read(path)
  dropped = [
      name for name in file.tensors
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
  ]
  tensors = {n: x for n, x in file.tensors.items() if n not in dropped}
  full = any(name.startswith('base_encoder.') for name in tensors)
  source = f'--from={path}'
  # What the optimizer's state means, only a recipe can tell.
  moments = {} if config is None else file.optimizer
  if config is None:
    frozen = not _has_moments(file, 'base_encoder.patch_embed.proj.weight')
    config = _saved_config(source, file) or _inferred(
        source, tensors, full, num_heads, frozen
    )
  step = _step(tensors)
  places = weights.full_places(config) if full else weights.backbone_places(
      config, 'query', _classes(config, tensors)
  )
  known = weights.constants(config, places, step)
  flat = weights.from_torch(source, tensors, places, known)
  order = weights.parameter_order(file.tensors) if moments else []
  moments = weights.moments_from_torch(source, moments, order, places)
  names = {place.path: name for name, place in places.items()}
  theirs = {ours: slot for slot, ours in weights.MOMENTS.items()}
  for slot, *rest in moments:
    names[slot, *rest] = f'{names["params", *rest]} ({theirs[slot]})'
  left_out = dict.fromkeys(dropped, 'ignored')
  left_out |= {n: 'not a weight' for n in known if n in tensors}
  kept = {'state_dict', 'model'} | ({'optimizer'} if moments else set())
  left_out |= {n: 'not a weight' for n in file.extra if n not in kept}
  if 'optimizer' in left_out:
    left_out['optimizer'] = 'kept only with --config, the recipe of the run'
  return Weights(config, step, flat | moments, names), left_out


def _has_moments(file: weight_files.File, name: str) -> bool:
  order = weights.parameter_order(file.tensors) if file.optimizer else []
  return name in order and order.index(name) in file.optimizer


def _inferred(
    source: str, tensors: Mapping[str, np.ndarray], full: bool,
    num_heads: int, frozen: bool,
) -> ConfigDict:
  def under(prefix):
    return {
        name.removeprefix(prefix): x for name, x in tensors.items()
        if name.startswith(prefix)
    }

  backbone = under('base_encoder.') if full else dict(tensors)
  config = infer.config_of(source, backbone, num_heads, frozen)
  if full:
    head = f'base_encoder.{weights.head_name(config)}.'
    infer.set_heads(source, config, under(head), under('predictor.'))
  return config


def _saved_config(source: str, file: weight_files.File) -> ConfigDict | None:
  if METADATA not in file.metadata:
    return None
  config = config_lib.default_config()
  try:
    saved = json.loads(file.metadata[METADATA])
    for field in 'mean', 'std':
      saved['data'][field] = tuple(saved['data'][field])
    config.update(saved)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
        f'{source}: its description of the architecture is damaged: {e}'
    ) from e
  return config


def _classes(config: ConfigDict, tensors: Mapping[str, np.ndarray]) -> int:
  name = f'{weights.head_name(config)}.weight'
  return len(tensors[name]) if name in tensors else 0


def _step(tensors: Mapping[str, np.ndarray]) -> int:
  # Both views of a step pass each BatchNorm of the query encoder.
  counts = [int(x) for n, x in tensors.items() if n.endswith(COUNTER)]
  return max(counts, default=0) // 2


def write(
    path: epath.Path, source: Weights, encoder: str
) -> dict[Path, str]:
  """Writes a file of the kind that its suffix says.

  Args:
    path: ends with .pth.tar (everything), .pth or .safetensors (a backbone).
    source: what to write.
    encoder: 'query' or 'momentum', whose backbone it is.

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
  places = weights.full_places(config) if full else weights.backbone_places(
      config, encoder, classes
  )
  tensors = weights.to_torch(source, places)
  written = {place.path: name for name, place in places.items()}
  if full:
    content, moments = _release(source, tensors, places)
    weight_files.write_torch(path, content)
    return written | moments
  if path.name.endswith(weight_files.SAFETENSORS):
    saved = to_json(config)
    description = {
        'model': saved['model'],
        'data': {k: saved['data'][k] for k in ('image_size', 'mean', 'std')},
    }
    weight_files.write_safetensors(
        path, tensors, {'format': 'pt', METADATA: json.dumps(description)}
    )
  else:
    weight_files.write_torch(path, {'model': tensors})
  return written


def _release(
    source: Weights, tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
) -> tuple[dict[str, Any], dict[Path, str]]:
  """The dict that the release saves, and the names of the moments in it."""
  model = source.config.model
  key = model.name, model.patch_embed == 'conv'
  optimizer, names = _optimizer(source, tensors, places)
  epoch = source.step * source.config.batch_size // IMAGENET_IMAGES
  return {
      'epoch': epoch,
      'arch': ARCHITECTURES[key] if key in ARCHITECTURES else model.name,
      'state_dict': {f'module.{n}': x for n, x in tensors.items()},
      'optimizer': optimizer,
      # PyTorch's defaults; bfloat16 needs no loss scaling.
      'scaler': {
          'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5,
          'growth_interval': 2000, '_growth_tracker': 0,
      },
  }, names


def _optimizer(
    source: Weights, tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
) -> tuple[dict[str, Any], dict[Path, str]]:
  c = source.config.optimizer
  peak_lr = c.lr_per_256 * source.config.batch_size / 256
  group = {'lr': peak_lr, 'weight_decay': c.weight_decay}
  slots = {}  # PyTorch's name by optax's.
  if c.name == 'adamw':
    slots = {'mu': 'exp_avg', 'nu': 'exp_avg_sq'}
    group |= {
        'betas': (c.b1, c.b2), 'eps': c.eps, 'amsgrad': False,
        'maximize': False, 'foreach': None, 'capturable': False,
        'differentiable': False, 'fused': None,
        'decoupled_weight_decay': True,
    }
  elif c.name == 'lars':
    slots = {'trace': 'mu'}
    group |= {
        'momentum': c.momentum, 'trust_coefficient': c.trust_coefficient
    }
  order = weights.parameter_order(tensors)
  state, names = {}, {}
  for index, name in enumerate(order):
    if name not in places or places[name].path[0] != 'params':
      continue
    for slot, theirs in slots.items():
      path = (slot, *places[name].path[1:])
      if path in source.flat:
        names[path] = f'{name} ({theirs})'
        entry = state.setdefault(index, {})
        entry[theirs] = torch_names.to_torch_layout(
            source.flat[path], path
        )
    if index in state and c.name == 'adamw':
      state[index]['step'] = np.asarray(source.step, np.float32)
  group['params'] = list(range(len(order)))
  return {'state': state, 'param_groups': [group]}, names
