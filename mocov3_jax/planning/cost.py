"""Determines what a step costs on a slice, from its compiled program."""

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
  """The cost of a compiled step, per chip. None = unknown.

  Attributes:
    attention: the implementation of attention.
    fits: whether the step fits into the chip's memory.
    state: bytes of parameters, target, statistics and optimizer state.
    arguments: bytes of the state and the batch.
    temporary: bytes besides the arguments while the step runs.
    total: bytes in all, including the program.
    model_flops: FLOPs that the model needs: each matrix product once forward
      and twice backward, without recomputation and augmentation.
    traced_flops: FLOPs of all matrix products of the traced program, including
      recomputation, but not what is inside a library's kernels.
    compiled_flops: all FLOPs as the compiler counts them; None if there are
      loops, since the compiler counts their bodies once.
    collectives: the collectives by kind.
    breakdown: where the time of the step goes; TPUs only.
    kernels: the number of kernels by library; GPUs only.
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
  """Returns the shapes and dtypes of a batch of crops from the host."""
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
  """Compiles the real training step for a slice and reads its cost.

  Args:
    config: the config of the run.
    plan: the schedule of the run.
    chips: the slice to compile for.
    compiler: the compiler to use.
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
  """Reads from a compiler error how many bytes of memory the program needs.

  The error gives either the total, or the bytes of the temporaries alone.
  Returns None for an error of another kind.
  """
  used = re.search(
      r'(?:Used |HLO temporaries \()([\d.]+)([KMG])\w*(?: of|\) exceeds)',
      message,
  )
  if not used:
    return None
  return int(float(used[1]) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[used[2]])


def seconds(cost: Cost, chips: topology.Slice) -> dict[str, float]:
  """Returns lower bounds of the seconds of a step, by what limits it.

  'compute' is the FLOPs (compiled, else traced) at the chip's peak. 'program'
  is the bound of `breakdown`, or 0 without one. 'interconnect' is the
  collectives, as if each ran over a ring that uses all links of a chip.
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
