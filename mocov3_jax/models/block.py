"""A transformer block: attention and MLP, sparing with memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.attention import Attention
from mocov3_jax.models.layers import BatchNorm, LayerNorm, xavier
from mocov3_jax.models.recompute import gelu_dense


class GeluDense(nn.Module):
  """`gelu_dense` with the parameters of `nn.Dense`."""

  features: int
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, D] to [N, features]."""
    shape = x.shape[-1], self.features
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    x = gelu_dense(x.astype(self.dtype), kernel.astype(self.dtype))
    return x + bias.astype(self.dtype).reshape(1, -1)


class Mlp(nn.Module):
  """The two-layer perceptron of a block."""

  hidden_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, D] to the same."""
    dim, hidden = x.shape[-1], self.hidden_dim
    x = nn.Dense(
        hidden, dtype=self.dtype, kernel_init=xavier(dim, hidden), name='fc1'
    )(x)
    return GeluDense(dim, self.dtype, xavier(hidden, dim), name='fc2')(x)


class Block(nn.Module):
  """A pre-norm transformer block.

  Attributes:
    num_heads, mlp_dim: attention heads, hidden width of the MLP.
    mlp_norm: before the MLP, 'layer' or 'batch' (ViT-BN, paper s6.3).
    drop_path: probability with which an image skips a branch in training
      (stochastic depth, Huang et al. 2016); draws from the rng 'drop_path'.
    dtype: of the arithmetic.
  """

  num_heads: int
  mlp_dim: int
  mlp_norm: str
  drop_path: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self, x: jax.Array, tokens: int, train: bool, queries: int
  ) -> jax.Array:
    """Maps [B * tokens, D] to [B * queries, D].

    Args:
      x: the tokens of each image in turn.
      tokens: of an image.
      train: whether BatchNorm and stochastic depth are those of training.
      queries: of an image's tokens, how many come out, from the first on.
    """
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    y = Attention(self.num_heads, self.dtype, name='attn')(y, tokens, queries)
    x = x.reshape(-1, tokens, x.shape[-1])[:, :queries].reshape(y.shape)
    x = x + self._dropped(y, queries, train)
    if self.mlp_norm == 'batch':
      y = BatchNorm(dtype=self.dtype, name='norm2')(x, train)
    else:
      y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    y = Mlp(self.mlp_dim, self.dtype, name='mlp')(y)
    return x + self._dropped(y, queries, train)

  def _dropped(self, y: jax.Array, tokens: int, train: bool) -> jax.Array:
    if not train or self.drop_path == 0:
      return y
    keep = 1 - self.drop_path
    images = jax.random.bernoulli(
        self.make_rng('drop_path'), keep, (len(y) // tokens, 1)
    )
    # Scaled, so that the mean is that of evaluation.
    return y * (jnp.repeat(images, tokens, axis=0) / keep).astype(y.dtype)
