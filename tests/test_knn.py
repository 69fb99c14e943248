"""The kNN classifier against scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mocov3_jax.data.sources import Source
from mocov3_jax.evals import knn


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize('k', [1, 5, 20, 200])
@pytest.mark.parametrize('temperature', [0.07, 0.5])
def test_votes_equal_scikit_learns_weighted_knn(k, temperature):
  rng = np.random.default_rng(k)
  labels = rng.integers(0, 7, 700)
  centres = rng.normal(size=(7, 64))
  bank = (centres[labels] + 2 * rng.normal(size=(700, 64))).astype(np.float32)
  query_labels = rng.integers(0, 7, 300)
  queries = centres[query_labels] + 2 * rng.normal(size=(300, 64))
  queries = queries.astype(np.float32)
  # On the unit sphere |a - b|^2 = 2 - 2 cosine.
  reference = KNeighborsClassifier(
      k, algorithm='brute',
      weights=lambda d: np.exp((1 - d**2 / 2) / temperature),
  ).fit(unit(bank), labels)
  votes = knn.neighbour_votes(
      jnp.asarray(queries), jnp.asarray(bank), jnp.asarray(labels),
      num_classes=7, k=k, temperature=temperature,
  )
  shares = votes / votes.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(
      shares, reference.predict_proba(unit(queries)), atol=1e-4
  )
  np.testing.assert_array_equal(
      np.argmax(votes, axis=1), reference.predict(unit(queries))
  )


@pytest.mark.parametrize(
    'n, classes, expected', [(1_281_167, 1000, 200), (1437, 10, 23), (8, 4, 1)]
)
def test_k_is_capped_on_small_banks(n, classes, expected):
  bank = Source(np.zeros((n, 1), np.uint8), np.zeros(n, np.int32), classes)
  assert knn.capped_k(200, bank) == expected
