"""Multi-head self-attention, with several implementations.

From the same parameters, all of them compute the same result up to rounding,
with the softmax in float32 or wider. They differ in memory traffic and in the
platforms they run on. `models/execution.py` chooses one by name.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mocov3_jax.models.execution import Execution
from mocov3_jax.models.layers import xavier
from mocov3_jax.models.recompute import recompute_barrier, recomputed
from mocov3_jax.models.short_attention import SUBLANES, short_attention
from mocov3_jax.parallel.sharding import BATCH_AXES

# Replaces the logits of padded keys.
MASKED = -1e30


class Tokens(NamedTuple):
  """How the tokens of one image are laid out in the matrix of all tokens.

  Attributes:
    rows: number of rows per image.
    real: how many of the rows, from the first on, are tokens; the rest is
      padding.
    queries: how many of the rows, from the first on, are queries and have an
      output.
  """

  rows: int
  real: int
  queries: int


class Dense(NamedTuple):
  """A linear layer: kernel [D, features], bias [features] and its name."""

  kernel: jax.Array
  bias: jax.Array
  name: str

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, D] to [N, features]."""
    with jax.named_scope(self.name):
      return x @ self.kernel + self.bias[None]


# (x [B * rows, D], qkv, proj, num_heads, tokens, mesh) -> [B * queries, D].
Implementation = Callable[
    [jax.Array, Dense, Dense, int, Tokens, Mesh | None], jax.Array
]


def reference(
    x: jax.Array, qkv: Dense, proj: Dense, num_heads: int, tokens: Tokens,
    mesh: Mesh | None,
) -> jax.Array:
  """Computes attention by matrix products, on any device, in any precision."""
  del mesh
  dim = x.shape[-1]
  y = qkv(x).reshape(-1, tokens.rows, 3, num_heads, dim // num_heads)
  queries = min(tokens.queries, tokens.real)
  y = dot_product_attention(y[:, : tokens.real], queries)
  y = jnp.pad(y, [(0, 0), (0, tokens.queries - queries), (0, 0), (0, 0)])
  return proj(y.reshape(-1, dim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dot_product_attention(qkv: jax.Array, queries: int) -> jax.Array:
  """Returns softmax(q k' / sqrt(head_dim)) v.

  Only the argument is kept for the backward pass, which recomputes the
  attention weights (Rabe & Staats 2021, arXiv 2112.05682). That costs one more
  product and saves an array of [B, heads, T, T] in each block.
  (`jax.nn.dot_product_attention` rounds the softmax to float32 even if the rest
  is float64.)

  Args:
    qkv: queries, keys and values [B, T, 3, heads, head_dim].
    queries: how many of the T tokens, from the first on, are queries.

  Returns:
    [B, queries, heads, head_dim], in the dtype of `qkv`.
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
  # Transpose the small matrices, not those of T x T.
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


dot_product_attention.defvjp(_attend_forward, _attend_backward)


def _matrices(qkv, queries):
  # Splits [B, T, 3, heads, head_dim] into three of [B, heads, T, head_dim].
  # Scaling the queries is cheaper than scaling the logits.
  q, k, v = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in range(3))
  return q[:, :, :queries] / math.sqrt(q.shape[-1]), k, v


def _attention_weights(q, k):
  # Returns the unnormalised softmax and its sum. Dividing head_dim results is
  # cheaper than dividing T weights, and compilers can then fuse the two
  # products and the operations between them (Dao et al. 2022, arXiv
  # 2205.14135).
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.matmul(q, _transposed(k), preferred_element_type=wide)
  weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
  return weights, jnp.sum(weights, -1, keepdims=True)


def _transposed(x):
  return jnp.swapaxes(x, -2, -1)


def einsum(
    x: jax.Array, qkv: Dense, proj: Dense, num_heads: int, tokens: Tokens,
    mesh: Mesh | None,
) -> jax.Array:
  """Computes attention by einsums that need no changes of layout.

  The qkv layer directly gives [B, heads, T, head_dim], the layout that the next
  product needs. The attention weights are kept for the backward pass in the
  dtype of `x`.
  """
  del mesh
  dim, head_dim = x.shape[-1], x.shape[-1] // num_heads
  x = x.reshape(-1, tokens.rows, dim)
  with jax.named_scope(qkv.name):
    kernel = qkv.kernel.reshape(dim, 3, num_heads, head_dim)
    bias = qkv.bias.reshape(3, 1, num_heads, 1, head_dim)
    q, k, v = (
        jnp.einsum('btm,mhk->bhtk', part, kernel[:, i]) + bias[i]
        for i, part in enumerate((x[:, : tokens.queries], x, x))
    )
  wide = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.einsum(
      'bhqk,bhtk->bhqt', q / math.sqrt(head_dim), k,
      preferred_element_type=wide,
  )
  if tokens.real < tokens.rows:
    is_real = jnp.arange(tokens.rows).reshape(1, 1, 1, -1) < tokens.real
    logits = jnp.where(is_real, logits, MASKED)
  weights = jax.nn.softmax(logits).astype(x.dtype)
  out = jnp.einsum('bhqt,bhtk->bhqk', weights, v)
  with jax.named_scope(proj.name):
    kernel = proj.kernel.reshape(num_heads, head_dim, dim)
    out = jnp.einsum('bhqk,hkm->bqm', out, kernel)
    return out.reshape(-1, dim) + proj.bias[None]


def pallas(
    x: jax.Array, qkv: Dense, proj: Dense, num_heads: int, tokens: Tokens,
    mesh: Mesh | None,
) -> jax.Array:
  """Computes attention by `short_attention`, on TPUs."""
  dim = x.shape[-1]
  y = qkv(x).reshape(-1, tokens.rows, 3 * dim)
  y = jnp.pad(y, [(0, 0), (0, -tokens.rows % SUBLANES), (0, 0)])
  attend = lambda y: short_attention(
      y, num_heads, tokens.real, tokens.queries
  )
  if mesh is not None and mesh.size > 1:
    # XLA cannot partition a kernel by itself. Images are independent, so this
    # needs no communication.
    split = PartitionSpec(BATCH_AXES)
    attend = jax.shard_map(
        attend, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
  return proj(attend(y).reshape(-1, dim))


def cudnn(
    x: jax.Array, qkv: Dense, proj: Dense, num_heads: int, tokens: Tokens,
    mesh: Mesh | None,
) -> jax.Array:
  """Computes attention by cuDNN's fused kernels, on GPUs in half precision."""
  if tokens.queries < tokens.real:  # The kernels do not pay off for one query.
    return reference(x, qkv, proj, num_heads, tokens, mesh)
  dim = x.shape[-1]
  y = qkv(x).reshape(-1, tokens.rows, 3, num_heads, dim // num_heads)
  # JAX rejects odd sequence lengths in training.
  y = jnp.pad(y, [(0, 0), (0, tokens.rows % 2)] + [(0, 0)] * 3)
  q, k, v = (y[:, :, i] for i in range(3))
  lengths = jnp.full(len(y), tokens.real, jnp.int32)
  out = jax.nn.dot_product_attention(
      q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
      implementation='cudnn',
  )
  return proj(out[:, : tokens.queries].reshape(-1, dim))


ATTENTION: dict[str, Implementation] = {
    'reference': reference,
    'einsum': einsum,
    'pallas': pallas,
    'cudnn': cudnn,
}


class DenseParams(nn.Module):
  """The parameters of a linear layer, under the names of `nn.Dense`.

  Attributes:
    features: number of outputs.
    kernel_init: initialiser of the kernel; the bias starts at zero.
    dtype: dtype of the returned arrays; the parameters stay float32.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, inputs: int) -> Dense:
    """Returns the parameters for this number of inputs."""
    shape = inputs, self.features
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    return Dense(
        kernel.astype(self.dtype), bias.astype(self.dtype), self.name
    )


class Attention(nn.Module):
  """Multi-head self-attention; one matrix gives queries, keys and values."""

  num_heads: int
  dtype: jnp.dtype
  execution: Execution

  @nn.compact
  def __call__(self, x: jax.Array, tokens: Tokens) -> jax.Array:
    """Maps [B * rows, D] to [B * queries, D]."""
    dim = x.shape[-1]
    # One matrix is faster; each third is initialised like a matrix of its own.
    init = xavier(dim, dim)
    qkv = DenseParams(3 * dim, init, self.dtype, name='qkv')(dim)
    proj = DenseParams(dim, init, self.dtype, name='proj')(dim)
    return ATTENTION[self.execution.attention](
        x.astype(self.dtype), qkv, proj, self.num_heads, tokens,
        self.execution.mesh,
    )
