"""`benchmark attention`: times each implementation on this device."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.benchmarks.timing import take_turns
from mocov3_jax.models.attention import ATTENTION, Dense, Tokens
from mocov3_jax.models.execution import PLATFORMS, Execution
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import sharding


def benchmark_attention(
    config: ConfigDict, rounds: int, steps: int
) -> dict[str, Any]:
  """Times attention in one block, forward and backward, on one device.

  Args:
    config: gives the model, the image size and the batch size. Each image of
      the batch counts as two crops.
    rounds: turns of each implementation.
    steps: calls per turn.

  Returns:
    For each implementation that this device has, {'ms': milliseconds per call}
    or {'error': message}. 'chosen' is the implementation that the config's
    `model.attention` selects. Also device, model, dtype and batch size.

  Raises:
    UserError: for a network without attention.
  """
  backbone = models.build_backbone(config.model, config.data.image_size)
  if not isinstance(backbone, ViT):
    raise UserError(
        f'model.name={config.model.name!r} has no attention. Allowed: '
        f'{", ".join(models.VITS)}.'
    )
  device = jax.devices()[0]
  contenders, result = {}, {}
  for name, platforms in PLATFORMS.items():
    # On a CPU, Pallas kernels are interpreted, so their time means nothing.
    if device.platform in platforms and (name, device.platform) != (
        'pallas', 'cpu'
    ):
      call = functools.partial(_calls, *_compiled(name, config, backbone))
      try:
        call(1)
      except Exception as e:  # Compilers raise many kinds.
        result[name] = {'error': (str(e).splitlines() or [''])[0][:200]}
      else:
        contenders[name] = functools.partial(call, steps)
  rates = take_turns(contenders, rounds)
  result |= {name: {'ms': 1e3 / rate} for name, rate in rates.items()}
  chosen = models.execution_on(
      sharding.make_mesh([device]), config.model, config.data.image_size
  )
  for name, found in result.items():
    console.say(f'{name:10}' + (
        f'{found["ms"]:9.3f} ms' if 'ms' in found else f' {found["error"]}'
    ))
  return result | {
      'chosen': chosen.attention, 'device': device.device_kind,
      'model': config.model.name, 'dtype': config.model.dtype,
      'batch_size': config.batch_size,
  }


def _compiled(name: str, config: ConfigDict, backbone: ViT) -> tuple[Any, ...]:
  """Returns a jitted gradient function of attention and its arguments."""
  dim, dtype = backbone.dim, backbone.dtype
  real = backbone.tokens(config.data.image_size)
  rows = Execution(name).padded(real)
  tokens = Tokens(rows, real, rows)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2 * config.batch_size * rows, dim), dtype)
  kernels = [
      jax.random.normal(key, (dim, width), dtype) / math.sqrt(dim)
      for key, width in ((keys[1], 3 * dim), (keys[2], dim))
  ]

  def loss(x, kernels):
    qkv, proj = (
        Dense(kernel, jnp.zeros(kernel.shape[1], dtype), part)
        for kernel, part in zip(kernels, ('qkv', 'proj'), strict=True)
    )
    out = ATTENTION[name](x, qkv, proj, backbone.num_heads, tokens, None)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  return jax.jit(jax.grad(loss, argnums=(0, 1))), x, kernels


def _calls(grad: Any, x: jax.Array, kernels: Any, count: int) -> int:
  for _ in range(count):
    out = grad(x, kernels)
  jax.block_until_ready(out)
  return count
