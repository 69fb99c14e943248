"""Describes GPUs to XLA's GPU compiler; the GPUs themselves are not needed.

XLA can compile for a GPU from a description of it. The result shows the memory
that is needed and the kernels from each library, but not the time: XLA finds
the fastest of several kernels by measuring on the GPU, and its cost model is of
no use for whole steps.
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import re
from unittest import mock

from mocov3_jax.parallel.chips import GIB
from mocov3_jax.planning import hlo

# The version of cuDNN that kernels are taken from.
CUDNN = 9, 10, 0


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Published figures of a GPU (NVIDIA's data sheets and CUDA's tables).

  Attributes:
    name: the device name in CUDA.
    memory: device memory, bytes.
    bandwidth: memory bandwidth, bytes per second.
    capability: major and minor compute capability.
    cores: the number of streaming multiprocessors.
    fpus: float32 units per streaming multiprocessor.
    shared: shared memory of a streaming multiprocessor, and the most that a
      block may have of it, bytes.
    l2: level 2 cache, bytes.
    clock: clock rate, GHz.
  """

  name: str
  memory: int
  bandwidth: int
  capability: tuple[int, int]
  cores: int
  fpus: int
  shared: tuple[int, int]
  l2: int
  clock: float


GPUS = {
    'a100': Gpu(
        'NVIDIA A100-SXM4-80GB', 80 * GIB, 2039 * 10**9, (8, 0), 108, 64,
        (167936, 166912), 40 * 2**20, 1.41,
    ),
    'h100': Gpu(
        'NVIDIA H100 80GB HBM3', 80 * GIB, 3352 * 10**9, (9, 0), 132, 128,
        (233472, 232448), 50 * 2**20, 1.98,
    ),
    'h200': Gpu(
        'NVIDIA H200', 141 * 10**9, 4800 * 10**9, (9, 0), 132, 128,
        (233472, 232448), 50 * 2**20, 1.98,
    ),
}


def target_config(gpu: Gpu) -> str:
  """Describes the GPU to the compiler, as the text of GpuTargetConfigProto."""
  major, minor = gpu.capability
  # Allows kernels with Hopper's own instructions (sm_90a).
  feature = ' feature_extension: ACCELERATED_FEATURES' if major == 9 else ''
  cudnn = '.'.join(map(str, CUDNN))
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared[0]}
  shared_memory_per_block_optin: {gpu.shared[1]}
  threads_per_core_limit: 2048 core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "{gpu.name}"
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "{cudnn}"
}}
platform_name: "CUDA"
dnn_version_info {{
  major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]}
}}
device_description_str: "{gpu.name}"
"""


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
  """Lets JAX trace cuDNN's attention on a machine without cuDNN.

  While tracing, JAX asks the library for its version, which cannot be set in
  any other way.
  """
  version = CUDNN[0] * 10_000 + CUDNN[1] * 100 + CUDNN[2]
  with mock.patch(
      'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version',
      lambda: version,
  ):
    yield


def kernels(text: str) -> dict[str, int]:
  """Counts the kernels of a compiled step by the library they are from.

  Args:
    text: the optimised HLO of the step.

  Returns:
    The number of kernels by library, the largest first. The libraries are
    'cuBLAS', 'cuDNN', 'cuDNN attention', 'Triton', and 'XLA' for kernels that
    XLA generates itself.
  """
  found = collections.Counter()
  computations = hlo.operations(text)

  def visit(name):
    for op in computations[name]:
      inner = op.attribute(hlo.CALLED)
      target = op.attribute(r'custom_call_target="([^"]*)"')
      if target.startswith('__cublas'):
        found['cuBLAS'] += 1
      elif target.startswith('__cudnn$fmha'):
        found['cuDNN attention'] += 1
      elif target.startswith('__cudnn'):
        found['cuDNN'] += 1
      elif op.code == 'fusion':
        triton = re.search(r'"kind":"__triton', op.attributes)
        found['Triton' if triton else 'XLA'] += 1
      elif op.code in ('copy', 'sort', 'scatter', 'transpose', 'reduce'):
        found['XLA'] += 1
      elif op.code in ('call', 'while', 'async-start') and (
          inner in computations
      ):
        visit(inner)

  visit('ENTRY')
  return dict(found.most_common())
