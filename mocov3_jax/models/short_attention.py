"""Attention for short sequences on a TPU, in two Pallas kernels.

One kernel computes the forward pass, the other the backward pass. They read the
output of the qkv layer in its own layout, [B, T, 3 * D], and write
[B, queries, D]. Each program handles one image with all of its heads. The
[T, T] attention weights exist only in VMEM. Neither they nor a head-major copy
of q, k and v go through HBM, where XLA's own attention spends most of its time
at 197 tokens (docs/scaling.md).

Layout. All [T, T] matrices are kept transposed: keys are rows (sublanes),
queries are columns (lanes). The maximum and the sum of the softmax then run
over sublanes, which is elementwise work except for the last 8 rows. Padded keys
are the last rows, so only the last tile needs the mask. The products of the
backward pass, dV = P' g and dK = dS' q, need the transposed P' and dS' anyway.
Only matrices of [T, head_dim] have to be transposed.

If the width of a head divides 128, heads are not sliced out of the lanes.
Instead, 128 lanes (2 heads of 64, 4 of 32) form a group, and one operand of
each product is set to zero outside the head. This costs nothing extra, because
the matrix unit pads a contraction of 64 to 128.

Order. A kernel first issues all products of a group of heads, then their
softmax, then the products with the weights. The forward pass issues the logits
of the next group before the softmax of the current one. The compiler mostly
keeps this order, which lets the matrix units and the vector unit work at the
same time.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LANES = 128
# Rows of a float32 tile; with T a multiple of this, the reshape is free.
SUBLANES = 8
# Which axis of each operand a product contracts.
ROWS_ROWS = ((1,), (1,))  # a b'
PLAIN = ((1,), (0,))  # a b


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def short_attention(
    qkv: jax.Array, num_heads: int, real: int, queries: int
) -> jax.Array:
  """Returns the attention of each image's first tokens to its real ones.

  On a CPU the kernels are interpreted, which is slow and for tests.

  Args:
    qkv: [B, T, 3 * D]: queries, keys and values, each with its heads one after
      the other. T is a multiple of `SUBLANES`.
    num_heads: number of heads; the width of a head is D // num_heads.
    real: number of real tokens; the rest is padding, whose values do not matter
      as long as they are finite.
    queries: how many tokens, from the first on, are queries.

  Returns:
    [B, queries, D], in the dtype of `qkv`.
  """
  return _forward(qkv, num_heads, real, queries)[0]


def _forward(qkv, num_heads, real, queries):
  batch, tokens, width = qkv.shape
  rows = -(-queries // SUBLANES) * SUBLANES
  out, lse = _call(
      _forward_kernel, 'short_attention_forward', num_heads, real,
      4 * batch * rows * tokens * width // 3, [
          jax.ShapeDtypeStruct((batch, rows, width // 3), qkv.dtype),
          jax.ShapeDtypeStruct((batch, num_heads, rows), jnp.float32),
      ], qkv,
  )
  return out[:, :queries], (qkv, lse)


def _backward(num_heads, real, queries, kept, g):
  qkv, lse = kept
  g = jnp.pad(g, ((0, 0), (0, lse.shape[2] - queries), (0, 0)))
  return tuple(_call(
      _backward_kernel, 'short_attention_backward', num_heads, real,
      10 * g.size * qkv.shape[1],
      [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)], qkv, lse, g,
  ))


short_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None], name: str, num_heads: int, real: int,
    flops: int, outs: Sequence[jax.ShapeDtypeStruct], *args: jax.Array,
) -> Any:
  """Runs a kernel with one program per image."""
  whole_image = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))
  nbytes = lambda x: x.size * x.dtype.itemsize
  batch, tokens, _ = args[0].shape

  def run(interpret):
    return pl.pallas_call(
        functools.partial(kernel, num_heads=num_heads, real=real),
        grid=(batch,), in_specs=[whole_image(x) for x in args],
        out_specs=[whole_image(x) for x in outs], out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',)
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=batch * num_heads * tokens * outs[-1].shape[-1],
            bytes_accessed=sum(map(nbytes, (*args, *outs))),
        ),
        interpret=interpret, name=name,
    )

  return jax.lax.platform_dependent(*args, cpu=run(True), default=run(False))


def _forward_kernel(qkv_ref, out_ref, lse_ref, *, num_heads, real):
  queries, dim = out_ref.shape[1:]
  head_dim = dim // num_heads
  lanes, group = _groups(num_heads, head_dim)
  chunks = _chunks(queries)

  def logits_of(start):
    q = qkv_ref[0, pl.ds(0, queries), pl.ds(start, lanes)]
    q = _to_whole_lanes(_scaled(q, head_dim))
    k = qkv_ref[0, :, pl.ds(dim + start, lanes)]
    return [
        _dot(k, q_h[low:high], ROWS_ROWS)
        for q_h in (_only(q, h, head_dim) for h in range(group))
        for low, high in chunks
    ]

  def finish(start, logits):
    weights = []
    for i, x in enumerate(logits):
      h, (low, high) = i // len(chunks), chunks[i % len(chunks)]
      x = _masked(x, real)
      top = jnp.max(x, 0, keepdims=True)  # [1, 128]
      exps = jnp.exp2((x - top) * LOG2E)
      total = jnp.sum(exps, 0, keepdims=True)
      weights.append((exps.astype(qkv_ref.dtype), 1 / total))
      lse = top * LOG2E + jnp.log2(total)
      high = min(high, queries)
      lse_ref[0, pl.ds(start // head_dim + h, 1), low:high] = (
          lse[:, : high - low]
      )
    v_t = qkv_ref[0, :, pl.ds(2 * dim + start, lanes)].T
    outs = []
    for h in range(group):
      v_h = v_t[h * head_dim : (h + 1) * head_dim]
      outs.append(jnp.concatenate([
          _dot(v_h, exps, PLAIN) * share
          for exps, share in weights[h * len(chunks) : (h + 1) * len(chunks)]
      ], axis=1))  # [head_dim, queries]
    out = jnp.concatenate(outs, axis=0).T[:queries]
    out_ref[0, :, pl.ds(start, lanes)] = out.astype(out_ref.dtype)

  before = None
  for start in range(0, dim, lanes):
    logits = logits_of(start)
    if before:
      finish(*before)
    before = start, logits
  finish(*before)


def _backward_kernel(qkv_ref, lse_ref, g_ref, to_ref, *, num_heads, real):
  _, tokens, width = qkv_ref.shape
  queries, dim = g_ref.shape[1:]
  head_dim = dim // num_heads
  dtype = qkv_ref.dtype
  lanes, group = _groups(num_heads, head_dim)
  chunks = _chunks(queries)
  units = [(h, low, high) for h in range(group) for low, high in chunks]
  for start in range(0, dim, lanes):
    q = qkv_ref[0, pl.ds(0, queries), pl.ds(start, lanes)]
    q = _to_whole_lanes(_scaled(q, head_dim))
    k = qkv_ref[0, :, pl.ds(dim + start, lanes)]
    v = qkv_ref[0, :, pl.ds(2 * dim + start, lanes)]
    g = _to_whole_lanes(g_ref[0, :, pl.ds(start, lanes)])
    k_t = k.T
    # The two kinds of product alternate. Computing all of one kind first makes
    # a longer program.
    products = [
        (_dot(k, _only(q, h, head_dim)[low:high], ROWS_ROWS),
         _dot(v, _only(g, h, head_dim)[low:high], ROWS_ROWS))
        for h, low, high in units
    ]
    both = []
    for (h, low, high), (x, to_weights) in zip(units, products, strict=True):
      end = min(high, queries)
      lse = lse_ref[0, pl.ds(start // head_dim + h, 1), low:end]
      lse = jnp.pad(lse, ((0, 0), (0, high - end)))
      weights = jnp.exp2(_masked(x, real) * LOG2E - lse)
      product = weights * to_weights
      mean = jnp.sum(product, 0, keepdims=True)
      to_logits = product - weights * mean
      both.append((weights.astype(dtype), to_logits.astype(dtype)))
    # All three are computed as [head_dim, T]: the matrix unit holds the T x T
    # operand, and the small one streams through it.
    q_t, g_t = q.T, g.T
    to_q, to_k, to_v = [], [0] * group, [0] * group
    for (h, low, high), (weights, to_logits) in zip(units, both, strict=True):
      mine = slice(h * head_dim, (h + 1) * head_dim)
      to_v[h] += _dot(g_t[mine, low:high], weights, ROWS_ROWS)
      to_k[h] += _dot(q_t[mine, low:high], to_logits, ROWS_ROWS)
      to_q.append(_dot(k_t[mine], to_logits, PLAIN))
    n = len(chunks)
    to_q = [
        jnp.concatenate(to_q[i : i + n], 1) for i in range(0, group * n, n)
    ]
    to_q, to_k, to_v = (jnp.concatenate(x).T for x in (to_q, to_k, to_v))
    to_q = to_q[:queries] * (1 / math.sqrt(head_dim))
    to_q = jnp.pad(to_q, ((0, tokens - queries), (0, 0)))
    for i, x in enumerate((to_q, to_k, to_v)):
      to_ref[0, :, pl.ds(i * dim + start, lanes)] = x.astype(dtype)


def _dot(a, b, contract):
  # float32 operands, which tests use, get full precision: by default, the
  # matrix unit would round them to bfloat16.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (contract, ((), ())), preferred_element_type=jnp.float32,
      precision=precision,
  )


def _groups(num_heads, head_dim):
  """Returns the number of lanes and of heads of a group of heads."""
  if LANES % head_dim == 0 and num_heads * head_dim % LANES == 0:
    return LANES, LANES // head_dim
  return head_dim, 1


def _only(x, head, head_dim):
  """Sets [T, lanes] to zero outside of one head of the group."""
  if x.shape[1] == head_dim:
    return x
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
  inside = (lane >= head * head_dim) & (lane < (head + 1) * head_dim)
  return jnp.where(inside, x, jnp.zeros((), x.dtype))


def _scaled(q, head_dim):
  """Scales the queries, rounding once; exact for heads of 64 (factor 1 / 8)."""
  scaled = q.astype(jnp.float32) * (1 / math.sqrt(head_dim))
  return scaled.astype(q.dtype)


def _masked(logits, real):
  """Masks the padded keys, which are the last rows of [keys, queries]."""
  if logits.shape[0] == real:
    return logits
  first = real // SUBLANES * SUBLANES
  tail = logits[first:]
  row = first + jax.lax.broadcasted_iota(jnp.int32, tail.shape, 0)
  tail = jnp.where(row < real, tail, -1e30)
  return jnp.concatenate([logits[:first], tail], axis=0)


def _to_whole_lanes(x):
  """Pads the queries with zero rows to a multiple of 128, in VMEM only."""
  return jnp.pad(x, ((0, -len(x) % LANES), (0, 0)))


def _chunks(queries):
  """Returns ranges of 128 queries, so that each column of tiles is full."""
  return [(i, i + LANES) for i in range(0, queries, LANES)]
