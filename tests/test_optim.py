"""Optimizers, masks and schedules."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method import optimizers

UNITS, UNITS_META = golden.load('optim_units')
SCHEDULES, SCHEDULES_META = golden.load('schedules')
TENSORS = ['mat', 'conv', 'vec', 'tok', 'zero_p', 'zero_g']


def settings(name):
  """config.optimizer with the hyper-parameters of the golden run."""
  c = config_lib.default_config().optimizer
  with c.unlocked():
    c.name = 'adamw' if name == 'adamw' else 'lars'
    c.weight_decay = UNITS_META[name]['weight_decay']
  return c


def find(state, kind):
  """The state of one transformation in a chain."""
  is_kind = lambda node: isinstance(node, kind)
  leaves = jax.tree.leaves(state, is_leaf=is_kind)
  return next(leaf for leaf in leaves if is_kind(leaf))


@pytest.mark.parametrize('name', ['adamw', 'lars', 'lars_wd'])
def test_ten_steps_on_given_gradients_equal_the_original(name):
  rates = jnp.asarray(UNITS[f'{name}_lr_f64'], jnp.float32)
  optimizer = optimizers.build(
      settings(name), lambda step: rates[step]
  )
  params = {t: jnp.asarray(UNITS[f'p0/{t}']) for t in TENSORS}
  state = optimizer.init(params)
  for i in range(10):
    grads = {t: jnp.asarray(UNITS[f'g/{t}'][i]) for t in TENSORS}
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for t in TENSORS:
      np.testing.assert_allclose(
          params[t], UNITS[f'{name}/{t}'][i], rtol=2e-5, atol=1e-6, err_msg=t
      )
      if name != 'adamw':
        np.testing.assert_allclose(
            find(state, optax.TraceState).trace[t],
            UNITS[f'{name}_mu/{t}'][i], rtol=2e-5, atol=1e-6, err_msg=t,
        )


@pytest.mark.parametrize('name', ['adamw', 'lars'])
def test_a_frozen_projection_is_left_alone_whatever_its_gradient(name):
  params = {
      'backbone': {
          'patch_embed': {'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)},
          'cls_token': jnp.ones((1, 1, 3)),
      }
  }
  for frozen in ('patch_embed',), ():
    optimizer = optimizers.build(settings(name), lambda step: 0.1, frozen)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    patch = jax.tree.leaves(updates['backbone']['patch_embed'])
    assert all(np.any(u) != bool(frozen) for u in patch)
    assert np.any(updates['backbone']['cls_token'])


def test_clipping_shortens_the_gradient_of_the_projection_alone():
  rng = np.random.default_rng(0)
  params = {
      'backbone': {
          'patch_embed': {'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)},
          'cls_token': jnp.ones((1, 1, 3)),
      },
      'projector': {'kernel': jnp.ones((3, 3))},
  }
  grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  c = config_lib.default_config().optimizer
  c.name = 'lars'
  c.trust_coefficient, c.weight_decay = 1.0, 0.0
  for limit in 1e-3, 1.0, 1e3:
    c.patch_embed_clip = limit
    updates = {}
    for clip in True, False:
      optimizer = optimizers.build(c, lambda step: 1.0, (), clip)
      # Biases have no trust ratio: their first update is minus the gradient.
      updates[clip], _ = optimizer.update(
          grads, optimizer.init(params), params
      )
    patch = grads['backbone']['patch_embed']
    norm = float(optax.tree.norm(patch))
    np.testing.assert_allclose(
        updates[True]['backbone']['patch_embed']['bias'],
        -patch['bias'] * min(1, limit / norm), rtol=1e-5,
    )
    np.testing.assert_array_equal(
        updates[True]['backbone']['cls_token'],
        updates[False]['backbone']['cls_token'],
    )
    np.testing.assert_array_equal(
        updates[True]['projector']['kernel'],
        updates[False]['projector']['kernel'],
    )


def test_under_adam_a_limit_evens_out_spikes_and_a_tiny_one_freezes():
  rng = np.random.default_rng(0)
  start = {'backbone': {'patch_embed': {'kernel': jnp.zeros((8, 8))}}}
  grads = rng.normal(size=(40, 8, 8)) / 8
  c = config_lib.default_config().optimizer
  c.weight_decay = 0.0

  def way(limit, spike):
    c.patch_embed_clip = limit
    optimizer = optimizers.build(c, lambda step: 1e-2, (), True)
    params, state = start, optimizer.init(start)
    for i, g in enumerate(grads):
      g = jnp.asarray(g * (spike if i == 20 else 1), jnp.float32)
      updates, state = optimizer.update(
          {'backbone': {'patch_embed': {'kernel': g}}}, state, params
      )
      params = optax.apply_updates(params, updates)
    return np.asarray(params['backbone']['patch_embed']['kernel'])

  free, spiked = way(1e9, 1), way(1e9, 30)
  np.testing.assert_allclose(way(0.1, 30), way(0.1, 1), atol=1e-5)
  assert np.linalg.norm(spiked - free) > 0.3 * np.linalg.norm(free)
  # A factor common to all steps is divided out again, down to eps.
  norm = np.linalg.norm
  assert norm(way(1e-4, 1)) == pytest.approx(norm(free), rel=0.2)
  assert norm(way(1e-10, 1)) < 0.02 * norm(free)


def test_lamb_scales_adamws_update_to_the_size_of_each_tensor():
  c = config_lib.default_config().optimizer
  c.name = 'lamb'
  rates = [0.0, 0.1, 0.05]
  optimizer = optimizers.build(
      c, lambda step: jnp.asarray(rates)[step]
  )
  rng = np.random.default_rng(0)
  params = {
      'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4),
      'zero': np.zeros(4),
  }
  ours = jax.tree.map(jnp.float32, params)
  state = optimizer.init(ours)
  m = jax.tree.map(np.zeros_like, params)
  v = jax.tree.map(np.zeros_like, params)
  for step, rate in enumerate(rates, start=1):
    grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
    updates, state = optimizer.update(
        jax.tree.map(jnp.float32, grads), state, ours
    )
    ours = optax.apply_updates(ours, updates)
    for name, g in grads.items():
      m[name] = c.b1 * m[name] + (1 - c.b1) * g
      v[name] = c.b2 * v[name] + (1 - c.b2) * g * g
      update = (m[name] / (1 - c.b1**step)) / (
          np.sqrt(v[name] / (1 - c.b2**step)) + c.eps
      ) + c.weight_decay * params[name]
      size = np.linalg.norm(params[name])
      trust = size / np.linalg.norm(update) if size else 1.0
      params[name] = params[name] - rate * trust * update
  for name, want in params.items():
    np.testing.assert_allclose(ours[name], want, rtol=1e-4, atol=1e-6)


def test_decay_mask_matrices_spares_biases_norms_and_tokens():
  c = settings('adamw')
  with c.unlocked():
    c.decay_mask = 'matrices'
  params = {
      'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3),
      'cls_token': jnp.ones((1, 1, 3)), 'pos_embed': jnp.ones((1, 5, 3)),
  }
  optimizer = optimizers.build(c, lambda step: 0.1)
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(
      updates['kernel'], -0.1 * c.weight_decay * params['kernel'], rtol=1e-6
  )
  for name in 'bias', 'cls_token', 'pos_embed':
    assert not np.any(updates[name]), name


@pytest.mark.parametrize(
    'name', [n for n in SCHEDULES_META['configs'] if 'lincls' not in n]
)
def test_schedules_equal_the_original(name):
  cfg = SCHEDULES_META['configs'][name]
  per_epoch = cfg['iters_per_epoch']
  total = cfg['epochs'] * per_epoch
  rate = optimizers.warmup_cosine(
      cfg['lr'], cfg['warmup_epochs'] * per_epoch, total
  )
  momentum = optimizers.cosine_momentum(cfg['moco_m'], total)
  step = SCHEDULES[f'{name}/epoch_f64'] * per_epoch
  with jax.enable_x64(True):
    x = jnp.asarray(step, jnp.float64)
    np.testing.assert_allclose(
        rate(x), SCHEDULES[f'{name}/lr_f64'], rtol=1e-9, atol=1e-15
    )
    np.testing.assert_allclose(
        momentum(x), SCHEDULES[f'{name}/m_f64'], rtol=1e-12
    )
  x = jnp.asarray(np.round(step), jnp.int32)
  np.testing.assert_allclose(
      rate(x), SCHEDULES[f'{name}/lr_f64'], rtol=1e-3, atol=1e-6 * cfg['lr']
  )


def test_learning_rate_starts_at_exactly_zero_and_peaks_after_warmup():
  rate = optimizers.warmup_cosine(2.0, warmup_steps=10, total_steps=30)
  values = [float(rate(jnp.asarray(s))) for s in range(30)]
  assert values[0] == 0.0 and values[10] == 2.0
  assert values[:11] == sorted(values[:11])
  assert values[10:] == sorted(values[10:], reverse=True)
  assert float(rate(jnp.asarray(30))) == 0.0


def test_schedule_without_warmup_starts_at_the_peak():
  rate = optimizers.warmup_cosine(2.0, warmup_steps=0, total_steps=4)
  assert float(rate(jnp.asarray(0))) == 2.0


def test_constant_momentum_is_constant():
  momentum = optimizers.constant_momentum(0.99, 100)
  values = {float(momentum(jnp.asarray(s))) for s in (0, 50, 99)}
  assert values == {float(np.float32(0.99))}


@pytest.mark.parametrize(
    'field, value', [('name', 'adam'), ('decay_mask', 'matrix')]
)
def test_an_unknown_name_suggests_the_nearest(field, value):
  c = config_lib.default_config().optimizer
  with c.unlocked():
    c[field] = value
  with pytest.raises(UserError, match=rf'optimizer.{field}=.*Did you mean'):
    optimizers.build(c, lambda step: 0.1)


def test_update_clip_is_stable_adamw():
  # Wortsman et al. 2023, algorithm 2, in float64.
  c = settings('adamw')
  with c.unlocked():
    c.update_clip, c.b1, c.b2 = 1.0, 0.9, 0.99
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}
  ours = jax.tree.map(jnp.float32, params)
  optimizer = optimizers.build(c, lambda step: 0.1)
  state = optimizer.init(ours)
  m, v = ({n: np.zeros_like(p) for n, p in params.items()} for _ in 'mv')
  largest = 0.0
  for step in range(1, 200):
    # A burst of one tensor, after a quiet stretch.
    size = {'kernel': 30.0 if 150 <= step < 153 else 1.0, 'bias': 1.0}
    grads = {n: rng.normal(size=p.shape) * size[n] for n, p in params.items()}
    updates, state = optimizer.update(
        jax.tree.map(jnp.float32, grads), state, ours
    )
    ours = optax.apply_updates(ours, updates)
    for name, g in grads.items():
      m[name] = c.b1 * m[name] + (1 - c.b1) * g
      v[name] = c.b2 * v[name] + (1 - c.b2) * g**2
      square = v[name] / (1 - c.b2**step)
      rms = np.sqrt(np.mean(g**2 / np.maximum(square, c.eps**2)))
      largest = max(largest, rms)
      params[name] -= 0.1 / max(1.0, rms) * (
          m[name] / (1 - c.b1**step) / (np.sqrt(square) + c.eps)
          + c.weight_decay * params[name]
      )
  assert largest > 5  # Else the bound would have done nothing.
  for name, want in params.items():
    np.testing.assert_allclose(ours[name], want, rtol=1e-4, atol=1e-5)


def test_a_bound_that_is_not_reached_changes_nothing():
  rng = np.random.default_rng(0)
  params = {'kernel': jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
  found = []
  for bound in 0.0, 1e3:
    c = settings('adamw')
    with c.unlocked():
      c.update_clip = bound
    optimizer = optimizers.build(c, lambda step: 0.1, False)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    found.append(updates['kernel'])
  np.testing.assert_array_equal(*found)


def test_the_bound_of_the_update_is_of_adamw():
  c = settings('lars')
  with c.unlocked():
    c.update_clip = 1.0
  with pytest.raises(UserError, match='update_clip=1.0 applies only to AdamW'):
    optimizers.build(c, lambda step: 0.1, False)
