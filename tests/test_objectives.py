"""Losses in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from mocov3_jax import config as config_lib
from mocov3_jax import objectives
from mocov3_jax.errors import UserError
from mocov3_jax.models import Embeddings


def embeddings(n=12, d=6, seed=0):
  k1, k2 = jax.random.split(jax.random.key(seed))
  online = Embeddings(
      features=jnp.zeros((n, 2, d)), projections=jnp.zeros((n, 2, d)),
      predictions=jax.random.normal(k1, (n, 2, d)),
  )
  target = Embeddings(
      features=jnp.zeros((n, 2, d)),
      projections=jax.random.normal(k2, (n, 2, d)),
  )
  return online, target


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize('temperature', [0.2, 1.0])
def test_moco_v3_equals_a_direct_computation(temperature):
  online, target = embeddings()
  q, k = unit(np.asarray(online.predictions)), unit(
      np.asarray(target.projections)
  )
  expected = 0.0
  for a, b in (0, 1), (1, 0):
    logits = q[:, a] @ k[:, b].T / temperature
    expected -= 2 * temperature * np.diag(log_softmax(logits, axis=1)).mean()
  loss, _ = objectives.moco_v3(online, target, temperature=temperature)
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_keys_get_no_gradient():
  online, target = embeddings()
  grad = jax.grad(
      lambda keys: objectives.moco_v3(
          online, target.replace(projections=keys), temperature=0.2
      )[0]
  )(target.projections)
  assert not np.any(grad)


def test_equal_embeddings_give_the_chance_loss():
  online, target = embeddings()
  ones = jnp.ones_like(target.projections)
  loss, metrics = objectives.moco_v3(
      online.replace(predictions=ones), target.replace(projections=ones),
      temperature=0.2,
  )
  assert float(loss) == pytest.approx(float(metrics['train/loss_chance']))
  assert float(loss) == pytest.approx(4 * 0.2 * np.log(12))


def test_perfect_predictions_are_all_correct():
  online, target = embeddings()
  swapped = target.projections[:, ::-1]
  _, metrics = objectives.moco_v3(
      online.replace(predictions=swapped), target, temperature=0.2
  )
  assert float(metrics['train/contrast_accuracy']) == 1.0


def test_feature_std_is_one_when_isotropic_and_zero_when_collapsed():
  spread = jax.random.normal(jax.random.key(0), (4000, 16))
  assert float(objectives.feature_std(spread)) == pytest.approx(1, abs=0.02)
  collapsed = jnp.ones((100, 16)) * jnp.arange(1.0, 101.0)[:, None]
  assert float(objectives.feature_std(collapsed)) == pytest.approx(0, abs=1e-5)


def test_a_zero_embedding_gives_finite_gradients():
  online, target = embeddings()
  grad = jax.grad(
      lambda q: objectives.moco_v3(
          online.replace(predictions=q), target, temperature=0.2
      )[0]
  )(jnp.zeros_like(online.predictions))
  assert np.all(np.isfinite(grad))


def test_unknown_objective_suggests_the_nearest():
  c = config_lib.default_config().objective
  with c.unlocked():
    c.name = 'mocov3'
  with pytest.raises(UserError, match="Did you mean 'moco_v3'"):
    objectives.build(c)
