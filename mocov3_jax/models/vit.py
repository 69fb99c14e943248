"""The vision transformer of MoCo v3 (Dosovitskiy et al. 2021; [P] s5)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mocov3_jax.models.layers import xavier


def sincos_positions(height: int, width: int, dim: int) -> np.ndarray:
  """Fixed 2-D sine-cosine position embedding with a zero row for the class.

  The four quarters of the channels are sin(row), cos(row), sin(column),
  cos(column) at frequencies 10000^(-i / (dim / 4)). On square grids this is
  the published table. On others the original pairs patches with positions of
  the transposed grid; here token t always gets its own (t // width, t % width).

  Args:
    height, width: of the grid of patches.
    dim: channels, a multiple of 4.

  Returns:
    float32 [1, 1 + height * width, dim], patches row by row.
  """
  omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))  # [dim / 4]
  row, column = np.divmod(np.arange(height * width), width)  # [T]
  row, column = row[:, None] * omega, column[:, None] * omega  # [T, dim / 4]
  table = np.concatenate(
      [np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1
  )
  return np.pad(table, ((1, 0), (0, 0)))[None].astype(np.float32)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Scaled dot-product attention, the softmax in float32 or wider.

  (`jax.nn.dot_product_attention` rounds the softmax to float32 even where the
  rest is float64.)

  Args:
    q, k, v: [B, T, heads, head_dim].

  Returns:
    [B, T, heads, head_dim], of the dtype of `q`.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=wide)
  weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1])).astype(q.dtype)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, v)


class Attention(nn.Module):
  """Multi-head self-attention; q, k and v from one matrix."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, tokens: int) -> jax.Array:
    """Maps [B * T, D] to the same, within each group of T = `tokens`."""
    dim = x.shape[-1]
    # One matrix for speed; its thirds are initialised as three matrices.
    qkv = nn.Dense(
        3 * dim, dtype=self.dtype, kernel_init=xavier(dim, dim), name='qkv'
    )(x)
    qkv = qkv.reshape(-1, tokens, 3, self.num_heads, dim // self.num_heads)
    x = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(-1, dim)
    return nn.Dense(
        dim, dtype=self.dtype, kernel_init=xavier(dim, dim), name='proj'
    )(x)


class Mlp(nn.Module):
  """The two-layer perceptron of a block, with the exact (erf) GELU."""

  hidden_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B * T, D] to the same."""
    dim, hidden = x.shape[-1], self.hidden_dim
    x = nn.Dense(
        hidden, dtype=self.dtype, kernel_init=xavier(dim, hidden), name='fc1'
    )(x)
    x = nn.gelu(x, approximate=False)
    return nn.Dense(
        dim, dtype=self.dtype, kernel_init=xavier(hidden, dim), name='fc2'
    )(x)


class Block(nn.Module):
  """A pre-norm transformer block."""

  num_heads: int
  mlp_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, tokens: int) -> jax.Array:
    """Maps [B * T, D] to the same, within each group of T = `tokens`."""
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm1')(x)
    x = x + Attention(self.num_heads, self.dtype, name='attn')(y, tokens)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm2')(x)
    return x + Mlp(self.mlp_dim, self.dtype, name='mlp')(y)


class ViT(nn.Module):
  """Images to the class token after the last block and LayerNorm.

  Attributes:
    patch_size: side of a patch, pixels; divides both sides of the image.
    dim, depth, num_heads: width, blocks and attention heads.
    freeze_patch_embed: stop the gradient right after the patch projection, so
      it stays random ([P] s4.2). The optimizer must leave it alone as well.
    mlp_ratio: hidden width of a block's MLP over `dim`.
    dtype: of the arithmetic; parameters stay float32.
  """

  patch_size: int
  dim: int
  depth: int
  num_heads: int
  freeze_patch_embed: bool
  mlp_ratio: int = 4
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, dim]."""
    del train  # A trunk without BatchNorm or dropout does the same in both.
    batch, height, width, channels = images.shape
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(
        self.dim,
        patch,
        strides=patch,
        padding='VALID',
        dtype=self.dtype,
        kernel_init=xavier(channels * self.patch_size**2, self.dim),
        name='patch_embed',
    )(images)
    if self.freeze_patch_embed:
      x = jax.lax.stop_gradient(x)
    x = x.reshape(batch, -1, self.dim)  # [B, T, D]
    cls = self.param(
        'cls_token', nn.initializers.normal(1e-6), (1, 1, self.dim)
    )
    cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, self.dim))
    x = jnp.concatenate([cls, x], axis=1)
    rows, columns = height // self.patch_size, width // self.patch_size
    positions = sincos_positions(rows, columns, self.dim)
    x = x + jnp.asarray(positions, x.dtype)
    tokens = x.shape[1]
    # Tokens as rows of one matrix: on CPU, a gradient that contracts over two
    # axes takes a third longer than over one. Elsewhere it is all the same.
    x = x.reshape(-1, self.dim)
    for i in range(self.depth):
      x = Block(
          self.num_heads,
          self.dim * self.mlp_ratio,
          self.dtype,
          name=f'blocks_{i}',
      )(x, tokens)
    x = x.reshape(batch, tokens, self.dim)[:, 0]
    return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(x)
