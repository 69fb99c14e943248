"""The interface of evaluators: from a training state to named numbers."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax.data.pipeline import BatchReader
from mocov3_jax.method.augment import Augment
from mocov3_jax.models import Network
from mocov3_jax.sources import Splits

State = Any
Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Measures the training state between steps.

  A training run has any number of evaluators, each with its own interval. All
  of them measure the initial state and each state that is saved.

  Attributes:
    measure: state -> values by metric name.
    every: steps between measurements; 0 = only when a checkpoint is saved.
    main: the main metric. The results contain its last value and its value
      before training.
    words: values that include `main` -> a short text, such as "kNN 97.2%".
    unreadable: the images that could not be read, {name: reason}; grows with
      each measurement.
    best: whether the best checkpoint is the one with the highest `main`. At
      most one evaluator of a run may set this.
  """

  measure: Callable[[State], Values]
  every: int
  main: str
  words: Callable[[Values], str]
  best: bool = False
  unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def is_due(self, step: int) -> bool:
    """Returns whether a measurement is due by `every` after `step` updates."""
    return self.every > 0 and step % self.every == 0


def best_metric(evaluators: Sequence[Evaluator]) -> str | None:
  """Returns the metric that decides the best checkpoint; None if none does."""
  return next((e.main for e in evaluators if e.best), None)


class EvalContext(NamedTuple):
  """What the evaluators of a pre-training run are built from.

  Attributes:
    config: the run's config.
    model: the network.
    augment: makes the views of a batch.
    splits: the images.
    mesh: the mesh to compute on.
    reader: reads this process's part of the training batches.
    stop_asked: returns whether this process has been asked to stop. A slow
      evaluator checks it and raises Preempted, in all processes together.
  """

  config: ConfigDict
  model: Network
  augment: Augment
  splits: Splits
  mesh: Mesh
  reader: BatchReader
  stop_asked: Callable[[], bool] = lambda: False
