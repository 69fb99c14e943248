"""The same numbers on any number of devices; one compilation."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from mocov3_jax import evals, models
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.evals.evaluator import EvalContext
from mocov3_jax.method import train_step
from mocov3_jax.method.build import build_method
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import sharding
from mocov3_jax.training import loop, pretrain


def run_steps(config, devices, steps=10):
  """Runs the real step on the first `devices`; returns (step, metrics)."""
  mesh = sharding.make_mesh(jax.devices()[:devices], config.fsdp_devices)
  splits = pretrain.load_splits(config)
  plan = config_lib.plan(config, len(splits.train))
  execution = models.execution_on(mesh, config.model, config.data.image_size)
  method = build_method(config, plan, mesh.size, execution)
  step = sharding.jit_step(*pretrain.make_step(config, method), mesh)
  reader = pretrain.make_reader(
      config, splits.train, sharding.local_positions(mesh, config.batch_size)
  )
  history = []
  start = step.init()
  first = jax.device_get(start.params)
  batches = pipeline.train_batches(reader, 0, steps, 2)
  state, done = loop.run(
      start, step, (sharding.to_global(b, mesh) for b in batches),
      start=0, stop=steps, log=lambda step, values: history.append(values),
  )
  assert done == steps
  return step, history, first, jax.device_get(state)


# Wider heads and a lower rate than elsewhere: in a very small network a ReLU
# that flips under rounding parts the losses by 1e-3 within ten steps.
CALM = {
    'model.dim': 32, 'head.hidden_dim': 128, 'head.out_dim': 32,
    'optimizer.lr_per_256': 1e-3,
    'objective.queue': 256,
    **tiny.COLOUR,
}


@pytest.fixture(scope='module')
def one_device():
  _, history, _, state = run_steps(tiny.config(**CALM), 1)
  return history, state


@pytest.mark.parametrize(
    'devices, changes',
    [
        pytest.param(8, {}, marks=pytest.mark.slow),
        pytest.param(8, {'fsdp_devices': 8}, marks=pytest.mark.slow),
        (8, {'fsdp_devices': 2, 'micro_batch': 4}),
        pytest.param(1, {'micro_batch': 16}, marks=pytest.mark.slow),
        *(
            pytest.param(8, changes | {'model.attention': name},
                         marks=pytest.mark.slow)
            for name in ('einsum', 'pallas')
            for changes in ({}, {'fsdp_devices': 2, 'micro_batch': 4})
        ),
    ],
    ids=[
        'data', 'fsdp', 'data fsdp passes', 'passes', 'data, einsum',
        'data fsdp passes, einsum', 'data, pallas',
        'data fsdp passes, pallas',
    ],
)
def test_losses_do_not_depend_on_devices_or_passes(
    one_device, monkeypatch, devices, changes
):
  monkeypatch.setattr(sharding, 'SMALL', 2**8)  # Small tensors split as well.
  config = tiny.config(**(CALM | changes))
  step, history, _, _ = run_steps(config, devices)
  # Rounding grows over the steps, in the loss least of all.
  for name, tolerance in (
      ('train/loss', 1e-5), ('grad_norm/global', 1e-4),
      ('train/feature_std', 1e-4),
  ):
    np.testing.assert_allclose(
        [m[name] for m in one_device[0]], [m[name] for m in history],
        rtol=tolerance, err_msg=name,
    )
  # The loop, which forbids implicit transfers, compiled the step once.
  assert step.jitted_step._cache_size() == 1


def test_fsdp_splits_the_large_tensors_alone():
  mesh = sharding.make_mesh(fsdp=4)
  state = {
      'matrix': jax.ShapeDtypeStruct((256, 1024), np.float32),
      'tall': jax.ShapeDtypeStruct((4096, 6), np.float32),
      'small': jax.ShapeDtypeStruct((64,), np.float32),
      'odd': jax.ShapeDtypeStruct((333, 333), np.float32),
  }
  spec = {k: v.spec for k, v in sharding.state_sharding(mesh, state).items()}
  P = jax.sharding.PartitionSpec
  assert spec == {
      'matrix': P(None, 'fsdp'), 'tall': P('fsdp', None), 'small': P(),
      'odd': P(),
  }


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_step_reports_what_a_study_of_stability_needs():
  _, history, _, _ = run_steps(tiny.config(), 1, steps=2)
  assert history[0]['train/lr'] == 0.0 < history[1]['train/lr']
  assert history[0]['train/momentum'] == pytest.approx(0.99)
  assert history[0]['train/loss_chance'] == pytest.approx(0.8 * np.log(64))


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_gradient_in_passes_is_that_of_the_whole_batch():
  views = jax.random.normal(jax.random.key(1), (64, 2, 8, 8, 1))
  grads = []
  for micro_batch in 0, 8:
    config = tiny.config(micro_batch=micro_batch, **CALM)
    method = build_method(config, config_lib.plan(config, 1437))
    state = train_step.init_state(method, jax.random.key(0), (8, 8, 1))

    def loss(params, method=method, state=state):
      online, _ = method.model.apply(
          {'params': params, 'batch_stats': state.batch_stats}, views,
          train=True, mutable=['batch_stats'],
      )
      # Keys that are other images' projections, so that nothing is zero.
      keys = online.replace(projections=online.projections[::-1])
      return method.objective.loss(online, keys, ())[0]

    grads.append(jax.device_get(jax.jit(jax.grad(loss))(state.params)))
  whole, parts = (jax.tree_util.tree_leaves_with_path(g) for g in grads)
  largest = max(np.abs(g).max() for _, g in whole)
  for (path, wanted), (_, found) in zip(whole, parts, strict=True):
    # Of gradients that are zero but for rounding, relative to the largest.
    size = max(np.abs(wanted).max(), 1e-2 * largest)
    np.testing.assert_allclose(
        found, wanted, atol=1e-5 * size, err_msg=str(path)
    )


@pytest.mark.slow
@pytest.mark.parametrize('labels', [True, False])
def test_monitors_take_no_more_at_once_than_a_pass_does(labels):
  at_once, results = [], []

  def watch(call, args, kwargs, context):
    if isinstance(context.module, ViT) and context.method_name == '__call__':
      at_once.append(len(args[0]))
    return call(*args, **kwargs)

  for micro_batch in 0, 2:
    config = tiny.config(micro_batch=micro_batch)
    splits = pretrain.load_splits(config)
    if not labels:
      splits = dataclasses.replace(splits, test=None)
    mesh = sharding.make_mesh(jax.devices()[:4])
    plan = config_lib.plan(config, len(splits.train))
    method = build_method(config, plan, mesh.size)
    reader = pretrain.make_reader(config, splits.train, np.arange(64))
    state = train_step.init_state(method, jax.random.key(0), (8, 8, 1))
    (monitor,) = evals.build_evaluators(EvalContext(
        config, method.model, method.augment, splits, mesh, reader
    ))
    at_once.clear()
    with nn.intercept_methods(watch):
      results.append(monitor.measure(state))
  assert 0 < max(at_once) <= 2 * 2 * 4  # Two views, two images, four devices.
  assert results[0] == pytest.approx(results[1], rel=1e-4)
