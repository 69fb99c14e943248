"""A transformer block: attention and MLP, sparing with memory."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import (
    BatchNorm,
    LayerNorm,
    later,
    once_more,
    xavier,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(qkv: jax.Array, queries: int) -> jax.Array:
  """Scaled dot-product attention, the softmax in float32 or wider.

  For the backward pass it keeps its argument alone, and computes the weights
  again: one product more, for [B, heads, T, T] less in each block. (Rabe &
  Staats 2021, arXiv 2112.05682. `jax.nn.dot_product_attention` rounds the
  softmax to float32 even where the rest is float64.)

  Args:
    qkv: queries, keys and values [B, T, 3, heads, head_dim].
    queries: how many of the T tokens ask, from the first on.

  Returns:
    [B, queries, heads, head_dim], of the dtype of `qkv`.
  """
  return _attend_forward(qkv, queries)[0]


def _attend_forward(qkv, queries):
  q, k, v = _matrices(qkv, queries)
  weights, total = _attention_weights(q, k)
  out = jnp.matmul(
      weights.astype(v.dtype), v, preferred_element_type=total.dtype
  )
  return jnp.swapaxes((out / total).astype(v.dtype), 1, 2), qkv


def _attend_backward(queries, qkv, g):
  q, k, v = _matrices(later(qkv, g), queries)
  weights, total = once_more(_attention_weights)(q, k)
  weights = weights / total
  g = jnp.swapaxes(g, 1, 2)
  # The small matrix is what gets transposed, not that of T x T.
  to_v = _transposed(jnp.matmul(_transposed(g), weights.astype(g.dtype)))
  to_weights = jnp.matmul(
      g, _transposed(v), preferred_element_type=weights.dtype
  )
  mean = jnp.sum(weights * to_weights, -1, keepdims=True)
  to_logits = (weights * (to_weights - mean)).astype(g.dtype)
  to_q = jnp.matmul(to_logits, k) / math.sqrt(q.shape[-1])
  to_q = jnp.pad(to_q, [(0, 0)] * 2 + [(0, k.shape[2] - queries), (0, 0)])
  to_k = _transposed(jnp.matmul(_transposed(q), to_logits))
  parts = [jnp.swapaxes(x, 1, 2) for x in (to_q, to_k, to_v)]
  return (jnp.stack(parts, axis=2),)


attend.defvjp(_attend_forward, _attend_backward)


def _matrices(qkv, queries):
  # [B, T, 3, heads, head_dim] to three of [B, heads, T, head_dim]. Scaling the
  # queries is cheaper than scaling the logits.
  q, k, v = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in range(3))
  return q[:, :, :queries] / math.sqrt(q.shape[-1]), k, v


def _attention_weights(q, k):
  # The softmax before its division, and what to divide by. Dividing head_dim
  # results is less than dividing T weights, and compilers can then make the
  # products and what is between them one loop (Dao et al. 2022,
  # arXiv 2205.14135).
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.matmul(q, _transposed(k), preferred_element_type=wide)
  weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
  return weights, jnp.sum(weights, -1, keepdims=True)


def _transposed(x):
  return jnp.swapaxes(x, -2, -1)


class Attention(nn.Module):
  """Multi-head self-attention; q, k and v from one matrix."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, tokens: int, queries: int) -> jax.Array:
    """Maps [B * tokens, D] to [B * queries, D], for an image's first tokens."""
    dim = x.shape[-1]
    # One matrix for speed; its thirds are initialised as three matrices.
    qkv = nn.Dense(
        3 * dim, dtype=self.dtype, kernel_init=xavier(dim, dim), name='qkv'
    )(x)
    qkv = qkv.reshape(-1, tokens, 3, self.num_heads, dim // self.num_heads)
    x = attend(qkv, queries).reshape(-1, dim)
    return nn.Dense(
        dim, dtype=self.dtype, kernel_init=xavier(dim, dim), name='proj'
    )(x)


@jax.custom_vjp
def gelu_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The exact (erf) GELU and a product, keeping the arguments alone.

  Args:
    x: [N, D].
    kernel: [D, features], of the same dtype.
  """
  return _gelu(x) @ kernel


def _gelu_dense_backward(kept, g):
  x, kernel = kept
  hidden, pull = jax.vjp(_gelu, later(x, g))
  return *pull(g @ kernel.T), hidden.T @ g


def _gelu(x):
  # The sum would lose the small values in half precision.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * (1 + jax.lax.erf(wide / math.sqrt(2))) / 2).astype(x.dtype)


gelu_dense.defvjp(lambda x, w: (gelu_dense(x, w), (x, w)), _gelu_dense_backward)


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
    mlp_norm: before the MLP, 'layer' or 'batch' (ViT-BN, [P] s6.3).
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
