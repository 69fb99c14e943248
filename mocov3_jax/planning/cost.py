"""What one step costs on a slice, from the program that the compiler made."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.config import training as config_lib
from mocov3_jax.data.pipeline import Batch
from mocov3_jax.method.build import image_shape
from mocov3_jax.parallel import sharding
from mocov3_jax.planning import gpus, hlo, topology
from mocov3_jax.planning.breakdown import Breakdown, breakdown
from mocov3_jax.planning.compiler import Compiler
from mocov3_jax.training import flops, pretrain


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a compiled step, per chip. None = could not be told.

  Attributes:
    attention: its implementation.
    fits: whether it fits the chip's memory.
    state: bytes of parameters, target, statistics and optimizer state.
    arguments: bytes of the state and the batch.
    temporary: bytes beside them while the step runs.
    total: bytes in all, the program included.
    model_flops: that the model needs: each product once forward and twice
      backward, no recomputation, no augmentation.
    traced_flops: of all matrix products of the program as traced, with what
      is computed twice, and without what is inside of a library's kernels.
    compiled_flops: as the compiler counts them, everything included; None if
      there are loops, whose bodies it counts once.
    collectives: by kind.
    breakdown: where the time of the step goes, on TPUs.
    kernels: by library, on GPUs.
  """

  attention: str
  fits: bool
  state: int
  total: int
  model_flops: float
  traced_flops: float
  arguments: int | None = None
  temporary: int | None = None
  compiled_flops: float | None = None
  collectives: dict[str, hlo.Collectives] = dataclasses.field(
      default_factory=dict
  )
  breakdown: Breakdown | None = None
  kernels: dict[str, int] | None = None


def abstract_batch(config: ConfigDict) -> Batch:
  """Returns a batch of crops that the host made, without data."""
  return Batch(
      jax.ShapeDtypeStruct(
          (config.batch_size, 2, *image_shape(config.data)), jnp.uint8
      ),
      jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  )


def measure(
    config: ConfigDict, plan: config_lib.Plan, chips: topology.Slice,
    compiler: Compiler,
) -> Cost:
  """Compiles the real step for a slice and reads what it costs.

  Args:
    config: of the run.
    plan: of the run.
    chips: to compile for.
    compiler: to compile with.
  """
  mesh = sharding.make_mesh(chips.devices, config.fsdp_devices)
  method, step = pretrain.build_step(config, plan, mesh)
  known = {
      'attention': models.execution_on(
          mesh, config.model, config.data.image_size
      ).attention,
      'state': sum(
          math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
          for x in jax.tree.leaves(step.state)
      ),
      'model_flops': flops.step_flops(
          method, image_shape(config.data), config.batch_size
      ) / mesh.size,
      'traced_flops': flops.traced_flops(
          method, abstract_batch(config).images
      ) / mesh.size,
  }
  try:
    traced = step.trace(abstract_batch(config))
    lowered = traced.lower()
    if chips.are_gpus:
      program = compiler.compile_for_gpus(lowered)
    else:
      program = compiler.compile(lowered)
  except jax.errors.JaxRuntimeError as e:
    needed = memory_needed(str(e))
    if needed is None:
      raise
    return Cost(fits=False, total=needed, **known)
  memory = program.compiled.memory_analysis()
  total = (
      memory.argument_size_in_bytes + memory.temp_size_in_bytes
      + memory.output_size_in_bytes - memory.alias_size_in_bytes
      + memory.generated_code_size_in_bytes
  )
  compiled_flops = None
  if not hlo.has_loops(program.optimised):
    compiled_flops = program.compiled.cost_analysis()['flops']
  if chips.are_gpus:
    details = {'kernels': gpus.kernels(program.optimised)}
  else:
    details = {'breakdown': breakdown(
        program.code, chips.chip, program.schedule,
        flops.pallas_grids(traced.jaxpr.jaxpr),
    )}
  return Cost(
      fits=total <= chips.memory, total=total,
      arguments=memory.argument_size_in_bytes,
      temporary=memory.temp_size_in_bytes,
      collectives=hlo.collectives(program.optimised),
      compiled_flops=compiled_flops, **details, **known,
  )


def memory_needed(message: str) -> int | None:
  """Bytes that the compiler wanted, of its error; None if it is another one.

  It either has a total, or what the temporaries alone would need.
  """
  used = re.search(
      r'(?:Used |HLO temporaries \()([\d.]+)([KMG])\w*(?: of|\) exceeds)',
      message,
  )
  if not used:
    return None
  return int(float(used[1]) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[used[2]])


def seconds(cost: Cost, chips: topology.Slice) -> dict[str, float]:
  """Returns what a step takes at the least, by what limits it.

  Matrix products at the chip's peak, each collective as over a ring with all
  links of a chip in use; and the bound of the program (`breakdown`).
  """
  chip, count = chips.chip, len(chips.devices)
  share = (count - 1) / count
  moved = sum(
      # An all-reduce is a reduce-scatter and an all-gather.
      (2 if kind == 'all-reduce' else 1) * share * c.bytes
      for kind, c in cost.collectives.items()
  )
  flops = cost.compiled_flops or cost.traced_flops
  return {
      'compute': flops / chip.flops,
      'program': cost.breakdown.step.bound_ms / 1e3 if cost.breakdown else 0.0,
      'interconnect': moved / chip.interconnect,
  }
