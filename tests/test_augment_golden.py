"""The photometric operations and both pipelines against the original's.

The original works on bytes, and rounds after every operation; here pixels are
floats. Hence the tolerances in bytes.
"""

import colorsys
import functools
import itertools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mocov3_jax.config import training as config_lib
from mocov3_jax.data import crops
from mocov3_jax.method import augment, image_ops

ARRAYS, META = golden.load('augment')
IMAGE = jnp.asarray(ARRAYS['img'], jnp.float32) / 255
CONFIG = config_lib.default_config()


def factors(op):
  return sorted(k.split('/')[1] for k in ARRAYS if k.startswith(f'{op}/'))


def in_bytes(image):
  return 255 * np.asarray(image)


def check(actual, expected, largest):
  error = np.abs(in_bytes(actual) - expected.astype(np.float32))
  assert error.max() <= largest


@pytest.mark.parametrize(
    'op, name, factor',
    [
        (op, name, factor)
        for op, name in enumerate(('brightness', 'contrast', 'saturation'))
        for factor in factors(name)
    ],
)
def test_blends(op, name, factor):
  actual = image_ops.blend(IMAGE, jnp.asarray(op), float(factor))
  check(actual, ARRAYS[f'{name}/{factor}'], 1.5)


@pytest.mark.parametrize('shift', factors('hue'))
def test_hue(shift):
  actual = np.asarray(image_ops.shift_hue(IMAGE, float(shift)))
  # The original's hue is a byte: 255 steps round the circle, so that even a
  # shift of 0 moves single pixels by up to 4. The mean tells the same hue.
  assert np.abs(in_bytes(actual) - ARRAYS[f'hue/{shift}']).mean() <= 1
  # Without that rounding, Python's own conversion is the reference.
  for pixel, got in zip(
      np.asarray(IMAGE)[::7, ::7].reshape(-1, 3),
      actual[::7, ::7].reshape(-1, 3), strict=True,
  ):
    h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
    want = colorsys.hsv_to_rgb((h + float(shift)) % 1, s, v)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gray_solarize_and_flip():
  gray = jnp.broadcast_to(image_ops.gray(IMAGE), IMAGE.shape)
  check(gray, ARRAYS['gray'], 1.5)
  check(image_ops.solarize(IMAGE), ARRAYS['solarize'], 0.01)
  check(IMAGE[:, ::-1], ARRAYS['hflip'], 0.01)


@pytest.mark.parametrize('sigma', factors('blur'))
def test_blur_is_near_pils_and_equal_to_a_gaussian(sigma):
  actual = image_ops.blur(IMAGE, float(sigma))
  if sigma != '0.3':
    # There PIL's three boxes keep the variance, which a Gaussian sampled at
    # whole pixels does not: 1.5 on average.
    error = np.abs(in_bytes(actual) - ARRAYS[f'blur/{sigma}'])
    assert error.mean() <= 1
  reference = ndimage.gaussian_filter(
      np.asarray(IMAGE), (float(sigma), float(sigma), 0), mode='nearest',
      truncate=8 / float(sigma),
  )
  np.testing.assert_allclose(actual, reference, atol=1e-3)


@pytest.mark.parametrize(
    'key', [k for k in ARRAYS if k.startswith('crop/') and 'bilinear' in k]
)
def test_crops(key):
  _, index, _, size = key.split('/')
  box = tuple(jnp.asarray(ARRAYS['crop_boxes'][int(index)], jnp.float32))
  source = jnp.asarray(ARRAYS['src'], jnp.float32) / 255
  actual = image_ops.resample(source, box, int(size))
  error = np.abs(in_bytes(actual) - ARRAYS[key])
  assert error.mean() <= 2


def host_crop(box, size):
  """The same on the host, whole pixels."""
  top, left, height, width = (int(v) for v in box)
  out = np.empty((size, size, 3), np.uint8)
  crops.resize(
      np.ascontiguousarray(ARRAYS['src'])[top:top + height, left:left + width],
      out,
  )
  return out


@pytest.mark.parametrize(
    'key', [k for k in ARRAYS if k.startswith('crop/') and 'bilinear' in k]
)
def test_crops_on_the_host(key):
  _, index, _, size = key.split('/')
  actual = host_crop(ARRAYS['crop_boxes'][int(index)], int(size))
  error = np.abs(actual.astype(np.float32) - ARRAYS[key])
  assert error.mean() <= 2


def test_normalisation():
  actual = image_ops.normalise(IMAGE, CONFIG.data)
  np.testing.assert_allclose(
      actual, ARRAYS['norm'].transpose(1, 2, 0), atol=1e-5
  )


def recorded(pipeline, i):
  """The original's i-th run of a pipeline, as a AugmentParams."""
  get = lambda name: ARRAYS[f'{pipeline}/{name}'][i]
  sigma = get('sigma_f64')
  return augment.AugmentParams(
      box=tuple(jnp.asarray(get('crop'), jnp.float32)),
      jitter=jnp.asarray(get('jitter') == 1),
      order=jnp.asarray(get('order')),
      factors=jnp.asarray(get('factors_f64'), jnp.float32),
      gray=jnp.asarray(get('gray') == 1),
      blur=jnp.asarray(sigma >= 0),
      sigma=jnp.asarray(abs(sigma), jnp.float32),
      solarize=jnp.asarray(get('solarize') == 1),
      flip=jnp.asarray(get('flip') == 1),
  )


@pytest.mark.parametrize('number', [1, 2])
def test_whole_pipelines_with_the_originals_draws(number):
  source = jnp.asarray(ARRAYS['src'], jnp.float32) / 255
  view = CONFIG.augment[f'view{number}']
  make = jax.jit(
      functools.partial(augment.apply, source, view=view, size=64)
  )
  outputs = ARRAYS[f'aug{number}/out']
  orders = set()
  for i, expected in enumerate(outputs):
    drawn = recorded(f'aug{number}', i)
    error = np.abs(in_bytes(make(drawn)) - expected)
    assert error.mean() <= 2, i
    orders.add(tuple(drawn.order.tolist()))
  assert len(orders) > 5


@pytest.mark.parametrize('number', [1, 2])
def test_whole_pipelines_with_crops_from_the_host(number):
  view = CONFIG.augment[f'view{number}']
  colour = jax.jit(functools.partial(augment.colour, view=view))
  for i, expected in enumerate(ARRAYS[f'aug{number}/out']):
    drawn = recorded(f'aug{number}', i)
    crop = host_crop(ARRAYS[f'aug{number}/crop'][i], 64)
    made = colour(jnp.asarray(crop, jnp.float32) / 255, drawn)
    assert np.abs(in_bytes(made) - expected).mean() <= 2, i


def draws(view, height=256, width=256, n=20_000):
  draw = functools.partial(
      augment.draw_params, view=view, height=height, width=width
  )
  return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), n))


def test_drawn_jitter_has_the_originals_distribution():
  drawn = draws(CONFIG.augment.view1)
  levels = ARRAYS['rrc/q_f64']
  for i, name in enumerate(('brightness', 'contrast', 'saturation', 'hue')):
    expected = ARRAYS[f'jitter/{name}']
    spread = expected[-1] - expected[0]
    # Both are samples of 20,000: three standard errors of the median.
    np.testing.assert_allclose(
        np.quantile(drawn.factors[:, i], levels), expected,
        atol=3 * spread * np.sqrt(0.25 * 2 / 20_000),
    )
  orders = list(itertools.permutations(range(4)))
  counts = np.zeros(24)
  for order, count in zip(
      *np.unique(drawn.order, axis=0, return_counts=True), strict=True
  ):
    counts[orders.index(tuple(order.tolist()))] = count
  expected = ARRAYS['jitter/order_counts']
  error = (2 * 20_000 / 24) ** 0.5
  np.testing.assert_allclose(counts, expected, atol=5 * error)


@pytest.mark.parametrize('number', [1, 2])
def test_operations_happen_as_often_as_the_originals(number):
  drawn = draws(CONFIG.augment[f'view{number}'])
  for name, happened in (
      ('jit', drawn.jitter), ('gray', drawn.gray), ('sigma', drawn.blur),
      ('solarize', drawn.solarize), ('flip', drawn.flip),
  ):
    expected = float(ARRAYS[f'pipeline/aug{number}_{name}'])
    assert np.mean(happened) == pytest.approx(expected, abs=0.03), name


@pytest.mark.parametrize('case', META['rrc'])
def test_drawn_crops_have_the_originals_distribution(case):
  setting = META['rrc'][case]
  height, width = setting['H'], setting['W']
  draw = functools.partial(
      augment.draw_crop, height=height, width=width, area=setting['scale'],
      ratio=(3 / 4, 4 / 3),
  )
  keys = jax.random.split(jax.random.key(1), 20_000)
  top, left, h, w = map(np.asarray, jax.jit(jax.vmap(draw))(keys))
  box = np.array(setting['fallback_box'])
  fell_back = np.all(
      np.abs(np.stack([top, left, h, w], axis=1) - box) < 0.7, axis=1
  )
  share = float(ARRAYS[f'rrc/{case}/fallback'])
  if share or case != '256x256_s0.2':
    assert np.mean(fell_back) == pytest.approx(share, abs=0.02)
  levels = ARRAYS['rrc/q_f64']
  for name, values in (
      ('area', h * w / (height * width)), ('aspect', w / h),
  ):
    expected = ARRAYS[f'rrc/{case}/{name}']
    # Rounding to whole pixels moves the original's by up to 1 %.
    np.testing.assert_allclose(
        np.quantile(values, levels)[1:-1], expected[1:-1], rtol=0.05
    )


@pytest.mark.parametrize('case', sorted(META['rrc']))
def test_boxes_drawn_on_the_host_have_the_originals_distribution(case):
  setting = META['rrc'][case]
  view = config_lib.default_config().augment.view1
  view.crop_min = setting['scale'][0]
  numbers = np.random.default_rng(2).random((20_000, crops.NUMBERS))
  boxes = np.array([
      crops.random_box(n, setting['H'], setting['W'], view) for n in numbers
  ])
  top, left, h, w = boxes.T
  fallback = np.all(boxes == setting['fallback_box'], axis=1)
  share = float(ARRAYS[f'rrc/{case}/fallback'])
  if share or case != '256x256_s0.2':
    assert np.mean(fallback) == pytest.approx(share, abs=0.02)
  levels = ARRAYS['rrc/q_f64']
  area = h * w / (setting['H'] * setting['W'])
  for name, values in ('area', area), ('aspect', w / h):
    np.testing.assert_allclose(
        np.quantile(values, levels)[1:-1],
        ARRAYS[f'rrc/{case}/{name}'][1:-1], rtol=0.04,
    )
