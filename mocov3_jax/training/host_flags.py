"""Flags that each process shares with all others: stop, save, unreadable.

The flags enter the jitted step with the batch and come back as metrics. Since
the batch is a global array, all processes learn of them at the same step, on
any number of hosts, without a collective of our own. (JAX's preemption sync
point reacts only to SIGTERM, and only if jax.distributed is initialised; the
flags also work for Ctrl-C and for a single process.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mocov3_jax.data.pipeline import Batch

STOP, SAVE, UNREADABLE = 'train/stop', 'train/save', 'data/unreadable'


class FlaggedBatch(NamedTuple):
  """A part of the global batch with a process's flags.

  Attributes:
    batch: the batch as read.
    stop: int32 [B], 1 if this process has been asked to stop.
    save: int32 [B], 1 if it is time to save by this process's clock.
  """

  batch: Batch
  stop: np.ndarray | jax.Array
  save: np.ndarray | jax.Array


def flagged(batch: Batch, stop: bool, save: bool) -> FlaggedBatch:
  """Adds the flags of this process to its part of the batch."""
  size = len(batch.unreadable)
  return FlaggedBatch(
      batch, np.full(size, stop, np.int32), np.full(size, save, np.int32)
  )


def reporting(step: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a step on a `FlaggedBatch` that adds the flags to the metrics.

  Args:
    step: (state, Batch, ...) -> (state, metrics).
  """
  def with_flags(state, flagged_batch, *constants):
    batch, stop, save = flagged_batch
    state, metrics = step(state, batch, *constants)
    return state, metrics | {
        UNREADABLE: jnp.sum(batch.unreadable >= 0), STOP: jnp.max(stop),
        SAVE: jnp.max(save),
    }

  return with_flags
