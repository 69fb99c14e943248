"""The device mesh, the sharding of batch and state, and jitted steps."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

PyTree = Any


# The mesh axes that the batch is split over.
BATCH_AXES = ('data', 'fsdp')
# Tensors with fewer elements than this are not worth splitting.
SMALL = 2**14


def make_mesh(
    devices: Sequence[jax.Device] | None = None, fsdp: int = 1
) -> Mesh:
  """Returns a mesh with the axes 'data' and 'fsdp'.

  The axes are `Auto`: the partitioner finds the collectives, so a matrix
  product of a sharded batch with itself (queries @ keys.T) just works.

  Args:
    devices: the devices of the mesh; None = all.
    fsdp: number of devices that a state is split over; must divide the number
      of all devices.
  """
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
      (len(devices) // fsdp, fsdp), BATCH_AXES, (AxisType.Auto,) * 2,
      devices=devices,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_sharding(mesh: Mesh, state: PyTree) -> PyTree:
  """Returns the sharding of each tensor of a training state.

  The state holds parameters, target, statistics and optimizer state. Each
  tensor is split over the mesh axis 'fsdp', along the largest of its axes that
  the size of 'fsdp' divides. Small tensors, and those without such an axis, are
  replicated.

  Args:
    mesh: a mesh from `make_mesh`.
    state: tree of arrays or ShapeDtypeStructs.

  Returns:
    The same tree, of NamedShardings.
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
  """Returns the sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
  """Returns shapes and dtypes with shardings, for arrays to be restored.

  Args:
    tree: tree of arrays or ShapeDtypeStructs.
    shardings: the same tree, of shardings; or one sharding for all arrays.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    one = shardings
    shardings = jax.tree.map(lambda _: one, tree)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree, shardings,
  )


@dataclasses.dataclass(frozen=True)
class JittedStep:
  """A training step, jitted over a mesh.

  Attributes:
    state: shapes, dtypes and shardings of the state.
    constants: arrays that both functions take as their last arguments.
    jitted_init: (*constants) -> state.
    jitted_step: (state, batch, *constants) -> (state, scalar metrics); donates
      the state.
  """

  state: PyTree
  constants: tuple[PyTree, ...]
  jitted_init: Callable[..., PyTree]
  jitted_step: Callable[..., tuple[PyTree, dict[str, jax.Array]]]

  def init(self) -> PyTree:
    """Returns the initial state, on the mesh."""
    return self.jitted_init(*self.constants)

  def __call__(
      self, state: PyTree, batch: PyTree
  ) -> tuple[PyTree, dict[str, jax.Array]]:
    """Takes a step; `state` is donated."""
    return self.jitted_step(state, batch, *self.constants)

  def trace(self, batch: PyTree) -> jax.stages.Traced:
    """Returns the step, traced for batches like this one."""
    return self.jitted_step.trace(self.state, batch, *self.constants)


def jit_step(
    init: Callable[..., PyTree],
    step: Callable[..., tuple[PyTree, dict[str, jax.Array]]],
    mesh: Mesh, constants: tuple[PyTree, ...] = (),
) -> JittedStep:
  """Jits the two functions of any training over a mesh.

  The state is sharded by `state_sharding`. A batch is split over all devices.
  Constants and metrics are replicated.

  Args:
    init: (*constants) -> state.
    step: (state, batch, *constants) -> (state, scalar metrics).
    mesh: the mesh to train on.
    constants: trees of arrays that no step changes, such as a frozen backbone.
  """
  shapes = jax.eval_shape(init, *constants)
  where = state_sharding(mesh, shapes)
  whole = replicated(mesh)
  return JittedStep(
      placed(shapes, where), constants,
      jax.jit(init, out_shardings=where),
      jax.jit(
          step, donate_argnums=0,
          in_shardings=(
              where, batch_sharding(mesh), *(whole for _ in constants)
          ),
          out_shardings=(where, whole),
      ),
  )


def local_positions(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Returns the positions in the global batch that this process holds, sorted.

  Args:
    mesh: the mesh over all processes.
    batch_size: global batch size, images.

  Returns:
    int64 [local batch size].
  """
  index_map = batch_sharding(mesh).addressable_devices_indices_map(
      (batch_size,)
  )
  spans = {index[0].indices(batch_size)[:2] for index in index_map.values()}
  return np.concatenate([np.arange(*span) for span in sorted(spans)])


def spread(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """Splits rows that every process holds over the devices of the mesh.

  Args:
    rows: [N, ...], the same in all processes.
    mesh: the mesh over all processes.

  Returns:
    [N rounded up to a multiple of the devices, ...], sharded by
    `batch_sharding` and padded with zeros.
  """
  share = -(-len(rows) // mesh.size)

  def part(index):
    part = rows[index[0]]
    absent = share - len(part)
    return np.pad(part, ((0, absent), *[(0, 0)] * (rows.ndim - 1)))

  return jax.make_array_from_callback(
      (share * mesh.size, *rows.shape[1:]), batch_sharding(mesh), part
  )


def to_global(batch: PyTree, mesh: Mesh) -> PyTree:
  """Turns each process's part of a batch into global arrays on the mesh.

  Args:
    batch: host arrays [local batch size, ...], whose rows are those of
      `local_positions`.
    mesh: the mesh over all processes.

  Returns:
    The same tree, of jax.Arrays [global batch size, ...] sharded by
    `batch_sharding`.
  """
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  with jax.transfer_guard('allow'):  # This transfer is intended.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), batch
    )
