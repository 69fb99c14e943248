"""A large batch in small memory: a function of examples, a part at a time.

A contrastive loss needs the whole batch, but the trunk of the network does
not: its examples have nothing to do with each other. So the trunk runs part
by part and forgets what it did, the heads and the loss see the whole batch,
and the backward pass does each part of the trunk once more (the idea of Gao
et al. 2021, arXiv 2101.06983). The result is that of one pass.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Passes:
  """How a batch is parted.

  Attributes:
    count: passes, one after the other.
    devices: over which the batch lies; each pass takes the same share of
      every device's examples, so nothing moves between them.
  """

  count: int = 1
  devices: int = 1

  def map(self, f: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
    """Returns f(batch), a pass at a time; all axes 0 are the batch.

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
