"""Projection and prediction MLPs (paper s5), and SwAV's prototypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import BatchNorm, torch_default, unit


class MlpHead(nn.Module):
  """An MLP of bias-free linear layers; with 0 layers, the identity.

  BatchNorm and ReLU follow each hidden layer. Each call uses the statistics of
  the batch that it is given, so each view needs its own call (paper App. A,
  option ii).

  Attributes:
    num_layers: number of linear layers.
    hidden_dim, out_dim: width of the hidden layers and of the output.
    out_bn: whether a BatchNorm without scale and offset follows the last layer.
    hidden_bn: whether a BatchNorm with scale and offset precedes each ReLU.
    dtype: dtype of the computation.
  """

  num_layers: int
  hidden_dim: int
  out_dim: int
  out_bn: bool = True
  hidden_bn: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, D] to [B, out_dim]."""
    for i in range(self.num_layers):
      last = i == self.num_layers - 1
      x = nn.Dense(
          self.out_dim if last else self.hidden_dim,
          use_bias=False,
          dtype=self.dtype,
          kernel_init=torch_default(x.shape[-1]),
          name=f'linear_{i}',
      )(x)
      if self.out_bn if last else self.hidden_bn:
        x = BatchNorm(affine=not last, dtype=self.dtype, name=f'bn_{i}')(
            x, train
        )
      if not last:
        x = nn.relu(x)
    return x


class Prototypes(nn.Module):
  """Cosine similarities to learned prototypes: the last layer of SwAV.

  See Caron et al. 2020 (arXiv 2006.09882), section 3.1. Prototypes are
  normalised here at each use, whereas the original code normalises the
  parameters before each step. The function is the same, but the steps of the
  optimizer differ slightly.

  Attributes:
    count: number of prototypes.
  """

  count: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, D] to cosines [B, count], in float32 or wider."""
    del train
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kernel = self.param(
        'kernel', torch_default(x.shape[-1]), (x.shape[-1], self.count)
    )
    return jnp.matmul(
        unit(x), unit(kernel.T).T, precision=jax.lax.Precision.HIGHEST
    )
