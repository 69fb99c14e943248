"""The kNN classifier against scikit-learn."""

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mocov3_jax.data import sources
from mocov3_jax.evals import knn


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def classify(queries, bank, labels, classes, k, temperature, **options):
  """The votes of each query's neighbours."""
  similarity, index = knn.nearest(
      jnp.asarray(queries), jnp.asarray(bank), k, **options
  )
  return knn.count_votes(
      similarity, jnp.asarray(labels)[index], num_classes=classes,
      temperature=temperature,
  )


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
  votes = classify(queries, bank, labels, 7, k, temperature)
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
  assert knn.capped_k(200, n, classes) == expected


def test_images_without_label_or_that_cannot_be_read_are_left_out():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(30, 4)).astype(np.float32)
  labels = np.repeat(np.arange(2, dtype=np.int32), 15)
  labels[::5] = -1
  source = sources.ArraySource(
      'x', np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1), labels, 2
  )
  asked = []

  def extract(params, batch_stats, part):
    numbers = np.array([part.read(i).item() for i in range(len(part))])
    readable = np.flatnonzero(numbers != 7)
    asked.append(numbers[readable])
    # The label itself is the feature: each finds its own class.
    return jnp.asarray(
        np.eye(2)[labels[numbers[readable]]] + 0.01 * features[0, :2]
    ), readable

  c = ConfigDict(
      {'k': 3, 'temperature': 0.1, 'bank_images': 0, 'query_images': 0}
  )
  evaluate = knn.build(c, extract, sources.Splits(source, source, source))
  assert evaluate(None, None)['knn/top1'] == 1.0
  for numbers in asked:
    assert numbers.tolist() == [
        i for i in range(30) if i % 5 and i != 7
    ]
