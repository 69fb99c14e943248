"""The convolutional stem of the release's ViT-Conv models."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import BatchNorm, torch_default


class ConvStem(nn.Module):
  """Patches by convolutions of stride 2 (Xiao et al. 2021, arXiv 2106.14881).

  log2(patch_size) bias-free 3x3 convolutions, each with BatchNorm and ReLU,
  the channels doubling up to `dim`; then a 1x1 convolution.

  Attributes:
    patch_size: pixels to a token and side, a power of 2.
    dim: channels at the end.
    dtype: of the arithmetic.
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
