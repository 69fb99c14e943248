"""Evaluators, which measure a network, and the extraction of features."""

from collections.abc import Callable

from mocov3_jax.evals import knn, label_free
from mocov3_jax.evals.evaluator import EvalContext, Evaluator

# The evaluators of pre-training. An entry returns None if its evaluator does
# not apply to the run.
EVALUATORS: dict[str, Callable[[EvalContext], Evaluator | None]] = {
    'knn': knn.monitor,
    'label_free': label_free.monitor,
}


def build_evaluators(context: EvalContext) -> list[Evaluator]:
  """Returns the evaluators that apply to a run.

  Raises:
    UserError: if the data is not sufficient for one of them.
  """
  found = [build(context) for build in EVALUATORS.values()]
  return [evaluator for evaluator in found if evaluator is not None]
