"""Losses in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.method import objectives, train_step
from mocov3_jax.method.build import build_method
from mocov3_jax.models import Embeddings
from mocov3_jax.models.heads import Prototypes
from mocov3_jax.parallel import sharding
from mocov3_jax.training import flops, pretrain


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
  grad = jax.jit(jax.grad(
      lambda q: objectives.moco_v3(
          online.replace(predictions=q), target, temperature=0.2
      )[0]
  ))(jnp.zeros_like(online.predictions))
  assert np.all(np.isfinite(grad))


def test_unknown_objective_suggests_the_nearest():
  c = config_lib.default_config().objective
  with c.unlocked():
    c.name = 'mocov3'
  with pytest.raises(UserError, match="Did you mean 'moco_v3'"):
    objectives.build(c)


def test_nt_xent_equals_a_direct_computation():
  online, _ = embeddings()
  z = np.asarray(online.predictions)
  views = unit(np.concatenate([z[:, 0], z[:, 1]]))  # 2N of them.
  n, total = len(z), 0.0
  for i in range(2 * n):
    others = [j for j in range(2 * n) if j != i]
    logits = np.array([views[i] @ views[j] / 0.3 for j in others])
    partner = others.index((i + n) % (2 * n))
    total -= log_softmax(logits)[partner]
  loss, metrics = objectives.simclr(online, None, temperature=0.3)
  assert float(loss) == pytest.approx(total / (2 * n), rel=1e-5)
  assert float(metrics['train/loss_chance']) == pytest.approx(
      np.log(2 * n - 1)
  )


def test_nt_xent_of_equal_views_is_at_chance():
  online, _ = embeddings()
  same = online.replace(predictions=jnp.ones_like(online.predictions))
  loss, metrics = objectives.simclr(same, None, temperature=0.1)
  assert float(loss) == pytest.approx(
      float(metrics['train/loss_chance']), rel=1e-5
  )


def test_byol_is_two_minus_two_cosines_of_each_pair():
  online, target = embeddings()
  q = unit(np.asarray(online.predictions))
  z = unit(np.asarray(target.projections))
  wanted = np.mean(
      (2 - 2 * np.sum(q[:, 0] * z[:, 1], 1))
      + (2 - 2 * np.sum(q[:, 1] * z[:, 0], 1))
  )
  loss, _ = objectives.byol(online, target)
  assert float(loss) == pytest.approx(wanted, rel=1e-5)
  assert not np.any(jax.grad(
      lambda t: objectives.byol(online, target.replace(projections=t))[0]
  )(target.projections))
  found, metrics = objectives.byol(
      online, target.replace(projections=online.predictions[:, ::-1])
  )
  assert float(found) == pytest.approx(0, abs=1e-5)
  assert float(metrics['train/contrast_accuracy']) == 1


def test_asymmetric_moco_has_one_pair_at_the_same_scale():
  online, target = embeddings()
  loss, _ = objectives.moco_v3(
      online, target, temperature=0.2, symmetric=False
  )
  one, _ = objectives.contrast(
      online.predictions[:, 0], target.projections[:, 1], 0.2
  )
  assert float(loss) == pytest.approx(2 * float(one), rel=1e-6)


METHODS = {
    'simclr': {'objective.name': 'simclr', 'head.predictor_layers': 0},
    'byol': {'objective.name': 'byol', 'head.projector_out_bn': False,
             'head.predictor_out_bn': False},
    'swav': {'objective.name': 'swav', 'head.prototypes': 16,
             'head.predictor_layers': 0,
             'head.hidden_bn': False, 'head.projector_out_bn': False},
    'queue': {'objective.queue': 200},
    'no predictor': {'head.predictor_layers': 0},
    'no BatchNorm': {'head.hidden_bn': False, 'head.projector_out_bn': False,
                     'head.predictor_out_bn': False},
    'momentum 0': {'objective.momentum': 0.0,
                   'objective.momentum_schedule': 'constant'},
}
CALM = {
    'model.dim': 32, 'head.hidden_dim': 128, 'head.out_dim': 32,
    'optimizer.lr_per_256': 1e-3,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes', [
        METHODS['swav'],
        METHODS['simclr'],
        METHODS['queue'],
        METHODS['byol'],
    ],
)
def test_every_method_takes_the_same_steps_on_eight_devices(changes):
  images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
  batch = pipeline.Batch(images, np.full(64, -1, np.int32))
  losses, before, after = {}, None, None
  for devices in 1, 8:
    c = tiny.config(**(CALM | changes))
    mesh = sharding.make_mesh(jax.devices()[:devices])
    plan = config_lib.plan(c, 1437)
    method = build_method(c, plan, devices)
    step = sharding.jit_step(*pretrain.make_step(c, method), mesh)
    state, losses[devices] = step.init(), []
    before = jax.device_get((state.params, state.target_params))
    for _ in range(4):
      state, values = step(state, sharding.to_global(batch, mesh))
      losses[devices].append(float(values['train/loss']))
      assert 0 < float(values['train/loss_chance'])
    after = jax.device_get(state.params)
  np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)
  assert ('predictor' in before[0]) == (changes != METHODS['simclr'])
  moved = after['backbone']['blocks_0']['mlp']['fc1']['kernel']
  start = before[0]['backbone']['blocks_0']['mlp']['fc1']['kernel']
  assert np.any(moved != start)


@pytest.mark.parametrize('name', ['no predictor', 'no BatchNorm', 'momentum 0'])
def test_every_ablation_of_moco_takes_a_step(name):
  c = tiny.config(**(CALM | METHODS[name]))
  method = build_method(c, config_lib.plan(c, 1437))
  state = train_step.abstract_state(method, (8, 8, 1))
  assert ('predictor' in state.params) == (name != 'no predictor')
  assert bool(state.batch_stats) == (name != 'no BatchNorm')
  key = jax.eval_shape(lambda: jax.random.key(0))
  images = jax.ShapeDtypeStruct((64, 8, 8, 1), np.uint8)
  after, values, _ = jax.eval_shape(
      lambda *a: train_step.train_step(method, *a), key, state, images
  )
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert values['train/loss'].shape == ()


@pytest.mark.slow
def test_without_a_target_network_no_keys_are_computed():
  counted = {}
  for name, changes in METHODS.items():
    c = tiny.config(**(CALM | changes))
    method = build_method(c, config_lib.plan(c, 1437))
    counted[name] = flops.step_flops(method, (8, 8, 1), 64)
  # Three passes of four through backbone and projector.
  assert counted['simclr'] < 0.8 * counted['no predictor']


def test_past_keys_are_further_negatives():
  online, target = embeddings()
  past = np.zeros((7, 6), np.float32)  # The last two are none yet.
  past[:5] = unit(np.random.default_rng(0).normal(size=(5, 6)))
  q = unit(np.asarray(online.predictions))
  k = unit(np.asarray(target.projections))
  expected = 0.0
  for a, b in (0, 1), (1, 0):
    logits = np.concatenate([q[:, a] @ k[:, b].T, q[:, a] @ past[:5].T], 1)
    expected -= 0.4 * np.diag(log_softmax(logits / 0.2, axis=1)).mean()
  loss, metrics = objectives.moco_v3(
      online, target, jnp.asarray(past), temperature=0.2
  )
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert float(metrics['train/loss_chance']) == pytest.approx(
      0.8 * np.log(12 + 5)
  )
  grad = jax.grad(
      lambda q: objectives.moco_v3(
          online.replace(predictions=q), target, jnp.asarray(past),
          temperature=0.2,
      )[0]
  )(online.predictions)
  assert np.all(np.isfinite(grad))


@pytest.mark.parametrize('symmetric, made', [(True, 24), (False, 12)])
@pytest.mark.parametrize('length', [5, 30, 72])
def test_the_queue_holds_exactly_the_last_keys(length, symmetric, made):
  past, history = jnp.zeros((length, 6)), []
  for step in range(4):
    _, target = embeddings(seed=step)
    past = objectives.remember(past, target, symmetric=symmetric)
    keys = np.asarray(target.projections)[:, 0 if symmetric else 1 :]
    history = [*unit(keys).reshape(-1, 6), *history]
  assert len(history) == 4 * made
  wanted = np.zeros((length, 6))
  wanted[: len(history)] = history[:length]
  np.testing.assert_allclose(past, wanted, atol=1e-6)


@pytest.mark.slow
def test_the_queue_of_a_run_holds_the_keys_of_its_steps():
  c = tiny.config(**(CALM | {'objective.queue': 200}))
  mesh = sharding.make_mesh(jax.devices()[:1])
  method = build_method(c, config_lib.plan(c, 1437))
  step = sharding.jit_step(*pretrain.make_step(c, method), mesh)
  images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
  batch = sharding.to_global(
      pipeline.Batch(images, np.full(64, -1, np.int32)), mesh
  )
  state, levels, queues = step.init(), [], []
  for _ in range(3):
    state, values = step(state, batch)
    levels.append(float(values['train/loss_chance']))
    queues.append(np.asarray(state.past_keys))
  # 0, 128 and then all 200 of the keys so far, beside the 64 of the batch.
  np.testing.assert_allclose(levels, 0.8 * np.log([64, 192, 264]), rtol=1e-6)
  np.testing.assert_array_equal(queues[1][128:], queues[0][:72])
  np.testing.assert_array_equal(queues[2][128:], queues[1][:72])
  np.testing.assert_allclose(np.linalg.norm(queues[2], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_codes_are_balanced(seed):
  scores = jax.random.uniform(
      jax.random.key(seed), (40, 8), minval=-1, maxval=1
  )
  codes = np.asarray(objectives.sinkhorn(scores / 0.05, 100))
  np.testing.assert_allclose(codes.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(codes.sum(0), 40 / 8, rtol=1e-2)
  # Balancing scales rows and columns: the cross-ratios stay.
  logs = np.asarray(
      objectives.sinkhorn(scores / 0.5, 50)
  )
  logs = np.log(logs) - np.asarray(scores) / 0.5
  logs -= logs.mean(0) + logs.mean(1, keepdims=True) - logs.mean()
  np.testing.assert_allclose(logs, 0, atol=1e-4)


def test_three_rounds_of_sinkhorn_equal_a_direct_computation():
  scores = np.random.default_rng(0).uniform(-1, 1, (12, 5)) / 0.05
  q = np.exp(scores)
  for _ in range(3):
    q = q / q.sum(0, keepdims=True) / 5
    q = q / q.sum(1, keepdims=True) / 12
  np.testing.assert_allclose(
      objectives.sinkhorn(jnp.asarray(scores, jnp.float32), 3), q * 12,
      rtol=2e-4, atol=1e-6,
  )


def test_swav_swaps_the_codes_of_the_views():
  scores = np.random.default_rng(1).uniform(-1, 1, (12, 2, 5))
  online, _ = embeddings()
  found, metrics = objectives.swav(
      online.replace(predictions=jnp.asarray(scores, jnp.float32)), None,
      temperature=0.1, epsilon=0.05, iterations=3,
  )
  expected = 0.0
  for v in 0, 1:
    q = np.exp(scores[:, v] / 0.05)
    for _ in range(3):
      q = q / q.sum(0, keepdims=True)
      q = q / q.sum(1, keepdims=True)
    p = log_softmax(scores[:, 1 - v] / 0.1, axis=1)
    expected -= np.mean(np.sum(q * p, axis=1))
  assert float(found) == pytest.approx(expected, rel=1e-5)
  assert float(metrics['train/loss_chance']) == pytest.approx(2 * np.log(5))


@pytest.mark.parametrize('name', ['moco_v3', 'simclr', 'byol', 'swav'])
def test_a_collapsed_network_has_the_loss_that_the_log_says(name):
  c = config_lib.default_config().objective
  c.name = name
  online, _ = embeddings()
  same = online.replace(
      predictions=jnp.ones((12, 2, 6)), projections=jnp.ones((12, 2, 6))
  )
  objective = objectives.build(c)
  loss, metrics = objective.loss(
      same, same if objective.has_target else None, ()
  )
  assert float(loss) == pytest.approx(
      float(metrics['train/loss_collapsed']), abs=1e-5
  )


def test_codes_get_no_gradient():
  scores = jax.random.uniform(jax.random.key(0), (12, 2, 5))
  online, _ = embeddings()
  loss = lambda s: objectives.swav(
      online.replace(predictions=s), None, temperature=0.1, epsilon=0.05,
      iterations=3,
  )[0]
  sinkhorn = jax.jit(objectives.sinkhorn, static_argnums=1)
  codes = [sinkhorn(scores[:, v] / 0.05, 3) for v in (0, 1)]
  fixed = lambda s: -sum(
      jnp.mean(jnp.sum(codes[v] * jax.nn.log_softmax(s[:, 1 - v] / 0.1), 1))
      for v in (0, 1)
  )
  np.testing.assert_allclose(
      jax.jit(jax.grad(loss))(scores), jax.jit(jax.grad(fixed))(scores),
      atol=1e-6,
  )


def test_prototypes_give_cosines():
  x = jax.random.normal(jax.random.key(0), (9, 6))
  module = Prototypes(4)
  params = module.init(jax.random.key(1), x, True)
  found = module.apply(params, x, True)
  kernel = np.asarray(params['params']['kernel'])
  np.testing.assert_allclose(
      found, unit(np.asarray(x)) @ unit(kernel.T).T, rtol=1e-5, atol=1e-6
  )
