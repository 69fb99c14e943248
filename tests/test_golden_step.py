"""One MoCo v3 step against the original's numbers."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mocov3_jax import objectives
from mocov3_jax.train_step import Method, TrainState, train_step

ARRAYS, META = golden.load('vit_step')


def relative(actual, expected):
  scale = np.max(np.abs(expected))
  return np.max(np.abs(np.asarray(actual) - expected)) / max(scale, 1e-30)


def keeps_gradients():
  """An optimizer that moves nothing and keeps the gradients as its state."""
  return optax.GradientTransformation(
      lambda params: params,
      lambda grads, state, params: (
          jax.tree.map(jnp.zeros_like, params), grads
      ),
  )


@pytest.fixture(scope='module')
def step():
  model = golden.tiny_vit()
  base = golden.tree(ARRAYS, 'init/', 'base_encoder')
  target = golden.tree(ARRAYS, 'init/', 'momentum_encoder')
  method = Method(
      model=model,
      objective=lambda online, key: objectives.moco_v3(
          online, key, temperature=float(ARRAYS['T'])
      ),
      optimizer=keeps_gradients(),
      augment=lambda images, key: images,
      learning_rate=lambda step: jnp.zeros(()),
      momentum=lambda step: jnp.asarray(0.9),
  )
  state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=base['params'],
      batch_stats=base['batch_stats'],
      target_params=target['params'],
      target_batch_stats=target['batch_stats'],
      opt_state=base['params'],
  )
  views = jnp.asarray(golden.views(ARRAYS['x1'], ARRAYS['x2']))
  new, metrics = jax.jit(train_step, static_argnums=0)(
      method, jax.random.key(0), state, views
  )
  online, _ = model.apply(
      base, views, train=True, mutable=['batch_stats']
  )
  keys, _ = model.apply(
      {'params': new.target_params, 'batch_stats': target['batch_stats']},
      views, train=True, mutable=['batch_stats'], method='encode',
  )
  return new, metrics, online, keys


def test_loss_equals_the_original(step):
  assert float(step[1]['train/loss']) == pytest.approx(
      float(ARRAYS['loss_f64']), rel=1e-5
  )


@pytest.mark.parametrize('view', [0, 1])
@pytest.mark.parametrize(
    'name, embedding',
    [('feat', 'features'), ('z', 'projections'), ('q', 'predictions')],
)
def test_online_embeddings_equal_the_original(step, name, embedding, view):
  actual = getattr(step[2], embedding)[:, view]
  assert relative(actual, ARRAYS[f'{name}{view + 1}']) < 1e-4


@pytest.mark.parametrize('view', [0, 1])
@pytest.mark.parametrize(
    'name, embedding', [('kfeat', 'features'), ('k', 'projections')]
)
def test_target_embeddings_equal_the_original(step, name, embedding, view):
  actual = getattr(step[3], embedding)[:, view]
  assert relative(actual, ARRAYS[f'{name}{view + 1}']) < 1e-4


def test_gradients_equal_the_original(step):
  frozen = ('backbone', 'patch_embed')
  expected = golden.tree(ARRAYS, 'grad/', 'base_encoder')['params']
  dim = expected['backbone']['norm']['bias'].shape[0]
  actual = step[0].opt_state
  for path, want in jax.tree_util.tree_leaves_with_path(expected):
    names = tuple(p.key for p in path)
    got = actual
    for name in names:
      got = got[name]
    got, want = np.asarray(got), np.asarray(want)
    if names[-2:] == ('norm', 'bias'):  # Zero but for rounding.
      assert np.max(np.abs(got)) < 1e-4
      continue
    if names[-2:] == ('qkv', 'bias'):  # The key third is, too.
      got = np.delete(got, np.s_[dim : 2 * dim])
      want = np.delete(want, np.s_[dim : 2 * dim])
    assert relative(got, want) < 2e-4, names
  for leaf in jax.tree.leaves(actual[frozen[0]][frozen[1]]):
    assert not np.any(leaf)


def test_target_averages_the_parameters_of_before_the_step(step):
  expected = golden.tree(ARRAYS, 'after/', 'momentum_encoder')['params']
  jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6),
      step[0].target_params, expected,
  )


@pytest.mark.parametrize('network', ['base_encoder', 'momentum_encoder'])
def test_running_statistics_follow_each_networks_own_batches(step, network):
  new = step[0]
  actual = {
      'base_encoder': new.batch_stats,
      'momentum_encoder': new.target_batch_stats,
  }[network]
  expected = golden.tree(ARRAYS, 'after/', network)['batch_stats']
  if network == 'base_encoder':  # `after/` holds no predictor buffers.
    actual = {k: actual[k] for k in expected}
  jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
      actual, expected,
  )


def test_evaluation_mode_uses_the_running_statistics(step):
  new = step[0]
  variables = {'params': new.params, 'batch_stats': new.batch_stats}
  x1 = jnp.asarray(golden.views(ARRAYS['x1'], ARRAYS['x1']))
  out = golden.tiny_vit().apply(variables, x1, train=False, method='encode')
  assert relative(out.features[:, 0], ARRAYS['eval_feat1']) < 1e-4
  assert relative(out.projections[:, 0], ARRAYS['eval_z1']) < 1e-4
