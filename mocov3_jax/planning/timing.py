"""Times a planned step if this machine has the planned chips."""

from concurrent import futures
import multiprocessing
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax.base import console
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.parallel.chips import DEVICE_KINDS
from mocov3_jax.planning import cost, topology
from mocov3_jax.training import pretrain

# The device files of TPUs and of GPUs on Linux.
TPU_DEVICES, GPU_DEVICES = ('/dev/accel0', '/dev/vfio/0'), ('/dev/nvidia0',)
STEPS = 10
MOST_SECONDS = 900


def seconds_here(
    config: ConfigDict, plan: config_lib.Plan, chips: topology.Slice
) -> float | None:
  """Times a step on this machine, in a process of its own.

  This process has already told JAX to use the CPU.

  Args:
    config: the config of the run.
    plan: the schedule of the run.
    chips: the planned chips.

  Returns:
    The seconds of a step. None if this machine has other chips, is one of
    several in a cluster, or cannot run the step now; the reason is printed in
    the last case.
  """
  devices = GPU_DEVICES if chips.are_gpus else TPU_DEVICES
  if processes.in_cluster() or not any(
      pathlib.Path(path).exists() for path in devices
  ):
    return None
  kinds = (
      (chips.chip.name,) if chips.are_gpus
      else DEVICE_KINDS[chips.name.partition(':')[0]]
  )
  context = multiprocessing.get_context('spawn')
  pool = futures.ProcessPoolExecutor(1, mp_context=context)
  try:
    return pool.submit(
        step_seconds, config, plan, kinds, len(chips.devices)
    ).result(timeout=MOST_SECONDS)
  except Exception as e:  # A busy chip, too little memory, a lost process.
    console.say(
        f'the step was not timed on this machine: {type(e).__name__} '
        f'{(str(e).splitlines() or [""])[0][:200]}'
    )
    return None
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def step_seconds(
    config: ConfigDict, plan: config_lib.Plan, kinds: tuple[str, ...],
    count: int,
) -> float | None:
  """Returns the median seconds of a step on the devices of this process.

  Args:
    config: the config of the run.
    plan: the schedule of the run.
    kinds: the names that JAX may give the planned devices.
    count: the number of planned devices.

  Returns:
    The seconds; None if the devices are of another kind or number.
  """
  devices = jax.devices()
  if len(devices) != count or devices[0].device_kind not in kinds:
    return None
  mesh = sharding.make_mesh(devices, config.fsdp_devices)
  _, step = pretrain.build_step(config, plan, mesh)
  batch = jax.jit(
      lambda: jax.tree.map(
          lambda x: jnp.full(x.shape, 7, x.dtype), cost.abstract_batch(config)
      ), out_shardings=sharding.batch_sharding(mesh),
  )()
  state, taken = step.init(), []
  for _ in range(STEPS + 2):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[2:])  # The first two warm up.
