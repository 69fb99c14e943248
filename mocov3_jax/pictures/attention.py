"""Computes the attention of a ViT's class token in its last block.

It is for pictures such as those of Caron et al. 2021 (arXiv 2104.14294, fig.
1), but of networks trained by MoCo v3.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.models.vit import ViT

PyTree = Any


def require_class_token(model: ConfigDict) -> None:
  """Checks that a network has a class token that attends to patches.

  Args:
    model: `config.model` of the run.

  Raises:
    UserError: for a ResNet, or a readout without a class token.
  """
  if model.name not in models.VITS:
    raise UserError(
        f'model.name={model.name!r} of the checkpoint has no attention. '
        f'Allowed: {", ".join(models.VITS)}.'
    )
  if model.readout != 'cls':
    raise UserError(
        f'model.readout={model.readout!r} of the checkpoint has no class '
        "token, whose attention is drawn. Allowed: 'cls'."
    )


def class_attention(
    vit: ViT, params: PyTree, batch_stats: PyTree, images: jax.Array
) -> jax.Array:
  """Returns the attention weights of the class token in the last block.

  Args:
    vit: a ViT with the readout 'cls'.
    params, batch_stats: the variables of `vit` alone.
    images: [B, H, W, C], normalised.

  Returns:
    float32 [B, heads, 1 + patches]: the weight of the class token itself, then
    those of the patches row by row. They sum to 1 along the last axis.
  """
  # Intermediates cannot be captured inside a scan or a rematerialised block.
  # Without these, the network computes the same from the same parameters.
  plain = vit.clone(remat=False, scan=False)
  place = (vit.blocks[-1], 'norm1')
  _, captured = plain.apply(
      {'params': params, 'batch_stats': batch_stats}, images, train=False,
      capture_intermediates=lambda module, _: module.path == place,
      mutable=['intermediates'],
  )
  tokens = captured['intermediates'][vit.blocks[-1]]['norm1']['__call__'][0]
  dense = params[vit.blocks[-1]]['attn']['qkv']
  qkv = tokens @ dense['kernel'].astype(tokens.dtype)
  qkv += dense['bias'].astype(tokens.dtype)[None]
  qkv = qkv.astype(jnp.float32)
  head_dim = vit.dim // vit.num_heads
  qkv = qkv.reshape(len(images), -1, 3, vit.num_heads, head_dim)
  logits = jnp.einsum(
      'bhd,bkhd->bhk', qkv[:, 0, 0], qkv[:, :, 1],
      precision=jax.lax.Precision.HIGHEST,
  )
  return jax.nn.softmax(logits / math.sqrt(head_dim))
