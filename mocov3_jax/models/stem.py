"""Layers that turn images into tokens: patch projection and conv stem."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import BatchNorm, torch_default, xavier


class PatchEmbed(nn.Module):
  """A linear projection of each patch, with a bias.

  Attributes:
    patch_size: side of a patch in pixels.
    dim: width of a token.
    batch_norm: whether to normalise the tokens over batch and positions.
    weight_norm: whether to learn direction and length of each output's weights
      separately (Salimans & Kingma 2016, arXiv 1602.07868). The initial weights
      are the same with and without.
    dtype: dtype of the computation.
  """

  patch_size: int
  dim: int
  batch_norm: bool = False
  weight_norm: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, H, W, C] to [B, H / patch_size, W / patch_size, dim]."""
    size = self.patch_size
    fan_in = size**2 * x.shape[-1]
    kernel = self.param(
        'kernel', xavier(fan_in, self.dim),
        (size, size, x.shape[-1], self.dim),
    )
    bias = self.param('bias', nn.initializers.zeros, (self.dim,))
    if self.weight_norm:
      length = jnp.linalg.norm(kernel.reshape(fan_in, -1), axis=0)  # [dim]
      scale = self.param('scale', lambda _: length) / length
      kernel *= scale.reshape(1, 1, 1, -1)
    x = jax.lax.conv_general_dilated(
        x.astype(self.dtype), kernel.astype(self.dtype), (size, size), 'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    ) + bias.astype(self.dtype).reshape(1, 1, 1, -1)
    if self.batch_norm:
      x = BatchNorm(dtype=self.dtype, name='bn')(x, train)
    return x


class ConvStem(nn.Module):
  """A stem of stride-2 convolutions, as in ViT-Conv of the paper's release.

  See Xiao et al. 2021 (arXiv 2106.14881). It has log2(patch_size) bias-free 3x3
  convolutions, each followed by BatchNorm and ReLU, whose channels double up to
  `dim`; then a 1x1 convolution.

  Attributes:
    patch_size: side in pixels of the area per token; a power of 2.
    dim: number of output channels.
    dtype: dtype of the computation.
  """

  patch_size: int
  dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, H, W, C] to [B, H / patch_size, W / patch_size, dim]."""
    stages = self.patch_size.bit_length() - 1
    for i in range(stages):
      x = nn.Conv(
          self.dim // 2 ** (stages - 1 - i),
          (3, 3),
          strides=2,
          padding=1,
          use_bias=False,
          dtype=self.dtype,
          kernel_init=torch_default(9 * x.shape[-1]),
          name=f'conv_{i}',
      )(x)
      x = BatchNorm(dtype=self.dtype, name=f'bn_{i}')(x, train)
      x = nn.relu(x)
    return nn.Conv(
        self.dim,
        (1, 1),
        dtype=self.dtype,
        kernel_init=torch_default(self.dim),
        bias_init=torch_default(self.dim),
        name=f'conv_{stages}',
    )(x)
