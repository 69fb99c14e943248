"""One MoCo v3 step of a ViT and a ResNet against the original's numbers."""

from typing import NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mocov3_jax import models
from mocov3_jax.method import objectives
from mocov3_jax.method.train_step import Method, TrainState, train_step
from mocov3_jax.models.execution import Execution

FILES = {
    'vit_step': golden.tiny_vit(),
    'resnet_step': golden.tiny_resnet(),
}
# The same network by other implementations of attention.
CASES = {
    **{name: (name, model) for name, model in FILES.items()},
    **{
        f'vit_step {name}': ('vit_step', golden.tiny_vit(
            execution=Execution(name, keep_gelu=True)
        )) for name in ('einsum', 'pallas')
    },
}


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


class Case(NamedTuple):
  """What the original and what our step computed."""

  arrays: dict
  model: models.Network
  state: TrainState
  metrics: dict
  online: models.Embeddings
  keys: models.Embeddings


@pytest.fixture(scope='module', params=[
    pytest.param(case, marks=[pytest.mark.slow] * case.endswith('pallas'))
    for case in CASES
])
def step(request):
  file, model = CASES[request.param]
  arrays, _ = golden.load(file)
  base = golden.tree(arrays, 'init/', 'base_encoder')
  target = golden.tree(arrays, 'init/', 'momentum_encoder')
  method = Method(
      model=model,
      objective=objectives.Objective(
          lambda online, key, past: objectives.moco_v3(
              online, key, temperature=float(arrays['T'])
          ), has_target=True,
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
      past_keys=(),
  )
  views = jnp.asarray(golden.views(arrays['x1'], arrays['x2']))
  new, metrics, _ = jax.jit(train_step, static_argnums=0)(
      method, jax.random.key(0), state, views
  )
  online, _ = tiny.apply(
      model, base, views, train=True, mutable=['batch_stats']
  )
  keys, _ = tiny.apply(
      model,
      {'params': new.target_params, 'batch_stats': target['batch_stats']},
      views, train=True, mutable=['batch_stats'], method='encode',
  )
  return Case(arrays, model, new, metrics, online, keys)


def test_loss_equals_the_original(step):
  assert float(step.metrics['train/loss']) == pytest.approx(
      float(step.arrays['loss_f64']), rel=1e-5
  )


@pytest.mark.parametrize('view', [0, 1])
@pytest.mark.parametrize(
    'name, embedding',
    [('feat', 'features'), ('z', 'projections'), ('q', 'predictions')],
)
def test_online_embeddings_equal_the_original(step, name, embedding, view):
  actual = getattr(step.online, embedding)[:, view]
  assert relative(actual, step.arrays[f'{name}{view + 1}']) < 1e-4


@pytest.mark.parametrize('view', [0, 1])
@pytest.mark.parametrize(
    'name, embedding', [('kfeat', 'features'), ('k', 'projections')]
)
def test_target_embeddings_equal_the_original(step, name, embedding, view):
  actual = getattr(step.keys, embedding)[:, view]
  assert relative(actual, step.arrays[f'{name}{view + 1}']) < 1e-4


def test_gradients_equal_the_original(step):
  expected = golden.tree(step.arrays, 'grad/', 'base_encoder')['params']
  actual = step.state.opt_state
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
      dim = len(got) // 3
      got = np.delete(got, np.s_[dim : 2 * dim])
      want = np.delete(want, np.s_[dim : 2 * dim])
    if not np.any(want):  # Behind a residual branch that starts at zero.
      assert not np.any(got), names
      continue
    assert relative(got, want) < 2e-4, names
  if step.model.backbone.frozen:
    for leaf in jax.tree.leaves(actual['backbone']['patch_embed']):
      assert not np.any(leaf)


def test_target_averages_the_parameters_of_before_the_step(step):
  expected = golden.tree(step.arrays, 'after/', 'momentum_encoder')['params']
  jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6),
      step.state.target_params, expected,
  )


@pytest.mark.parametrize('network', ['base_encoder', 'momentum_encoder'])
def test_running_statistics_follow_each_networks_own_batches(step, network):
  new = step.state
  actual = {
      'base_encoder': new.batch_stats,
      'momentum_encoder': new.target_batch_stats,
  }[network]
  expected = golden.tree(step.arrays, 'after/', network)['batch_stats']
  if network == 'base_encoder':  # `after/` holds no predictor buffers.
    actual = {k: actual[k] for k in expected}
  jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
      actual, expected,
  )


def test_evaluation_mode_uses_the_running_statistics(step):
  new = step.state
  variables = {'params': new.params, 'batch_stats': new.batch_stats}
  x1 = jnp.asarray(golden.views(step.arrays['x1'], step.arrays['x1']))
  out = step.model.apply(variables, x1, train=False, method='encode')
  assert relative(out.features[:, 0], step.arrays['eval_feat1']) < 1e-4
  assert relative(out.projections[:, 0], step.arrays['eval_z1']) < 1e-4
