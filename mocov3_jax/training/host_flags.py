"""What a host tells all others at a step: to stop, to save, what was bad.

The flags enter the jitted step with the batch and come back as metrics. Since
the batch is a global array, all processes learn of both at the same step, on
any number of hosts, and no collective of our own is needed. (JAX's preemption
sync point hears SIGTERM alone, and only where processes were joined; this
serves Ctrl-C and a single process as well.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mocov3_jax.data.pipeline import Batch

STOP, SAVE, UNREADABLE = 'train/stop', 'train/save', 'data/unreadable'


class FlaggedBatch(NamedTuple):
  """A part of the global batch, and a host's wishes.

  Attributes:
    batch: as read.
    stop: int32 [B], 1 if this process has been asked to stop.
    save: int32 [B], 1 if this process finds that it is time to save.
  """

  batch: Batch
  stop: np.ndarray | jax.Array
  save: np.ndarray | jax.Array


def flagged(batch: Batch, stop: bool, save: bool) -> FlaggedBatch:
  """Adds whether this process was asked to stop, and whether it is to save."""
  size = len(batch.unreadable)
  return FlaggedBatch(
      batch, np.full(size, stop, np.int32), np.full(size, save, np.int32)
  )


def reporting(step: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a step of `FlaggedBatch` whose metrics have all three flags.

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
