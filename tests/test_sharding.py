"""The same numbers on any number of devices; one compilation."""

import jax
import numpy as np
import pytest
import tiny

from mocov3_jax import config as config_lib
from mocov3_jax import loop, sharding, train
from mocov3_jax.data import pipeline


def run_steps(config, devices, steps=10):
  """Runs the real step on the first `devices`; returns (step_fn, metrics)."""
  mesh = sharding.make_mesh(jax.devices()[:devices])
  splits = train.load_source(config)
  plan = config_lib.plan(config, len(splits.train))
  method = train.build_method(config, plan)
  init, step_fn = train.compile_functions(config, method, mesh)
  reader = train.make_reader(
      config, splits.train, sharding.local_positions(mesh, config.batch_size)
  )
  history = []
  start = init()
  first = jax.device_get(start.params)
  batches = pipeline.train_batches(reader, 0, steps, 2)
  state, done = loop.run(
      start, step_fn, (sharding.to_global(b, mesh) for b in batches),
      start=0, stop=steps, log=lambda step, values: history.append(values),
  )
  assert done == steps
  return step_fn, history, first, jax.device_get(state)


def test_eight_devices_give_the_losses_of_one():
  # Wider heads and a lower rate than elsewhere: in a very small network a
  # ReLU that flips under rounding parts the losses by 1e-3 within ten steps.
  config = tiny.config(**{
      'model.dim': 32, 'head.hidden_dim': 128, 'head.out_dim': 32,
      'optimizer.lr_per_256': 1e-3,
  })
  _, one, _, _ = run_steps(config, 1)
  step_fn, eight, _, _ = run_steps(config, 8)
  for name in 'train/loss', 'grad_norm/global', 'train/feature_std':
    np.testing.assert_allclose(
        [m[name] for m in one], [m[name] for m in eight], rtol=1e-5
    )
  # The loop, which forbids implicit transfers, compiled the step once.
  assert step_fn._cache_size() == 1


@pytest.mark.parametrize('patch_embed', ['frozen', 'learned'])
def test_only_a_learned_projection_moves_in_fifty_steps(patch_embed):
  config = tiny.config(**{
      'model.patch_embed': patch_embed, 'optimizer.weight_decay': 0.5,
      'optimizer.lr_per_256': 1e-2,
  })
  _, history, first, state = run_steps(config, 1, steps=50)
  same = [
      np.array_equal(a, b)
      for params in (state.params, state.target_params)
      for a, b in zip(
          jax.tree.leaves(first['backbone']['patch_embed']),
          jax.tree.leaves(params['backbone']['patch_embed']), strict=True,
      )
  ]
  frozen = patch_embed == 'frozen'
  assert all(s == frozen for s in same)
  assert not np.array_equal(
      first['backbone']['cls_token'], state.params['backbone']['cls_token']
  )
  assert all((m['grad_max/patch_embed'] == 0) == frozen for m in history)
  assert all(m['grad_max/last_block'] > 0 for m in history)


def test_a_step_reports_what_a_study_of_stability_needs():
  _, history, _, _ = run_steps(tiny.config(), 1, steps=2)
  assert history[0]['train/lr'] == 0.0 < history[1]['train/lr']
  assert history[0]['train/momentum'] == pytest.approx(0.99)
  assert history[0]['train/loss_chance'] == pytest.approx(0.8 * np.log(64))


def test_lars_runs_through_the_same_step():
  config = tiny.config(**{
      'optimizer.name': 'lars', 'optimizer.lr_per_256': 0.3,
      'optimizer.weight_decay': 1e-6,
  })
  _, history, _, _ = run_steps(config, 1, steps=3)
  assert np.isfinite([m['train/loss'] for m in history]).all()


@pytest.mark.parametrize('devices', [1, 2, 8])
def test_one_process_holds_every_place_of_the_batch(devices):
  mesh = sharding.make_mesh(jax.devices()[:devices])
  positions = sharding.local_positions(mesh, 16)
  np.testing.assert_array_equal(positions, np.arange(16))
  batch = np.arange(16)[:, None]
  array = sharding.to_global(batch, mesh)
  np.testing.assert_array_equal(array, batch)
  assert len(array.sharding.device_set) == devices
