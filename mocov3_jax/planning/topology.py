"""Chips that are not there: their topology and their published figures."""

from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax

from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.parallel.chips import CHIPS, Chip
from mocov3_jax.planning.gpus import GPUS, Gpu, assumed_cudnn, target_config

# Of a GPU's memory, what JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_SHARE = 0.75
# XLA's GPU compiler comes as one of these.
PLUGINS = 'jax_cuda12_plugin', 'jax_cuda13_plugin'


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips of one kind, connected.

  Attributes:
    name: such as 'v5e:16x16' or 'h100:8'.
    chip: figures of each.
    devices: for the compiler; they cannot run anything.
    compiler: its name and version.
    prescribed: the version of it that this JAX runs on a slice, such as
      '0.0.42.*'; '' if JAX names none.
  """

  name: str
  chip: Chip | Gpu
  devices: list[Any]
  compiler: str
  prescribed: str

  @property
  def are_gpus(self) -> bool:
    """Whether they are GPUs, of which no time can be told."""
    return isinstance(self.chip, Gpu)

  @property
  def memory(self) -> float:
    """Bytes of a chip that a run can have."""
    return self.chip.memory * (GPU_SHARE if self.are_gpus else 1)

  def assumed(self) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which JAX takes them for present."""
    return assumed_cudnn() if self.are_gpus else contextlib.nullcontext()


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
  """Splits 'v5e:16x16' into the chip and the sides of the torus.

  Raises:
    UserError: for an unknown chip or a shape that it does not come in.
  """
  kind, _, shape = topology.partition(':')
  if kind not in CHIPS:
    raise unknown('--topology', kind, (*CHIPS, *GPUS))
  chip = CHIPS[kind]
  sides = 'x'.join(['N'] * chip.dimensions)
  if not re.fullmatch('x'.join([r'[1-9]\d*'] * chip.dimensions), shape):
    raise UserError(
        f'--topology={topology!r}. Allowed: {kind}:{sides}, such as '
        f'{kind}:{"x".join(["4"] * chip.dimensions)}.'
    )
  return chip, tuple(map(int, shape.split('x')))


def get_slice(topology: str) -> Slice:
  """Describes chips to their compiler, which runs on any machine.

  Args:
    topology: chip and shape, such as 'v5e:16x16' or 'v4:4x4x4'; or a GPU and
      how many, 'h100:8'.

  Raises:
    UserError: for what is not known, or without the compiler.
  """
  if topology.partition(':')[0] in GPUS:
    return _get_gpus(topology)
  chip, sides = parse(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
        f'--topology={topology} needs the TPU compiler, which is not '
        'installed. Use: pip install "mocov3_jax[tpu]", or in a clone '
        'pip install -e ".[tpu]".'
    )
  # Slices smaller than a host's share have to say so.
  host = tuple(
      math.gcd(a, b) for a, b in zip((*sides, 1), chip.host, strict=False)
  )
  with _pretending(topology.split(':')[0]):
    try:
      from jax.experimental import topologies

      found = topologies.get_topology_desc(
          topology, platform='tpu', chips_per_host_bounds=host,
          chip_config_name=chip.config,
      )
    except Exception as e:  # Several kinds, and none says what to do.
      text = (str(e).splitlines() or [''])[0]
      raise UserError(
          f'--topology={topology}: the TPU compiler gives no such slice '
          f'({type(e).__name__}: {text}). Use a shape that Cloud TPU '
          'offers.'
      ) from e
  return Slice(
      topology, chip, list(found.devices),
      f'libtpu {importlib.metadata.version("libtpu")}',
      prescribed_compiler(importlib.metadata.requires('jax') or ()),
  )


def _get_gpus(topology: str) -> Slice:
  """Describes GPUs of one machine to XLA's GPU compiler."""
  kind, _, count = topology.partition(':')
  if not re.fullmatch(r'[1-8]', count):
    raise UserError(
        f'--topology={topology!r}. Allowed: {kind}:1 to {kind}:8, the GPUs of '
        'one machine.'
    )
  gpu = GPUS[kind]
  # Everything that runs does so on the CPU.
  jax.config.update('jax_platforms', 'cpu')
  plugin = next(
      (name for name in PLUGINS if importlib.util.find_spec(name)), None
  )
  if plugin is None:
    raise UserError(
        f'--topology={topology} needs the GPU compiler, which is not '
        'installed. Use: pip install "mocov3_jax[gpu-plan]", or in a clone '
        'pip install -e ".[gpu-plan]".'
    )
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(
        platform='cuda', target_config=target_config(gpu),
        topology=f'1x1x{count}',
    )
  except Exception as e:  # Such as a plugin of another version.
    text = (str(e).splitlines() or [''])[0][:200]
    raise UserError(
        f'--topology={topology}: the GPU compiler gives no such machine '
        f'({type(e).__name__}: {text}). Use the plugin that this JAX wants: '
        'pip install "mocov3_jax[gpu-plan]".'
    ) from e
  package = plugin.replace('_', '-')
  return Slice(
      topology, gpu, list(found.devices),
      f'{package} {importlib.metadata.version(package)}', '',
  )


def prescribed_compiler(requirements: Sequence[str]) -> str:
  """Returns the version of libtpu that `jax[tpu]` installs on a slice.

  Args:
    requirements: of JAX, as its metadata has them.

  Returns:
    Such as '0.0.42.*'; '' if JAX names none.
  """
  for requirement in requirements:
    pin = re.match(r'libtpu\s*==\s*([\w.*]+)', requirement)
    if pin:
      return pin[1]
  return ''


@contextlib.contextmanager
def _pretending(kind: str):
  # libtpu would look for a TPU, and wait for the answer of a metadata server.
  wanted = {
      'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_ID': '0',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': f'{kind}-8',
      # Only one process can hold a TPU, but any number can compile for one.
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  before = {name: os.environ[name] for name in wanted if name in os.environ}
  os.environ.update(wanted)
  # Everything that runs does so on the CPU.
  jax.config.update('jax_platforms', 'cpu')
  try:
    yield
  finally:
    for name in wanted:
      del os.environ[name]
    os.environ.update(before)
