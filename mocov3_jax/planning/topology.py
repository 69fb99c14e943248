"""Describes slices to their compiler; the chips themselves are not needed."""

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

# The share of a GPU's memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_SHARE = 0.75
# The packages that contain XLA's GPU compiler; one of them is enough.
PLUGINS = 'jax_cuda12_plugin', 'jax_cuda13_plugin'


@dataclasses.dataclass(frozen=True)
class Slice:
  """Connected chips of one kind.

  Attributes:
    name: chip and shape, such as 'v5e:16x16' or 'h100:8'.
    chip: the published figures of each chip.
    devices: the devices to compile for; they cannot run anything.
    compiler: name and version of the compiler.
    prescribed: the version of libtpu that this JAX uses on a slice, such as
      '0.0.42.*'; '' if JAX names none, and for GPUs.
  """

  name: str
  chip: Chip | Gpu
  devices: list[Any]
  compiler: str
  prescribed: str

  @property
  def are_gpus(self) -> bool:
    """Whether the chips are GPUs, whose time cannot be predicted."""
    return isinstance(self.chip, Gpu)

  @property
  def memory(self) -> float:
    """The bytes of a chip's memory that a run can use."""
    return self.chip.memory * (GPU_SHARE if self.are_gpus else 1)

  def assumed(self) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which JAX can trace for these chips."""
    return assumed_cudnn() if self.are_gpus else contextlib.nullcontext()


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
  """Splits text such as 'v5e:16x16' into the chip and the sides of the torus.

  Raises:
    UserError: for an unknown chip, or a shape of the wrong form.
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
  """Describes a slice to the chips' compiler, which runs on any machine.

  Args:
    topology: chip and shape, such as 'v5e:16x16' or 'v4:4x4x4'; for GPUs, the
      GPU and their number, such as 'h100:8'.

  Raises:
    UserError: for an unknown chip or shape, or if the compiler is not
      installed.
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
  # The compiler must be told if a slice is smaller than the chips of one host.
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
          f'--topology={topology}: the TPU compiler supports no such slice '
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
  # This process runs everything on the CPU.
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
  except Exception as e:  # Such as for a plugin of another version.
    text = (str(e).splitlines() or [''])[0][:200]
    raise UserError(
        f'--topology={topology}: the GPU compiler supports no such machine '
        f'({type(e).__name__}: {text}). Use the plugin that this JAX needs: '
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
    requirements: the requirements in the metadata of JAX.

  Returns:
    A version such as '0.0.42.*'; '' if JAX names none.
  """
  for requirement in requirements:
    pin = re.match(r'libtpu\s*==\s*([\w.*]+)', requirement)
    if pin:
      return pin[1]
  return ''


@contextlib.contextmanager
def _pretending(kind: str):
  # Without these, libtpu would look for a TPU, and wait for a metadata server.
  wanted = {
      'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_ID': '0',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': f'{kind}-8',
      # Only one process can use a TPU, but any number can compile for one.
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  before = {name: os.environ[name] for name in wanted if name in os.environ}
  os.environ.update(wanted)
  # This process runs everything on the CPU.
  jax.config.update('jax_platforms', 'cpu')
  try:
    yield
  finally:
    for name in wanted:
      del os.environ[name]
    os.environ.update(before)
