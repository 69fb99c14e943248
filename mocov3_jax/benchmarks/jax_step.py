"""Runs the training step of a config on random images (`benchmark step`)."""

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

# Side of the matrices whose product measures the device's attainable FLOP/s, by
# platform. They are large enough to keep the device busy.
CEILING = {'cpu': 2048}
CEILING_ELSEWHERE = 8192


class JaxStep:
  """The step that `train` runs: augmentation, update and metrics."""

  def __init__(self, config: ConfigDict, alone: bool):
    """Initialises the state.

    Args:
      config: the config of the run.
      alone: whether to use only the first device instead of all. On a CPU, all
        devices are used in any case, since they share its cores.

    Raises:
      UserError: for a bad config.
    """
    one = alone and not share_cores()
    devices = jax.devices()[:1] if one else jax.devices()
    checks.validate(config, len(devices))
    # Compilation is timed, so it must not come from a cache.
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
    """Waits until the devices have finished all steps."""
    jax.block_until_ready((self._state, self._values))

  def memory(self) -> int | None:
    """Returns the peak memory of a device in bytes; None if not counted."""
    stats = jax.devices()[0].memory_stats()
    return stats['peak_bytes_in_use'] if stats else None

  def profiled(self, folder: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that writes a profile of what runs in it."""
    return jax.profiler.trace(folder)

  def about(self) -> dict[str, Any]:
    """Describes the devices and the cost of a step.

    Returns:
      The device and the number of devices; the FLOPs of a step; and for all
      devices together, the published peak in FLOP/s (None if not known) and
      the ceiling, which a product of large matrices reaches.
    """
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
  """Measures the FLOP/s of one device in a product of large matrices."""
  platform = jax.default_backend()
  side = CEILING[platform] if platform in CEILING else CEILING_ELSEWHERE
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(product(a, a))
    seconds.append(time.perf_counter() - start)
  # The first call compiles.
  return 2 * side**3 / statistics.median(seconds[1:])
