"""Infers the architecture of a network from the tensors of a file."""

from collections.abc import Mapping
import re

from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.weights import state_dict as weights_lib

Tensors = Mapping[str, np.ndarray]


def config_of(
    source: str, backbone: Tensors, num_heads: int, frozen: bool,
    rounding: float,
) -> ConfigDict:
  """Returns a config with the model that these tensors belong to.

  What cannot be inferred from weights comes from the paper and the arguments:
  images of 224 pixels for a ResNet (32 with the stem for small images),
  ImageNet's normalisation, and attention heads by width.

  Args:
    source: file name, for messages.
    backbone: tensors of the backbone by their names in timm.
    num_heads: attention heads of a ViT; 0 = the paper's number for its width.
    frozen: whether a patch projection is taken to be the frozen one.
    rounding: relative rounding error of the file's values.

  Raises:
    UserError: if it is neither a ViT nor a ResNet, or one that no config
      describes.
  """
  c = config_lib.default_config()
  c.data.source = 'tfds:imagenet2012'
  # The first layer of each kind.
  conv, patch, resnet = (
      f'{name}.weight'
      for name in ('patch_embed.proj.0', 'patch_embed.proj', 'conv1')
  )
  first = [n for n in (conv, patch, resnet) if n in backbone]
  if not first or backbone[first[0]].ndim != 4:
    shown = ', '.join(list(backbone)[:weights_lib.SHOWN])
    raise UserError(
        f'{source} holds neither a ViT nor a ResNet: its {len(backbone)} '
        f'tensors begin with {shown or "none"}. Use checkpoints of MoCo '
        'v3, and backbones with the names of timm or torchvision.'
    )
  size, channels = backbone[first[0]].shape[3], backbone[first[0]].shape[1]
  if channels != len(c.data.mean):
    c.data.mean = c.data.std = (0.5,) * channels
  if first[0] == resnet:
    c.model.small_images = size == 3
    c.data.image_size = 32 if size == 3 else 224
    _resnet(source, c, backbone)
    return c
  c.model.patch_size = size
  c.model.patch_embed = 'frozen' if frozen else 'learned'
  if first[0] == conv:
    c.model.patch_embed = 'conv'
    # A 3x3 convolution, its BatchNorm and a ReLU for each halving; then 1x1.
    layers = _count(backbone, r'patch_embed\.proj\.(\d+)\.weight')
    c.model.patch_size = 2 ** (layers // 3)
  _size(source, c, backbone, num_heads)
  if 'blocks.0.norm2.running_mean' in backbone:
    c.model.mlp_norm = 'batch'
  if 'cls_token' not in backbone:
    c.model.readout = 'norm_pool' if 'norm.weight' in backbone else 'pool'
  _positions(source, c, backbone, rounding)
  return c


def set_heads(
    c: ConfigDict, projector: Tensors, predictor: Tensors
) -> None:
  """Sets `config.head` to match these two MLPs, given by PyTorch's names.

  If one is missing (in a stripped checkpoint), its fields keep their defaults.
  """
  layers = _linear(projector)
  if layers:
    c.head.projector_layers = len(layers)
    c.head.hidden_dim, c.head.out_dim = len(layers[0]), len(layers[-1])
  if predictor:
    c.head.predictor_layers = len(_linear(predictor))
    # Layer, BatchNorm, ReLU, layer, ...
    last = 3 * c.head.predictor_layers - 2
    c.head.predictor_out_bn = f'{last}.running_mean' in predictor


def _linear(mlp: Tensors) -> list[np.ndarray]:
  named = {
      int(m[1]): x for name, x in mlp.items()
      if (m := re.fullmatch(r'(\d+)\.weight', name)) and x.ndim == 2
  }
  return [named[number] for number in sorted(named)]


def _count(names: Tensors, pattern: str) -> int:
  numbers = [int(m[1]) for n in names if (m := re.match(pattern, n))]
  return max(numbers, default=-1) + 1


def _size(
    source: str, c: ConfigDict, tensors: Tensors, num_heads: int
) -> None:
  depth = _count(tensors, r'blocks\.(\d+)\.')
  if not depth or 'blocks.0.norm1.weight' not in tensors:
    raise UserError(f'{source}: its ViT has no blocks.0.norm1.weight')
  dim = len(tensors['blocks.0.norm1.weight'])
  known = {
      width: (name, blocks)
      for name, (blocks, width, _) in models.VITS.items()
  }
  if dim in known:
    c.model.name, blocks = known[dim]
    if depth != blocks - (c.model.patch_embed == 'conv'):
      c.model.depth = depth
  elif num_heads:
    c.model.name, c.model.dim, c.model.depth = 'vit_ti', dim, depth
  else:
    widths = ', '.join(f'{w} ({name})' for w, (name, _) in known.items())
    raise UserError(
        f'{source}: its ViT has width {dim}, and the number of attention heads '
        'cannot be inferred from weights. Use --num_heads=N, or one of the '
        f'widths {widths}.'
    )
  c.model.num_heads = num_heads


def _positions(
    source: str, c: ConfigDict, tensors: Tensors, rounding: float
) -> None:
  if 'pos_embed' not in tensors:
    c.model.positions = 'none'
    return
  tokens = tensors['pos_embed'].shape[1] - (c.model.readout == 'cls')
  side = round(tokens**0.5)
  if side**2 != tokens:
    raise UserError(
        f'{source}: pos_embed has {tokens} patches. Allowed: a square number.'
    )
  c.data.image_size = side * c.model.patch_size
  table = weights_lib.position_table(c)
  if not weights_lib.is_table(tensors['pos_embed'], table, rounding):
    c.model.positions = 'learned'


def _resnet(source: str, c: ConfigDict, tensors: Tensors) -> None:
  stages = tuple(
      _count(tensors, rf'layer{i}\.(\d+)\.') for i in (1, 2, 3, 4)
  )
  bottleneck = 'layer1.0.conv3.weight' in tensors
  for name, known in models.RESNETS.items():
    if known == (stages, bottleneck):
      c.model.name = name
      break
  else:
    raise UserError(
        f'{source}: its ResNet has {stages} blocks, '
        f'{"" if bottleneck else "no "}bottlenecks. Allowed: '
        f'{", ".join(models.RESNETS)}.'
    )
  width = len(tensors['conv1.weight'])
  c.model.dim = 0 if width == 64 else width
