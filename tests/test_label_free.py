"""Alignment, uniformity and effective rank on features with known answers."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from mocov3_jax.evals import label_free


def test_alignment_is_the_squared_distance_of_unit_vectors():
  x = jnp.asarray([[3.0, 0.0], [0.0, 2.0]])
  assert label_free.alignment(x, 5 * x) == 0
  assert label_free.alignment(x, -x) == 4
  assert label_free.alignment(x, x[::-1]) == pytest.approx(2)


def test_uniformity_equals_a_sum_over_pairs():
  x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  expected = np.log(np.mean(np.exp(-2 * pdist(unit, 'sqeuclidean'))))
  assert label_free.uniformity(jnp.asarray(x)) == pytest.approx(
      expected, abs=1e-5
  )


def test_uniformity_of_a_collapse_is_zero():
  x = jnp.ones((10, 4))
  assert label_free.uniformity(x) == pytest.approx(0, abs=1e-5)


def test_effective_rank_of_orthogonal_and_of_parallel_rows():
  assert label_free.effective_rank(jnp.eye(6)) == pytest.approx(6, rel=1e-5)
  assert label_free.effective_rank(jnp.ones((6, 3))) == pytest.approx(
      1, abs=1e-3
  )
  # Singular values 3 and 1: shares 3/4 and 1/4.
  x = jnp.diag(jnp.asarray([3.0, 1.0]))
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  assert label_free.effective_rank(x) == pytest.approx(
      np.exp(entropy), rel=1e-5
  )


def test_features_that_are_all_zero_have_numbers():
  zero = jnp.zeros((6, 3))
  assert label_free.effective_rank(zero) == 1
  assert label_free.alignment(zero, zero) == 0
  assert jnp.isfinite(label_free.uniformity(zero))
