"""Logistic regression on fixed features, fitted by L-BFGS."""

from collections.abc import Callable
from typing import Any
import warnings

import numpy as np

HOLD_OUT = 10


def fit_and_score(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray,
    test_labels: np.ndarray, inverse_penalties: tuple[float, ...],
    iterations: int, go_on: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Fits on standardised training features and classifies the test images.

  The penalty is chosen by the accuracy on every tenth training image of each
  class, which is held out; the test images play no part in it. The final fit
  uses all training images.

  Args:
    features, test_features: [N, D], [n, D].
    labels, test_labels: int [N], [n].
    inverse_penalties: the values to try for C of scikit-learn's
      LogisticRegression.
    iterations: the most iterations of L-BFGS.
    go_on: called before each fit; it may raise to stop.

  Returns:
    'top1', 'inverse_penalty', 'converged', and 'validation', the accuracy on
    the held-out training images by inverse penalty.
  """
  held = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    held[np.flatnonzero(labels == label)[HOLD_OUT - 1::HOLD_OUT]] = True
  validation = {}
  for c in inverse_penalties:
    if not held.any():  # Too few images to hold any out.
      break
    go_on()
    model, _ = fit(features[~held], labels[~held], c, iterations)
    validation[c] = float(model.score(features[held], labels[held]))
  best = inverse_penalties[len(inverse_penalties) // 2]
  if validation:
    best = max(validation, key=validation.__getitem__)
  go_on()
  model, converged = fit(features, labels, best, iterations)
  return {
      'top1': float(model.score(test_features, test_labels)),
      'inverse_penalty': best, 'converged': converged,
      'validation': {f'{c:g}': top1 for c, top1 in validation.items()},
  }


def fit(
    features: np.ndarray, labels: np.ndarray, inverse_penalty: float,
    iterations: int,
) -> tuple[Any, bool]:
  """Returns the scikit-learn Pipeline, and whether L-BFGS converged."""
  # Imported here, because it would double the start-up time of every command.
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  model = make_pipeline(
      StandardScaler(),
      LogisticRegression(C=inverse_penalty, max_iter=iterations),
  )
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', ConvergenceWarning)
    model.fit(features, labels)
  return model, not any(
      issubclass(w.category, ConvergenceWarning) for w in caught
  )
