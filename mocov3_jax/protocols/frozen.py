"""The protocols that train nothing: kNN and logistic regression."""

from collections.abc import Callable
from typing import Any

from mocov3_jax import sources
from mocov3_jax.base.errors import Preempted
from mocov3_jax.evals import knn, logistic
from mocov3_jax.evals.features import STOPPED
from mocov3_jax.evals.opened import RANDOM
from mocov3_jax.parallel import processes
from mocov3_jax.protocols import setup as setup_lib
from mocov3_jax.protocols.setup import Setup

PyTree = Any
# When an evaluation stops after Ctrl-C, as the user is told.
SOON = 'after this batch or fit'


def evaluate_knn(setup: Setup, path: str) -> dict[str, Any]:
  """Classifies by weighted nearest neighbours, for all k and temperatures."""
  def classify(variables):
    return knn.table(
        setup.config.knn, setup.extract, setup.splits, setup.mesh,
        variables['params'], variables['batch_stats'],
    )

  return _evaluate(setup, path, 'knn', classify)


def evaluate_logistic(setup: Setup, path: str) -> dict[str, Any]:
  """Fits logistic regression on the features of whole images.

  Each process of a run fits it, which is no slower than waiting for one of
  them.
  """
  c = setup.config.logistic

  def classify(variables):
    parts = []
    for source in setup.splits.train, setup.splits.test:
      source, labels = sources.labelled(source)
      found, read = setup.extract(
          variables['params'], variables['batch_stats'], source
      )
      parts += [found, labels[read]]
    found = logistic.fit_and_score(
        *parts, c.inverse_penalties, c.iterations, go_on
    )
    return found | {'test_images': len(parts[3])}

  def go_on():
    if processes.any_of(STOPPED if setup.stop() else ''):
      raise Preempted(STOPPED)

  return _evaluate(setup, path, 'logistic', classify)


def _evaluate(
    setup: Setup, path: str, name: str,
    classify: Callable[[PyTree], dict[str, Any]],
) -> dict[str, Any]:
  """Classifies with the network and, for comparison, with a random one.

  Args:
    setup: setup of the evaluation.
    path: the workdir of the evaluation.
    name: the protocol, with which the names of the results begin.
    classify: variables of a network -> 'top1', 'test_images', and more.

  Returns:
    The results by name, with the random network's accuracy as 'top1_random'.
  """
  with setup.stop.caught(SOON), setup_lib.claimed(setup, path):
    found = classify(setup.variables)
    if setup.config.encoder != RANDOM:
      found['top1_random'] = classify(setup.random())['top1']
  images = found.pop('test_images')
  return {f'{name}/{k}': v for k, v in found.items()} | {'test/images': images}
