"""What an evaluator is: a state goes in, named numbers come out."""

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
  """Measures the state of a training between steps.

  A training has any number of evaluators, each with an interval of its own. All
  of them measure the initial state, and each state that is saved.

  Attributes:
    measure: state -> values by the names of their metrics.
    every: steps between two measurements; 0 = only where a checkpoint is saved.
    main: the metric that sums the values up. It is among the results, together
      with what it was before training.
    words: values with `main` -> a few words for people, such as "kNN 97.2%".
    unreadable: why images could not be read, by name; grows as it measures.
    best: whether the checkpoint with the highest `main` is the best one. At
      most one evaluator of a training says so.
  """

  measure: Callable[[State], Values]
  every: int
  main: str
  words: Callable[[Values], str]
  best: bool = False
  unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def is_due(self, step: int) -> bool:
    """Returns whether `every` asks for a measurement after `step` updates."""
    return self.every > 0 and step % self.every == 0


def best_metric(evaluators: Sequence[Evaluator]) -> str | None:
  """Returns the metric by which a checkpoint is the best; None without one."""
  return next((e.main for e in evaluators if e.best), None)


class EvalContext(NamedTuple):
  """What the evaluators of a pre-training are built from.

  Attributes:
    config: of the run.
    model: the network.
    augment: makes the views of a batch.
    splits: the images.
    mesh: to work on.
    reader: of this process's part of the training batches.
    stop_asked: whether this process has been asked to end. An evaluator that
      takes long heeds it, in all processes alike, and raises Preempted.
  """

  config: ConfigDict
  model: Network
  augment: Augment
  splits: Splits
  mesh: Mesh
  reader: BatchReader
  stop_asked: Callable[[], bool] = lambda: False
