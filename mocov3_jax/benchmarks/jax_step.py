"""The training step of a config on random images, for `benchmark step`."""

import contextlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.data.pipeline import Batch
from mocov3_jax.method.build import image_shape
from mocov3_jax.parallel import chips, sharding
from mocov3_jax.training import flops, pretrain

# Side of the matrices of the ceiling: large enough to fill the device.
CEILING = {'cpu': 2048}
CEILING_ELSEWHERE = 8192


class JaxStep:
  """What `train` runs at each step: augmentation, update and metrics."""

  def __init__(self, config: ConfigDict, alone: bool):
    """Initialises the state.

    Args:
      config: of the run.
      alone: on the first device, instead of all; on a CPU on all its devices,
        since they share its cores.

    Raises:
      UserError: for a bad config.
    """
    one = alone and not share_cores()
    devices = jax.devices()[:1] if one else jax.devices()
    checks.validate(config, len(devices))
    # The compiler is to be timed, not a cache of what it made before.
    jax.config.update('jax_enable_compilation_cache', False)
    self._config = config
    self._mesh = sharding.make_mesh(devices, config.fsdp_devices)
    plan = config_lib.plan(config, config_lib.IMAGENET_IMAGES)
    self._method, self._step = pretrain.build_step(config, plan, self._mesh)
    self._image_shape = image_shape(config.data)
    shape = config.batch_size, 2, *self._image_shape
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    good = np.full(config.batch_size, -1, np.int32)
    self._batch = sharding.to_global(Batch(noise, good), self._mesh)
    self._state = self._step.init()
    self._values = {}

  def __call__(self) -> None:
    """Takes a step."""
    self._state, self._values = self._step(self._state, self._batch)

  def wait(self) -> None:
    """Waits until the devices have done what they were given."""
    jax.block_until_ready((self._state, self._values))

  def memory(self) -> int | None:
    """Returns the most bytes ever used on a device; None if not counted."""
    stats = jax.devices()[0].memory_stats()
    return stats['peak_bytes_in_use'] if stats else None

  def profiled(self, folder: str) -> contextlib.AbstractContextManager[Any]:
    """Profiles what runs inside."""
    return jax.profiler.trace(folder)

  def about(self) -> dict[str, Any]:
    """Returns device, FLOPs of a step, and peak and ceiling of all devices."""
    kind, count = jax.devices()[0].device_kind, self._mesh.size
    peak = chips.peak_flops(kind)
    return {
        'device': kind, 'devices': count,
        'step_flops': flops.step_flops(
            self._method, self._image_shape, self._config.batch_size
        ),
        'peak_flops': peak and peak * count,
        'ceiling_flops': (1 if share_cores() else count) * matmul_flops(
            models.DTYPES[self._config.model.dtype]
        ),
    }


def share_cores() -> bool:
  """Returns whether the devices share the cores of one CPU."""
  return jax.default_backend() == 'cpu'


def matmul_flops(dtype: jnp.dtype) -> float:
  """Operations per second of one device in a product of large matrices."""
  platform = jax.default_backend()
  side = CEILING[platform] if platform in CEILING else CEILING_ELSEWHERE
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(product(a, a))
    seconds.append(time.perf_counter() - start)
  # The first one compiles.
  return 2 * side**3 / statistics.median(seconds[1:])
