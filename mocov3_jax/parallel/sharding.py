"""The mesh, where batch and state live on it, and host arrays onto it."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

PyTree = Any


# Over which the batch is split.
BATCH_AXES = ('data', 'fsdp')
# Smaller tensors are not worth splitting: elements.
SMALL = 2**14


def make_mesh(
    devices: Sequence[jax.Device] | None = None, fsdp: int = 1
) -> Mesh:
  """Returns a mesh with the axes 'data' and 'fsdp'.

  The axes are `Auto`: the partitioner finds the collectives, so a matrix
  product of a sharded batch with itself (queries @ keys.T) just works.

  Args:
    devices: default: all.
    fsdp: over how many of them a state is split; divides their number.
  """
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
      (len(devices) // fsdp, fsdp), BATCH_AXES, (AxisType.Auto,) * 2,
      devices=devices,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_sharding(mesh: Mesh, state: PyTree) -> PyTree:
  """The one rule for parameters, target, statistics and optimizer state.

  Each tensor is split over 'fsdp' along its largest axis that this divides;
  small ones, and those without such an axis, are whole everywhere.

  Args:
    mesh: of `make_mesh`.
    state: of arrays or ShapeDtypeStructs.

  Returns:
    The same tree of NamedSharding.
  """
  parts = mesh.shape['fsdp']

  def rule(x):
    axes = [i for i, n in enumerate(x.shape) if n % parts == 0]
    if parts == 1 or math.prod(x.shape) < SMALL or not axes:
      return replicated(mesh)
    split = max(axes, key=lambda i: x.shape[i])
    spec = ['fsdp' if i == split else None for i in range(x.ndim)]
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(rule, state)


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def local_positions(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Places in the global batch that this process's devices hold, sorted.

  Args:
    mesh: of all processes.
    batch_size: global, images.

  Returns:
    int64 [local batch size].
  """
  index_map = batch_sharding(mesh).addressable_devices_indices_map(
      (batch_size,)
  )
  spans = {index[0].indices(batch_size)[:2] for index in index_map.values()}
  return np.concatenate([np.arange(*span) for span in sorted(spans)])


def to_global(batch: PyTree, mesh: Mesh) -> PyTree:
  """Turns each process's part of a batch into global arrays on the mesh.

  Args:
    batch: host arrays [local batch size, ...], rows as `local_positions` says.
    mesh: of all processes.

  Returns:
    The same tree of jax.Arrays [global batch size, ...], split as
    `batch_sharding` says.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  with jax.transfer_guard('allow'):  # This is meant.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )
