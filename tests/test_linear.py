"""The linear probe: the original's numbers, and a sweep as separate runs."""

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mocov3_jax.config import evaluation
from mocov3_jax.method import augment, optimizers
from mocov3_jax.models.layers import BatchNorm
from mocov3_jax.protocols import linear_step

ARRAYS, META = golden.load('lincls_vit')


def probe_of(rates, schedule, features=None, norm=None):
  return linear_step.Probe(
      features=features or (lambda frozen, images, key: images),
      optimizer=linear_step.build_optimizer(rates, schedule, 0.9),
      rates=jnp.asarray(rates), learning_rate=schedule, norm=norm,
  )


def test_ten_steps_equal_the_originals():
  epochs, per_epoch = META['epochs'], 2
  schedule = optimizers.cosine_by_epochs(
      META['batch'] / 256, per_epoch, epochs * per_epoch
  )
  model = golden.tiny_vit()
  frozen = golden.tree(
      {f'base_encoder.{n.removeprefix("pre/")}': a for n, a in ARRAYS.items()},
      '', 'base_encoder',
  )
  probe = probe_of(
      (META['base_lr'],), schedule,
      jax.jit(lambda frozen, images, key: model.apply(
          frozen, images, train=False, method='features'
      )),
  )
  state = linear_step.init_state(probe, jax.random.key(0), 1, 64, 10)
  state = state.replace(params={
      'kernel': jnp.asarray(ARRAYS['head/weight0'].T)[None],
      'bias': jnp.asarray(ARRAYS['head/bias0'])[None],
  })
  step = jax.jit(
      lambda state, x, y: linear_step.probe_step(
          probe, frozen, jax.random.key(0), state, x, y
      )
  )
  for i in range(10):
    x = ARRAYS['x_int8'][i].astype(np.float32) * ARRAYS['x_scale']
    x = x.transpose(0, 2, 3, 1)
    features = probe.features(frozen, x, None)
    largest = np.abs(ARRAYS['feat'][i]).max()
    np.testing.assert_allclose(
        features, ARRAYS['feat'][i], atol=1e-4 * largest
    )
    state, values = step(state, x, ARRAYS['target'][i])
    np.testing.assert_allclose(
        values['train/loss'], ARRAYS['loss'][i], rtol=1e-5
    )
    np.testing.assert_allclose(
        values['train/lr'], ARRAYS['lr_f64'][i], rtol=1e-6
    )
    for name, ours in ('weight', state.params['kernel'][0].T), (
        'bias', state.params['bias'][0]
    ):
      wanted = ARRAYS[name][i]
      np.testing.assert_allclose(
          ours, wanted, atol=5e-5 * np.abs(wanted).max()
      )


@pytest.mark.parametrize('name', ['lincls_vit', 'lincls_r50'])
def test_the_rate_is_the_originals_in_every_epoch(name):
  arrays, meta = golden.load('schedules')
  row = meta['configs'][name]
  schedule = optimizers.cosine_by_epochs(row['init_lr'], 7, 7 * row['epochs'])
  for epoch, rate in zip(
      arrays[f'{name}/epoch_f64'], arrays[f'{name}/lr_f64'], strict=True
  ):
    for step in int(epoch) * 7, int(epoch) * 7 + 6:
      assert float(schedule(step)) == pytest.approx(
          rate, abs=1e-6 * row['init_lr']
      )


@pytest.mark.parametrize('norm', [None, BatchNorm(affine=False)])
def test_a_sweep_at_once_equals_separate_runs(norm):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(5, 12))
  rates = (0.1, 1.0, 30.0)
  schedule = optimizers.cosine_by_epochs(0.5, 4, 40)

  def train(rates):
    probe = probe_of(rates, schedule, norm=norm)
    state = linear_step.init_state(probe, jax.random.key(1), len(rates), 12, 5)
    step = jax.jit(
        lambda state, x, y: linear_step.probe_step(
            probe, None, jax.random.key(0), state, x, y
        )[0]
    )
    draw = np.random.default_rng(3)
    for _ in range(40):
      y = draw.integers(0, 5, 32)
      x = centres[y] + draw.normal(size=(32, 12))
      state = step(state, x.astype(np.float32), y)
    return state

  together = train(rates)
  for i, rate in enumerate(rates):
    alone = train((rate,))
    for name in 'kernel', 'bias':
      wanted = np.asarray(alone.params[name][0])
      np.testing.assert_allclose(
          together.params[name][i], wanted, atol=1e-5 * np.abs(wanted).max()
      )


@pytest.mark.slow
def test_images_without_a_label_count_for_nothing():
  schedule = optimizers.cosine_by_epochs(0.5, 4, 40)
  probe = probe_of((1.0,), schedule)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 6)).astype(np.float32)
  y = np.arange(8) % 3

  def step(x, y):
    state = linear_step.init_state(probe, jax.random.key(1), 1, 6, 3)
    return linear_step.probe_step(probe, None, jax.random.key(0), state, x, y)

  y[5:] = -1
  (some, values), (few, wanted) = step(x, y), step(x[:5], y[:5])
  np.testing.assert_allclose(
      values['train/loss'], wanted['train/loss'], rtol=1e-6
  )
  np.testing.assert_allclose(
      some.params['kernel'], few.params['kernel'], atol=1e-6
  )


def test_a_head_that_diverges_leaves_the_others_alone():
  schedule = optimizers.cosine_by_epochs(1.0, 4, 40)
  probe = probe_of((0.1, 1e30), schedule)
  state = linear_step.init_state(probe, jax.random.key(1), 2, 6, 3)
  x = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
  y = np.arange(9) % 3
  step = jax.jit(lambda state: linear_step.probe_step(
      probe, None, jax.random.key(0), state, x, y
  ))
  for _ in range(30):
    state, values = step(state)
  assert np.isfinite(values['train/loss'])
  assert np.isfinite(state.params['kernel'][0]).all()
  assert linear_step.predict(probe, state, jnp.asarray(x)).shape == (2, 9)


def test_probes_see_crops_and_flips_alone():
  c = evaluation.eval_config()
  view = jax.jit(augment.build((c.view,), tiny.config().data))
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
  made = view(images, jax.random.key(0))
  assert made.shape == (4, 1, 8, 8, 1)
  # No pixel is darker or lighter than in the image: nothing is recoloured.
  normal = (images / 255 - 0.305) / 0.376
  for one, image in zip(np.asarray(made), normal, strict=True):
    assert image.min() - 1e-4 <= one.min() and one.max() <= image.max() + 1e-4


def test_the_batchnorm_before_the_heads_has_no_parameters():
  norm = BatchNorm(affine=False)
  assert isinstance(norm, nn.Module)
  probe = probe_of((1.0,), optimizers.cosine_by_epochs(1.0, 4, 40), norm=norm)
  state = linear_step.init_state(probe, jax.random.key(1), 1, 6, 3)
  assert set(state.params) == {'kernel', 'bias'}
  assert set(state.batch_stats) == {'mean', 'var'}
