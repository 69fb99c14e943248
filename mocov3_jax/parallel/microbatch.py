"""A large batch in small memory: a function of examples, a part at a time.

A contrastive loss needs the whole batch, but the trunk of the network does
not: its examples have nothing to do with each other. So the trunk runs on one
micro-batch after the other and forgets what it did, the heads and the loss see
the whole batch, and the backward pass runs the trunk on each micro-batch once
more (Gao et al. 2021, arXiv 2101.06983). The result is that of one pass.
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
    count: micro-batches, one after the other.
    devices: over which the batch lies. A micro-batch has the same share of
      every device's examples, so nothing moves between them.
  """

  count: int = 1
  devices: int = 1

  def map(self, f: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
    """Returns f(batch), a micro-batch at a time; all axes 0 are the batch.

    Args:
      f: treats each example by itself.
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
