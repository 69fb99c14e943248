"""What one step costs on a slice, from the program that the compiler made."""

import dataclasses
import math
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax.config import training as config_lib
from mocov3_jax.data.pipeline import Batch
from mocov3_jax.method.build import build_method, image_shape
from mocov3_jax.parallel import sharding
from mocov3_jax.planning import hlo, topology
from mocov3_jax.training import flops, pretrain


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a compiled step, per chip. None = could not be told.

  Attributes:
    fits: whether it fits the chip's memory.
    state: bytes of parameters, target, statistics and optimizer state.
    arguments: bytes of the state and the batch.
    temporary: bytes beside them while the step runs.
    total: bytes in all, the program included.
    model_flops: that the model needs: each product once forward and twice
      backward, no recomputation, no augmentation.
    traced_flops: of all matrix products of the program as traced, with what
      is computed twice.
    compiled_flops: as the compiler counts them, everything included; None if
      there are loops, whose bodies it counts once.
    hbm_bytes: of all operands and results of all operations, as the compiler
      counts them; likewise. More than what moves: some stay on the chip.
    collectives: by kind.
  """

  fits: bool
  state: int
  total: int
  model_flops: float
  traced_flops: float
  arguments: int | None = None
  temporary: int | None = None
  compiled_flops: float | None = None
  hbm_bytes: float | None = None
  collectives: dict[str, hlo.Collectives] = dataclasses.field(
      default_factory=dict
  )


def abstract_batch(config: ConfigDict) -> Batch:
  """Returns a batch of crops that the host made, without data."""
  return Batch(
      jax.ShapeDtypeStruct(
          (config.batch_size, 2, *image_shape(config.data)), jnp.uint8
      ),
      jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  )


def measure(
    config: ConfigDict, plan: config_lib.Plan, chips: topology.Slice
) -> Cost:
  """Compiles the real step for a slice and reads what it costs."""
  mesh = sharding.make_mesh(chips.devices, config.fsdp_devices)
  method = build_method(config, plan, mesh.size)
  step = sharding.jit_step(*pretrain.make_step(config, method), mesh)
  known = {
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
    compiled, text = compile_and_print(step.lower(abstract_batch(config)))
  except jax.errors.JaxRuntimeError as e:
    needed = memory_needed(str(e))
    if needed is None:
      raise
    return Cost(fits=False, total=needed, **known)
  memory = compiled.memory_analysis()
  total = (
      memory.argument_size_in_bytes + memory.temp_size_in_bytes
      + memory.output_size_in_bytes - memory.alias_size_in_bytes
      + memory.generated_code_size_in_bytes
  )
  counted = {}
  if not hlo.has_loops(text):
    cost = compiled.cost_analysis()
    counted = {
        'compiled_flops': cost['flops'], 'hbm_bytes': cost['bytes accessed']
    }
  return Cost(
      fits=total <= chips.chip.memory, total=total,
      arguments=memory.argument_size_in_bytes,
      temporary=memory.temp_size_in_bytes,
      collectives=hlo.collectives(text), **counted, **known,
  )


def compile_and_print(lowered: jax.stages.Lowered) -> tuple[Any, str]:
  """Compiles, and has the compiler itself print the optimised program.

  jaxlib's `as_text` fails at some of v6e's asynchronous collectives, which are
  newer than it.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile(compiler_options={
        'xla_dump_to': folder, 'xla_dump_hlo_as_text': True,
    })
    printed = sorted(pathlib.Path(folder).glob('*.after_optimizations.txt'))
    return compiled, printed[-1].read_text()


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
  links of a chip in use: lower bounds. Memory traffic at its bandwidth: none,
  since the compiler counts more than what moves. All three at the same time.
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
      'memory': (cost.hbm_bytes or 0.0) / chip.bandwidth,
      'interconnect': moved / chip.interconnect,
  }
