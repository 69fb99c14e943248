"""What a step logs of its layers, against what can be computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method import monitors, optimizers
from mocov3_jax.method.build import build_method
from mocov3_jax.method.train_step import init_state, train_step

LAYERS = {'patch_embed': ('backbone', 'patch_embed'), 'head': ('projector',)}


def settings(**overrides):
  c = config_lib.default_config().optimizer
  c.update(overrides)
  return c


def test_a_burst_after_a_quiet_stretch_has_the_known_rms():
  # v is 1 before; a gradient of `size` leaves b2 + (1 - b2) size^2.
  for b2, size in (0.999, 30.0), (0.99, 5.0):
    c = settings(b2=b2, weight_decay=0.0)
    optimizer = optimizers.build(c, lambda step: 1e-3)
    monitor = monitors.updates(c, LAYERS, lambda grads: grads)
    params = {
        'backbone': {'patch_embed': {'kernel': jnp.ones((4, 3))}},
        'projector': {'kernel': jnp.ones((3, 3))},
    }
    state, seen = optimizer.init(params), []
    for step in range(60):
      large = size if step == 50 else 1.0
      grads = {
          'backbone': {'patch_embed': {'kernel': jnp.full((4, 3), large)}},
          'projector': {'kernel': jnp.ones((3, 3))},
      }
      _, state = optimizer.update(grads, state, params)
      seen.append(monitor(jnp.int32(step), grads, state, params))
    # Without bias v is exactly the mean of the squares by their weights.
    weights = b2 ** np.arange(51)
    square = (weights[1:].sum() + size**2) / weights.sum()
    quiet = [float(row['update_rms/head']) for row in seen]
    np.testing.assert_allclose(quiet, 1.0, rtol=1e-4)
    assert float(seen[50]['update_rms/patch_embed']) == pytest.approx(
        size / np.sqrt(square), rel=1e-4
    )
    assert float(seen[49]['update_rms/patch_embed']) == pytest.approx(1, 1e-4)


@functools.cache
def run_steps(count, **overrides):
  """Metrics of some steps, and the states before and after each."""
  config = tiny.config(**{
      'log.updates': True, 'log.blocks': True,
      'model.patch_embed': 'learned', **overrides,
  })
  method = build_method(config, config_lib.Plan(10, 100, 0, 1e-3))
  state = init_state(method, jax.random.key(0), (8, 8, 1))
  images = np.random.default_rng(0).integers(
      0, 256, (64, 8, 8, 1), dtype=np.uint8
  )
  step = jax.jit(lambda state: train_step(
      method, jax.random.key(1), state, images
  )[:2])
  found = []
  for _ in range(count):
    before = state
    state, metrics = step(state)
    found.append((before, metrics, state))
  return config.optimizer, found


def test_what_a_step_logs_is_what_the_update_was_made_of():
  c, found = run_steps(3)
  for number, (before, metrics, after) in enumerate(found, start=1):
    mu, nu = (optax.tree.get(after.opt_state, name) for name in ('mu', 'nu'))
    old = optax.tree.get(before.opt_state, 'mu')
    for layer, part in (
        ('patch_embed', lambda t: t['backbone']['patch_embed']),
        ('last_block', lambda t: t['backbone']['blocks_0']),
        ('projector', lambda t: t['projector']),
        ('predictor', lambda t: t['predictor']),
    ):
      flat = lambda tree, part=part: np.concatenate([
          np.ravel(np.float64(x)) for x in jax.tree.leaves(part(tree))
      ])
      g = (flat(mu) - c.b1 * flat(old)) / (1 - c.b1)
      square = flat(nu) / (1 - c.b2**number)
      mean = flat(mu) / (1 - c.b1**number)
      rms = np.sqrt(np.mean(g**2 / np.maximum(square, c.eps**2)))
      weights = flat(before.params)
      decay = c.weight_decay * np.linalg.norm(weights)
      moved = np.linalg.norm(mean / (np.sqrt(square) + c.eps))
      for name, want in (
          ('update_rms', rms), ('update_decay', decay / (decay + moved)),
          ('weight_norm', np.linalg.norm(weights)),
      ):
        assert float(metrics[f'{name}/{layer}']) == pytest.approx(
            want, rel=2e-3
        ), (name, layer, number)


@pytest.mark.parametrize(
    'scan', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_frozen_blocks_and_all_before_them_stay_as_they_are(scan):
  _, found = run_steps(2, **{
      'model.patch_embed': 'frozen', 'model.frozen_blocks': 1,
      'model.depth': 2, 'model.positions': 'learned', 'model.scan': scan,
  })
  before, (_, metrics, after) = found[0][0].params, found[-1]
  still = {'patch_embed', 'cls_token', 'pos_embed', 'blocks_0'}
  for name, old in before['backbone'].items():
    same = jax.tree.map(np.array_equal, old, after.params['backbone'][name])
    assert all(jax.tree.leaves(same)) == (name in still), name
  for layer in 'patch_embed', 'block_0':
    assert metrics[f'grad_max/{layer}'] == 0 < metrics['grad_max/last_block']
    assert f'update_rms/{layer}' not in metrics
  assert 'update_rms/last_block' in metrics
  assert 'grad_max/block_1' not in metrics  # One layer has one name.


def test_what_clips_and_what_decays_is_in_what_is_logged():
  _, [(_, every, _), *_] = run_steps(3)
  _, [(_, metrics, _)] = run_steps(1, **{
      'model.patch_embed': 'clipped', 'optimizer.patch_embed_clip': 1e-3,
      'optimizer.decay_mask': 'matrices',
  })
  # After one step v is g^2, whatever g was.
  assert float(metrics['update_rms/patch_embed']) == pytest.approx(1, rel=1e-3)
  assert metrics['update_decay/projector'] < every['update_decay/projector']


def test_they_change_nothing_else():
  _, [(_, metrics, after), *_] = run_steps(3)
  _, [(_, plain, alone)] = run_steps(1, **{'log.updates': False})
  assert plain.keys() < metrics.keys()
  for x, y in zip(
      jax.tree.leaves(after), jax.tree.leaves(alone), strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_lars_has_no_second_moment():
  with pytest.raises(UserError, match='log.updates=True needs an optimizer'):
    run_steps(1, **{'optimizer.name': 'lars'})
