"""ResNets (He et al. 2016) as the paper (App. A) uses them for comparison."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import BatchNorm


def _conv(
    channels: int, size: int, stride: int, dtype: jnp.dtype, name: str
) -> nn.Conv:
  return nn.Conv(
      channels,
      (size, size),
      strides=stride,
      padding=(size - 1) // 2,
      use_bias=False,
      dtype=dtype,
      # Normal of variance 2 / (outputs * size^2).
      kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
      name=name,
  )


class ResidualBlock(nn.Module):
  """A residual block whose last BatchNorm starts with scale 0.

  So the residual branch initially contributes nothing.

  Attributes:
    channels: channels of the inner convolutions.
    bottleneck: whether the convolutions are 1x1, 3x3, 1x1, with four times the
      channels at the end; else 3x3, 3x3. The first 3x3 convolution has the
      stride ("v1.5").
    stride: stride of the block.
    dtype: dtype of the computation.
  """

  channels: int
  bottleneck: bool
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, C']."""
    # Output channels, size and stride of each convolution.
    layers = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
    if self.bottleneck:
      layers = [
          (self.channels, 1, 1),
          (self.channels, 3, self.stride),
          (4 * self.channels, 1, 1),
      ]
    y = x
    for i, (channels, size, stride) in enumerate(layers, start=1):
      last = i == len(layers)
      y = _conv(channels, size, stride, self.dtype, f'conv{i}')(y)
      y = BatchNorm(zero_scale=last, dtype=self.dtype, name=f'bn{i}')(y, train)
      if not last:
        y = nn.relu(y)
    if x.shape != y.shape:
      x = _conv(
          y.shape[-1], 1, self.stride, self.dtype, 'downsample_conv'
      )(x)
      x = BatchNorm(dtype=self.dtype, name='downsample_bn')(x, train)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Maps each image to the mean over its last feature map.

  Attributes:
    stage_sizes: number of blocks in each stage; every stage but the first
      halves the resolution and doubles the channels.
    bottleneck: the kind of block; see `ResidualBlock`.
    width: channels of the stem and of the first stage's inner convolutions.
    small_images: whether the stem is a 3x3 convolution without stride and
      pooling, for images of 64 pixels and less (Chen et al. 2020, arXiv
      2002.05709, B.9), instead of 7x7 with stride 2 and max-pooling.
    dtype: dtype of the computation; parameters stay float32.
  """

  stage_sizes: tuple[int, ...]
  bottleneck: bool
  width: int = 64
  small_images: bool = False
  dtype: jnp.dtype = jnp.float32

  # What the training step needs to know about a backbone: see `ViT`.
  has_batch_norm = True
  clip_patch_embed = False
  frozen = ()
  first_layer = 'conv1'

  @property
  def blocks(self) -> tuple[str, ...]:
    """Names of the blocks in the parameter tree, in order."""
    return tuple(
        f'layer{stage + 1}_{block}'
        for stage, blocks in enumerate(self.stage_sizes)
        for block in range(blocks)
    )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, D]."""
    size, stride = (3, 1) if self.small_images else (7, 2)
    x = _conv(self.width, size, stride, self.dtype, 'conv1')(images)
    x = BatchNorm(dtype=self.dtype, name='bn1')(x, train)
    x = nn.relu(x)
    if not self.small_images:
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.stage_sizes):
      for block in range(blocks):
        x = ResidualBlock(
            self.width * 2**stage,
            self.bottleneck,
            stride=2 if stage > 0 and block == 0 else 1,
            dtype=self.dtype,
            name=f'layer{stage + 1}_{block}',
        )(x, train)
    return jnp.mean(x, axis=(1, 2))
