"""Golden arrays under PyTorch's names, as our pytrees."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from mocov3_jax import models
from mocov3_jax.models.heads import MlpHead
from mocov3_jax.models.vit import ViT

FOLDER = pathlib.Path(__file__).parent / 'golden'


def load(name):
  """Returns the arrays of golden/NAME.npz and its meta dict."""
  with np.load(FOLDER / f'{name}.npz') as file:
    arrays = dict(file)
  return arrays, json.loads(str(arrays.pop('meta')))


def tiny_vit(dtype=jnp.float32, freeze=True):
  """The network of the vit_* files."""
  return models.Network(
      backbone=ViT(
          patch_size=8, dim=64, depth=2, num_heads=4,
          freeze_patch_embed=freeze, dtype=dtype,
      ),
      projector=MlpHead(3, 32, 16, dtype=dtype),
      predictor=MlpHead(2, 32, 16, dtype=dtype),
  )


_LEAVES = {'weight': 'kernel', 'bias': 'bias'}
_STATISTICS = {'running_mean': 'mean', 'running_var': 'var'}


def place(name):
  """('params' or 'batch_stats', path) of a name, or None to skip it."""
  if name.endswith(('pos_embed', 'num_batches_tracked')):
    return None
  owner, rest = name.split('.', 1)
  leaf = rest.rsplit('.', 1)[-1]
  head = re.fullmatch(r'(?:head\.)?(\d+)\.(\w+)', rest)
  if head:
    # Every third module of the Sequential is linear, the next its BatchNorm.
    layer, is_norm = divmod(int(head[1]), 3)
    module = 'predictor' if owner == 'predictor' else 'projector'
    if leaf in _STATISTICS:
      return 'batch_stats', (module, f'bn_{layer}', _STATISTICS[leaf])
    if is_norm:
      leaf = {'weight': 'scale', 'bias': 'bias'}[leaf]
      return 'params', (module, f'bn_{layer}', leaf)
    return 'params', (module, f'linear_{layer}', 'kernel')
  if rest == 'cls_token':
    return 'params', ('backbone', 'cls_token')
  path = re.sub(r'blocks\.(\d+)', r'blocks_\1', rest)
  path = path.replace('patch_embed.proj', 'patch_embed').split('.')
  is_norm = 'norm' in path[-2]
  path[-1] = 'scale' if is_norm and leaf == 'weight' else _LEAVES[leaf]
  return 'params', ('backbone', *path)


def _axes(array, path):
  if path[-1] != 'kernel':
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def tree(arrays, prefix, network, dtype=None):
  """Builds {'params', 'batch_stats'} of one network.

  Args:
    arrays: as `load` returns them.
    prefix: before the PyTorch names, such as 'init/'.
    network: 'base_encoder' (with the predictor) or 'momentum_encoder'.
    dtype: to cast to, or None.
  """
  owners = {
      'base_encoder': ('base_encoder.', 'predictor.'),
      'momentum_encoder': ('momentum_encoder.',),
  }[network]
  result = {'params': {}, 'batch_stats': {}}
  for key, array in arrays.items():
    name = key.removeprefix(prefix)
    if not key.startswith(prefix) or not name.startswith(owners):
      continue
    where = place(name)
    if where is None:
      continue
    collection, path = where
    node = result[collection]
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = jnp.asarray(_axes(array, path), dtype)
  return result


def views(x1, x2):
  """Two NCHW arrays as views [B, 2, H, W, C]."""
  return np.stack([x1, x2], axis=1).transpose(0, 1, 3, 4, 2)
