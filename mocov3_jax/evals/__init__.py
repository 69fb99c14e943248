"""Evaluators: what is measured of a network, and features for others to use."""

from collections.abc import Callable

from mocov3_jax.evals import knn, label_free
from mocov3_jax.evals.evaluator import EvalContext, Evaluator

# The evaluators of a pre-training; None where one does not apply to a run.
EVALUATORS: dict[str, Callable[[EvalContext], Evaluator | None]] = {
    'knn': knn.monitor,
    'label_free': label_free.monitor,
}


def build_evaluators(context: EvalContext) -> list[Evaluator]:
  """Returns the evaluators that apply to a run.

  Raises:
    UserError: for data that does not suffice for one of them.
  """
  found = [build(context) for build in EVALUATORS.values()]
  return [evaluator for evaluator in found if evaluator is not None]
