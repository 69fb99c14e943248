"""Functions whose backward pass recomputes values instead of keeping them."""

from collections.abc import Callable
import functools
import math

import jax
from jax.extend import core
import jax.numpy as jnp


@jax.custom_vjp
def gelu_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies the exact (erf) GELU of x by a matrix.

  Only the arguments are kept for the backward pass, which recomputes the GELU.

  Args:
    x: [N, D].
    kernel: [D, features], of the same dtype.
  """
  return _gelu(x) @ kernel


def _gelu_dense_backward(kept, g):
  x, kernel = kept
  hidden, pull = jax.vjp(_gelu, recompute_barrier(x, g))
  return *pull(g @ kernel.T), hidden.T @ g


def _gelu(x):
  # In half precision, 1 + erf would lose small values.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * (1 + jax.lax.erf(wide / math.sqrt(2))) / 2).astype(x.dtype)


gelu_dense.defvjp(lambda x, w: (gelu_dense(x, w), (x, w)), _gelu_dense_backward)


@jax.custom_vjp
def gelu_dense_kept(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes `gelu_dense`, but also keeps the output of the GELU.

  The TPU compiler fuses an elementwise function into the operand of a product
  if it can. It would then recompute the GELU for each tile of the result. The
  barrier makes it compute the GELU once.
  """
  return _gelu_dense_kept_forward(x, kernel)[0]


def _gelu_dense_kept_forward(x, kernel):
  hidden = jax.lax.optimization_barrier(_gelu(x))
  return hidden @ kernel, (x, hidden, kernel)


def _gelu_dense_kept_backward(kept, g):
  x, hidden, kernel = kept
  return *jax.vjp(_gelu, x)[1](g @ kernel.T), hidden.T @ g


gelu_dense_kept.defvjp(_gelu_dense_kept_forward, _gelu_dense_kept_backward)


def recompute_barrier(x: jax.Array, g: jax.Array) -> jax.Array:
  """Returns `x` in a form that makes a backward pass recompute from it.

  Without a barrier, the compiler sees that the forward pass has computed the
  same values, and keeps those in memory. `jax.checkpoint` also uses a barrier
  for this, but XLA for CPUs drops barriers. On CPUs, the result is therefore
  made to depend on the gradient, by adding a zero that XLA cannot recognise.

  Args:
    x: [B, ...], kept from the forward pass.
    g: [B, ...], the incoming gradient of the backward pass.
  """

  def needing_g(x, g):
    first = g.reshape(len(g), -1)[:, 0].reshape(-1, *[1] * (x.ndim - 1))
    return x + jnp.where(jnp.isnan(first), first, 0).astype(x.dtype)

  return jax.lax.platform_dependent(
      x, g, cpu=needing_g,
      default=lambda x, g: jax.lax.optimization_barrier(x),
  )


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Marks calls of `f` as recomputation, to be found by `is_recomputed`."""

  def _recomputed(*args):
    return f(*args)

  return jax.jit(_recomputed)


def is_recomputed(eqn: core.JaxprEqn) -> bool:
  """Returns whether an equation calls a function marked by `recomputed`."""
  return 'name' in eqn.params and eqn.params['name'] == '_recomputed'


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises the last axis (Ba et al. 2016); computes mean, then variance.

  Only the arguments are kept for the backward pass. Autodiff would keep three
  more arrays of the size of `x`.

  Args:
    x: [..., D].
    scale, bias: [D].
    epsilon: added to the variance.

  Returns:
    [..., D], float32 or wider.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = x - jnp.mean(x, -1, keepdims=True)
  var = jnp.mean(centred**2, -1, keepdims=True)
  shape = (1,) * (x.ndim - 1) + scale.shape
  normed = centred * jax.lax.rsqrt(var + epsilon)
  return normed * scale.reshape(shape) + bias.reshape(shape)


def _layer_norm_forward(x, scale, bias, epsilon):
  return layer_norm(x, scale, bias, epsilon), (x, scale, bias)


def _layer_norm_backward(epsilon, kept, g):
  x, *affine = kept
  plain = lambda *kept: layer_norm.fun(*kept, epsilon)
  return jax.vjp(plain, recompute_barrier(x, g), *affine)[1](g)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
