"""Multi-head self-attention: its implementations side by side, in one table.

An implementation is a function of (qkv, queries), as `attend` describes. Which
one runs is chosen by name; all compute the same, up to rounding.
"""

from collections.abc import Callable
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import xavier
from mocov3_jax.models.recompute import recompute_barrier, recomputed


def attend(
    qkv: jax.Array, queries: int, implementation: str = 'reference'
) -> jax.Array:
  """Returns scaled dot-product attention, the softmax in float32 or wider.

  Args:
    qkv: queries, keys and values [B, T, 3, heads, head_dim].
    queries: how many of the T tokens ask, from the first on.
    implementation: one of ATTENTION.

  Returns:
    [B, queries, heads, head_dim], of the dtype of `qkv`.
  """
  return ATTENTION[implementation](qkv, queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reference(qkv: jax.Array, queries: int) -> jax.Array:
  """Attends by matrix products, on any device and in any precision.

  For the backward pass it keeps its argument alone, and computes the weights
  again: one product more, for [B, heads, T, T] less in each block. (Rabe &
  Staats 2021, arXiv 2112.05682. `jax.nn.dot_product_attention` rounds the
  softmax to float32 even where the rest is float64.)
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
  q, k, v = _matrices(recompute_barrier(qkv, g), queries)
  weights, total = recomputed(_attention_weights)(q, k)
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


reference.defvjp(_attend_forward, _attend_backward)


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


ATTENTION: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    'reference': reference,
}


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
