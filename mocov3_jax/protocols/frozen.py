"""The protocols that train nothing: kNN and logistic regression."""

from typing import Any

import jax
import numpy as np

from mocov3_jax.data import sources
from mocov3_jax.evals import knn, logistic
from mocov3_jax.protocols import setup as setup_lib
from mocov3_jax.protocols.setup import Setup


def evaluate_knn(setup: Setup, path: str) -> dict[str, Any]:
  """Classifies by weighted nearest neighbours, for all k and temperatures."""
  with setup_lib.claimed(setup, path):
    found = knn.table(
        setup.config.knn, setup.extract, setup.splits, setup.mesh,
        setup.variables['params'], setup.variables['batch_stats'],
    )
  images = found.pop('test_images')
  return {f'knn/{k}': v for k, v in found.items()} | {'test/images': images}


def evaluate_logistic(setup: Setup, path: str) -> dict[str, Any]:
  """Fits logistic regression on the features of whole images."""
  c = setup.config.logistic
  with setup_lib.claimed(setup, path):
    parts = []
    for source in setup.splits.train, setup.splits.test:
      source, labels = sources.labelled(source)
      found, read = setup.extract(
          setup.variables['params'], setup.variables['batch_stats'], source
      )
      parts += [np.asarray(jax.device_get(found)), labels[read]]
    result = logistic.fit_and_score(*parts, c.inverse_penalties, c.iterations)
  return {f'logistic/{k}': v for k, v in result.items()} | {
      'test/images': len(parts[3])
  }
