"""Backward passes that compute again what they need."""

from collections.abc import Callable
import functools
import math

import jax
from jax.extend import core
import jax.numpy as jnp


@jax.custom_vjp
def gelu_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies the exact (erf) GELU of x with a matrix, keeping both arguments.

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
  # The sum would lose the small values in half precision.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * (1 + jax.lax.erf(wide / math.sqrt(2))) / 2).astype(x.dtype)


gelu_dense.defvjp(lambda x, w: (gelu_dense(x, w), (x, w)), _gelu_dense_backward)


@jax.custom_vjp
def gelu_dense_kept(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Does what `gelu_dense` does, but keeps the output of the GELU as well.

  The TPU compiler puts an elementwise function into the operand of a product
  if it can, and so would compute the GELU for each tile of the result again.
  The barrier makes it compute the GELU once.
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
  """Returns `x`, so that a backward pass computes anew what it makes of it.

  Without this, the compiler sees that the forward pass had computed the same,
  and keeps that in memory; `jax.checkpoint` has a barrier for it, but XLA for
  CPUs drops barriers. So there the result is made to need the gradient, by
  adding a zero of which XLA does not know that it is one.

  Args:
    x: [B, ...], kept from the forward pass.
    g: [B, ...], the gradient that the backward pass was given.
  """

  def needing_g(x, g):
    first = g.reshape(len(g), -1)[:, 0].reshape(-1, *[1] * (x.ndim - 1))
    return x + jnp.where(jnp.isnan(first), first, 0).astype(x.dtype)

  return jax.lax.platform_dependent(
      x, g, cpu=needing_g,
      default=lambda x, g: jax.lax.optimization_barrier(x),
  )


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Marks `f` for `is_recomputed`: its result had been computed before."""

  def _recomputed(*args):
    return f(*args)

  return jax.jit(_recomputed)


def is_recomputed(eqn: core.JaxprEqn) -> bool:
  """Returns whether this is a call of a function that `recomputed` marked."""
  return 'name' in eqn.params and eqn.params['name'] == '_recomputed'


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises the last axis (Ba et al. 2016); the mean square in two passes.

  For the backward pass it keeps its arguments alone. Autodiff would keep three
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
