"""What a training is made of, whichever it is."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax.config.training import Plan
from mocov3_jax.data.pipeline import BatchReader

State = Any


@dataclasses.dataclass(frozen=True)
class Job:
  """A training, assembled.

  Attributes:
    config: as the workdir will hold it; with `log`, `save`, `batch_size` and
      `data.prefetch`, `data.max_unreadable`.
    free: its fields that may change when the training is continued.
    plan: its steps.
    mesh: to train on.
    reader: of this process's part of the batches.
    fingerprint: of the data.
    init: () -> state, jitted.
    step: (state, Batch) -> (state, scalar metrics), jitted; donates the state.
    evaluate: state -> metrics.
    evaluate_every: steps between two evaluations; 0 = only at a save.
    best: the metric by which a checkpoint is the best.
    flops_per_image: operations of a step; None = MFU is not asked for.
    advice: what helps if it diverges.
    notes: lines to begin with.
  """

  config: ConfigDict
  free: tuple[str, ...]
  plan: Plan
  mesh: Mesh
  reader: BatchReader
  fingerprint: dict[str, Any]
  init: Callable[[], State]
  step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
  evaluate: Callable[[State], dict[str, float]]
  evaluate_every: int
  best: str
  flops_per_image: Callable[[], float] | None
  advice: str
  notes: tuple[str, ...]
