"""The projection and prediction MLPs (paper s5), and prototypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocov3_jax.models.layers import BatchNorm, torch_default, unit


class MlpHead(nn.Module):
  """Bias-free linear layers, each hidden one followed by BatchNorm and ReLU.

  Without layers it is the identity.

  Each call normalises by the batch it is given, so the two views must come in
  two calls (paper App. A, option ii).

  Attributes:
    num_layers: linear layers.
    hidden_dim, out_dim: width of the hidden layers and of the output.
    out_bn: whether a BatchNorm without scale and offset ends it.
    hidden_bn: whether there is one, with both, before each ReLU.
    dtype: of the arithmetic.
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
  """Cosines with learned directions: the last layer of SwAV.

  Caron et al. 2020 (arXiv 2006.09882), section 3.1. Scaled here at every use,
  where the original scales the parameters themselves before every step: the
  function is the same, a step along the sphere not quite.

  Attributes:
    count: of prototypes.
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
