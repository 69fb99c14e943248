"""Initialisers and normalisation layers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.recompute import layer_norm


def uniform(bound: float) -> nn.initializers.Initializer:
  """Returns an initialiser that draws from U(-bound, bound)."""

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
  """Scales vectors (along the last axis) to length 1.

  A zero vector stays zero instead of becoming NaN, with the bound of PyTorch.
  """
  norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
  return x / norm


class LayerNorm(nn.Module):
  """`layer_norm` with parameters that have the same names as in flax.

  Attributes:
    dtype: dtype of the output.
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

  PyTorch, and so every published checkpoint, keeps the unbiased variance, while
  `flax.linen.BatchNorm` keeps the biased one. Under `jax.jit` over a mesh, the
  batch is the global batch, so this is synchronised BatchNorm (paper App. A)
  without a collective in the code.

  Attributes:
    affine: whether to learn a scale and an offset.
    zero_scale: start the scale at 0 instead of 1 (Goyal et al. 2017).
    dtype: dtype of the output; statistics are float32 or wider.
    momentum: weight of the new batch in the running statistics.
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
