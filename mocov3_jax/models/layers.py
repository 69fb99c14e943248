"""Initialisers, normalisations, and what to compute again in the backward."""

from collections.abc import Callable
import functools
import math

import flax.linen as nn
import jax
from jax.extend import core
import jax.numpy as jnp


def uniform(bound: float) -> nn.initializers.Initializer:
  """Returns an initialiser drawing from U(-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def torch_default(fan_in: int) -> nn.initializers.Initializer:
  """Returns PyTorch's default initialiser of linear and conv layers."""
  return uniform(1 / math.sqrt(fan_in))


def xavier(fan_in: int, fan_out: int) -> nn.initializers.Initializer:
  """Returns Glorot's uniform initialiser for explicit fans."""
  return uniform(math.sqrt(6 / (fan_in + fan_out)))


def unit(x: jax.Array) -> jax.Array:
  """Scales vectors (the last axis) to length 1.

  The bound is PyTorch's: a zero vector stays zero instead of becoming NaN.
  """
  norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
  return x / norm


def later(x: jax.Array, g: jax.Array) -> jax.Array:
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


def once_more(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`f`, marked for `is_once_more`: it had been computed before."""

  def _once_more(*args):
    return f(*args)

  return jax.jit(_once_more)


def is_once_more(eqn: core.JaxprEqn) -> bool:
  """Whether this is a call of a function that `once_more` marked."""
  return 'name' in eqn.params and eqn.params['name'] == '_once_more'


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
  return jax.vjp(plain, later(x, g), *affine)[1](g)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  """`layer_norm` with its parameters, under the names of flax's.

  Attributes:
    dtype: of the output.
    epsilon: added to the variance.
  """

  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [..., D] over the last axis."""
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class BatchNorm(nn.Module):
  """BatchNorm with the running statistics of PyTorch.

  `flax.linen.BatchNorm` keeps the biased variance; PyTorch, and with it every
  published checkpoint, the unbiased one. Under `jax.jit` over a mesh the batch
  is the global one, so this is synchronised BatchNorm ([P] App. A) without a
  collective in the code.

  Attributes:
    affine: whether to learn a scale and an offset.
    zero_scale: start the scale at 0 instead of 1 (Goyal et al. 2017).
    dtype: of the output; statistics are float32 or wider.
    momentum: share of the new batch in the running statistics.
    epsilon: added to the variance.
  """

  affine: bool = True
  zero_scale: bool = False
  dtype: jnp.dtype = jnp.float32
  momentum: float = 0.1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises [..., D] over all axes but the last."""
    width = x.shape[-1:]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, width, wide)
    running_var = self.variable('batch_stats', 'var', jnp.ones, width, wide)
    x = x.astype(wide)
    if train:
      axes = tuple(range(x.ndim - 1))
      mean, var = jnp.mean(x, axes), jnp.var(x, axes)  # [D]
      if not self.is_initializing():
        count = x.size // x.shape[-1]
        unbiased = var * (count / max(count - 1, 1))
        running_mean.value += self.momentum * (mean - running_mean.value)
        running_var.value += self.momentum * (unbiased - running_var.value)
    else:
      mean, var = running_mean.value, running_var.value
    shape = (1,) * (x.ndim - 1) + width
    x = (x - mean.reshape(shape)) * jax.lax.rsqrt(
        var.reshape(shape) + self.epsilon
    )
    if self.affine:
      start = nn.initializers.constant(0.0 if self.zero_scale else 1.0)
      scale = self.param('scale', start, width)
      bias = self.param('bias', nn.initializers.zeros, width)
      x = x * scale.reshape(shape) + bias.reshape(shape)
    return x.astype(self.dtype)
