"""Golden arrays under PyTorch's names, as our pytrees."""

import json
import pathlib

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from mocov3_jax import models
from mocov3_jax.models.execution import REFERENCE
from mocov3_jax.models.heads import MlpHead
from mocov3_jax.models.resnet import ResNet
from mocov3_jax.models.vit import ViT
from mocov3_jax.weights import torch_names

FOLDER = pathlib.Path(__file__).parent / 'golden'


def load(name):
  """Returns the arrays of golden/NAME.npz and its meta dict."""
  with np.load(FOLDER / f'{name}.npz') as file:
    arrays = dict(file)
  return arrays, json.loads(str(arrays.pop('meta')))


def tiny_vit(dtype=jnp.float32, freeze=True, execution=REFERENCE):
  """The network of the vit_* files."""
  return models.Network(
      backbone=ViT(
          patch_size=8, dim=64, depth=2, num_heads=4,
          patch_embed='frozen' if freeze else 'learned', dtype=dtype,
          execution=execution,
      ),
      projector=MlpHead(3, 32, 16, dtype=dtype),
      predictor=MlpHead(2, 32, 16, dtype=dtype),
  )


def tiny_resnet(dtype=jnp.float32):
  """The network of the resnet_* files."""
  return models.Network(
      backbone=ResNet((2, 1, 1, 1), bottleneck=True, width=8, dtype=dtype),
      projector=MlpHead(2, 32, 16, dtype=dtype),
      predictor=MlpHead(2, 32, 16, out_bn=False, dtype=dtype),
  )


def tree(arrays, prefix, network, dtype=None):
  """Builds {'params', 'batch_stats'} of one network, by the real converter.

  Args:
    arrays: as `load` returns them.
    prefix: before the PyTorch names, such as 'init/'.
    network: 'base_encoder' (with the predictor) or 'momentum_encoder'.
    dtype: to cast to, or None.
  """
  model = tiny_resnet() if f'{prefix}{network}.bn1.bias' in arrays else (
      tiny_vit()
  )
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((2, 2, 32, 32, 3)), True)
  )
  head = 'fc' if isinstance(model.backbone, ResNet) else 'head'
  result = {}
  for path in flatten_dict(shapes):
    collection, *rest = path
    name = f'{prefix}{golden_name(rest, network, head)}'
    if name in arrays:
      array = torch_names.to_our_layout(arrays[name], path)
      result[path] = jnp.asarray(array, dtype)
  return unflatten_dict(result)


def golden_name(path, network, head):
  """The PyTorch name of one of our paths in a network."""
  name = torch_names.torch_name(tuple(path), head)
  if path[0] == 'predictor':
    return name if network == 'base_encoder' else 'absent'
  return f'{network}.{name}'


def views(x1, x2):
  """Two NCHW arrays as views [B, 2, H, W, C]."""
  return np.stack([x1, x2], axis=1).transpose(0, 1, 3, 4, 2)
