"""A transformer block: attention and an MLP that saves memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.attention import Attention, DenseParams, Tokens
from mocov3_jax.models.execution import Execution
from mocov3_jax.models.layers import BatchNorm, LayerNorm, xavier
from mocov3_jax.models.recompute import gelu_dense, gelu_dense_kept


class Mlp(nn.Module):
  """The two-layer perceptron of a block.

  Attributes:
    hidden_dim: width of the hidden layer.
    dtype: dtype of the computation.
    keep_gelu: see `Execution`.
  """

  hidden_dim: int
  dtype: jnp.dtype
  keep_gelu: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, D] to [N, D]."""
    dim, hidden = x.shape[-1], self.hidden_dim
    x = nn.Dense(
        hidden, dtype=self.dtype, kernel_init=xavier(dim, hidden), name='fc1'
    )(x)
    fc2 = DenseParams(dim, xavier(hidden, dim), self.dtype, name='fc2')(hidden)
    multiply = gelu_dense_kept if self.keep_gelu else gelu_dense
    return multiply(x, fc2.kernel) + fc2.bias[None]


class Block(nn.Module):
  """A pre-norm transformer block.

  Attributes:
    num_heads: number of attention heads.
    mlp_dim: hidden width of the MLP.
    mlp_norm: the normalisation before the MLP: 'layer', or 'batch' (ViT-BN,
      paper s6.3).
    drop_path: probability that an image skips a branch in training (stochastic
      depth, Huang et al. 2016); uses the rng 'drop_path'.
    dtype: dtype of the computation.
    execution: how attention and MLP are computed.
  """

  num_heads: int
  mlp_dim: int
  mlp_norm: str
  drop_path: float
  dtype: jnp.dtype
  execution: Execution

  @nn.compact
  def __call__(self, x: jax.Array, tokens: Tokens, train: bool) -> jax.Array:
    """Maps [B * rows, D] to [B * queries, D].

    Args:
      x: the tokens of all images, one image after the other.
      tokens: the numbers of rows, real tokens and queries of an image.
      train: whether BatchNorm and stochastic depth run in training mode.
    """
    rows, _, queries = tokens
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    y = Attention(
        self.num_heads, self.dtype, self.execution, name='attn'
    )(y, tokens)
    x = x.reshape(-1, rows, x.shape[-1])[:, :queries].reshape(y.shape)
    x = x + self._dropped(y, queries, train)
    if self.mlp_norm == 'batch':
      y = BatchNorm(dtype=self.dtype, name='norm2')(x, train)
    else:
      y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    y = Mlp(
        self.mlp_dim, self.dtype, self.execution.keep_gelu, name='mlp'
    )(y)
    return x + self._dropped(y, queries, train)

  def _dropped(self, y: jax.Array, rows: int, train: bool) -> jax.Array:
    if not train or self.drop_path == 0:
      return y
    keep = 1 - self.drop_path
    images = jax.random.bernoulli(
        self.make_rng('drop_path'), keep, (len(y) // rows, 1)
    )
    # Scaled, so that the expected value is the same as in evaluation.
    return y * (jnp.repeat(images, rows, axis=0) / keep).astype(y.dtype)
