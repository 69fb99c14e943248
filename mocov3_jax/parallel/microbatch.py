"""Processes a large batch in little memory, one micro-batch at a time.

A contrastive loss needs the whole batch, but the trunk of the network does not:
it treats each example independently. So the trunk runs on one micro-batch after
the other and discards its activations. The heads and the loss see the whole
batch. The backward pass runs the trunk on each micro-batch once more (Gao et
al. 2021, arXiv 2101.06983). The result is the same as that of a single pass.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@dataclasses.dataclass(frozen=True)
class MicroBatches:
  """How a batch is split.

  Attributes:
    count: number of micro-batches, processed one after the other.
    devices: number of devices that the batch is split over. A micro-batch has
      the same share of every device's examples, so no data moves between them.
  """

  count: int = 1
  devices: int = 1

  def map(self, f: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
    """Returns f(batch), computed one micro-batch at a time.

    Axis 0 of every array is the batch.

    Args:
      f: a function that treats each example independently.
      batch: arrays [B, ...]; B is a multiple of count * devices.
    """
    if self.count == 1:
      return f(batch)
    parts = jax.tree.map(self._split, batch)
    done = jax.lax.map(jax.checkpoint(f, prevent_cse=False), parts)
    return jax.tree.map(self._join, done)

  def _split(self, x: jax.Array) -> jax.Array:
    # [B, ...] to [count, B / count, ...].
    x = x.reshape(self.devices, self.count, -1, *x.shape[1:])
    return jnp.moveaxis(x, 0, 1).reshape(self.count, -1, *x.shape[3:])

  def _join(self, x: jax.Array) -> jax.Array:
    x = x.reshape(self.count, self.devices, -1, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0).reshape(-1, *x.shape[3:])


# The whole batch at once.
ONE_BATCH = MicroBatches()
