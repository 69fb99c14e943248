"""Our parameters under the names and in the layouts of PyTorch.

The names are those of the published checkpoints, which for backbones are also
timm's and torchvision's. Only this direction is defined: what a PyTorch file
should hold follows from the tree that we want to fill.
"""

from collections.abc import Iterable
import re

import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.runs.network import Path

# Counts the batches that a BatchNorm has seen; we need no such counter.
COUNTER = 'num_batches_tracked'

_LEAVES = {
    'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
    'mean': 'running_mean', 'var': 'running_var',
    'cls_token': 'cls_token', 'pos_embed': 'pos_embed',
}
# The order of sibling modules in a PyTorch checkpoint. It determines the
# indices of the optimizer's states.
_ORDER = (
    'base_encoder momentum_encoder predictor cls_token pos_embed patch_embed '
    'blocks norm1 attn qkv norm2 mlp fc1 fc2 norm conv1 bn1 conv2 bn2 conv3 '
    'bn3 downsample layer1 layer2 layer3 layer4 proj head fc weight bias '
    f'running_mean running_var {COUNTER}'
).split()


def torch_name(path: Path, head: str) -> str:
  """Returns the name of a tensor of one network.

  Args:
    path: path in the tree of parameters or statistics, such as ('projector',
      'linear_0', 'kernel').
    head: PyTorch's name of the projector and the classifier: 'head' in a ViT,
      'fc' in a ResNet.

  Returns:
    The name within the encoder, such as 'head.0.weight'. The predictor is
    beside the encoders; its names begin with 'predictor.'.

  Raises:
    UserError: for a tensor that PyTorch's networks do not have.
  """
  part, *modules, leaf = path
  if leaf not in _LEAVES:
    raise UserError(
        f'{"/".join(path)} has no name in the checkpoints of PyTorch. Use '
        'a network without it.'
    )
  first = {
      'backbone': [], 'projector': [head], 'classifier': [head],
      'predictor': ['predictor'],
  }[part]
  return '.'.join([*first, *map(_module, modules), _LEAVES[leaf]])


def _module(name: str) -> str:
  sequential = re.fullmatch(r'(conv|linear|bn)_(\d+)', name)
  if sequential:  # A layer, its BatchNorm, a ReLU, the next layer, ...
    return str(3 * int(sequential[2]) + (sequential[1] == 'bn'))
  name = re.sub(r'_(\d+)$', r'.\1', name)  # blocks_0, layer1_0
  name = name.replace('patch_embed', 'patch_embed.proj')
  name = name.replace('downsample_conv', 'downsample.0')
  return name.replace('downsample_bn', 'downsample.1')


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts names as PyTorch would, by the order of the modules.

  Raises:
    ValueError: for a name of another network.
  """
  def rank(name):
    return [
        int(part) if part.isdigit() else _ORDER.index(part)
        for part in name.split('.')
    ]

  return sorted(names, key=rank)


def to_torch_layout(array: np.ndarray, path: Path) -> np.ndarray:
  """Maps linear weights to [out, in], convolutions to OIHW; others stay."""
  return np.asarray(
      array.transpose(_torch_axes(array.ndim, path)), order='C'
  )


def to_our_layout(array: np.ndarray, path: Path) -> np.ndarray:
  """Undoes `to_torch_layout`."""
  axes = np.argsort(_torch_axes(array.ndim, path))
  return np.asarray(array.transpose(axes), order='C')


def torch_shape(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
  """Returns the shape that `to_torch_layout` gives."""
  return tuple(shape[axis] for axis in _torch_axes(len(shape), path))


def _torch_axes(ndim: int, path: Path) -> tuple[int, ...]:
  if path[-1] != 'kernel':
    return tuple(range(ndim))
  return (3, 2, 0, 1) if ndim == 4 else (1, 0)
