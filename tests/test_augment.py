"""The two views: resampling, jitter, determinism."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from mocov3_jax.config import training as config_lib
from mocov3_jax.method import augment, image_ops


def config(size=8, **view):
  c = config_lib.default_config()
  with c.unlocked():
    c.data.update(image_size=size, mean=(0.5,), std=(0.25,))
    for v in c.augment.view1, c.augment.view2:
      v.update({'gray_prob': 0.0, 'blur_prob': 0.0, 'solarize_prob': 0.0})
      v.update(view)
  return c


def images(n=4, size=8, channels=1, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(4, 40), st.integers(4, 40), st.integers(2, 24),
    st.integers(0, 2**31),
)
def test_whole_pixel_crops_resize_as_pil_does(height, width, size, seed):
  rng = np.random.default_rng(seed)
  image = rng.uniform(size=(height, width)).astype(np.float32)
  h, w = rng.integers(2, height + 1), rng.integers(2, width + 1)
  top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
  crop = image[top : top + h, left : left + w]
  expected = Image.fromarray(crop).resize(
      (size, size), Image.Resampling.BILINEAR
  )
  box = tuple(jnp.float32(v) for v in (top, left, h, w))
  resample = jax.jit(image_ops.resample, static_argnums=2)
  actual = resample(jnp.asarray(image[..., None]), box, size)
  np.testing.assert_allclose(actual[..., 0], expected, atol=2e-5)


def test_resize_matrix_of_the_whole_axis_is_the_identity():
  np.testing.assert_allclose(
      image_ops.resize_matrix(7, 7, 0.0, 7.0), np.eye(7), atol=1e-6
  )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(6, 64), st.integers(6, 64))
def test_drawn_crops_lie_inside_with_the_asked_ratio(seed, h, w):
  area, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
  box = augment.draw_crop(jax.random.key(seed), h, w, area, ratio)
  top, left, height, width = map(float, box)
  assert -1e-4 <= top and top + height <= h + 1e-3
  assert -1e-4 <= left and left + width <= w + 1e-3
  assert ratio[0] - 1e-3 <= width / height <= ratio[1] + 1e-3


def test_a_ratio_that_never_fits_falls_back_to_the_centre():
  box = augment.draw_crop(jax.random.key(0), 10, 100, (0.9, 1.0), (0.75, 4 / 3))
  np.testing.assert_allclose(box, (0, 50 - 20 / 3, 10, 40 / 3), rtol=1e-5)


def test_area_of_drawn_crops_is_uniform():
  draw = lambda key: augment.draw_crop(key, 100, 100, (0.2, 0.4), (1.0, 1.0))
  _, _, h, w = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000))
  quantiles = np.quantile(h * w / 1e4, [0.0, 0.25, 0.5, 0.75, 1.0])
  np.testing.assert_allclose(quantiles, [0.2, 0.25, 0.3, 0.35, 0.4], atol=0.01)


def test_views_are_the_normalised_image_when_every_op_is_off():
  c = config(
      crop_min=1.0, crop_ratio=(1.0, 1.0), jitter_prob=0.0, flip_prob=0.0
  )
  batch = images()
  make = jax.jit(augment.build(augment.both_views(c.augment), c.data))
  views = make(batch, jax.random.key(0))
  expected = (batch / 255 - 0.5) / 0.25
  for v in 0, 1:
    np.testing.assert_allclose(views[:, v], expected, atol=1e-5)


def test_flip_reverses_the_columns():
  c = config(
      crop_min=1.0, crop_ratio=(1.0, 1.0), jitter_prob=0.0, flip_prob=1.0
  )
  batch = images()
  flip = jax.jit(augment.build(augment.both_views(c.augment), c.data))
  once = np.asarray(flip(batch, jax.random.key(0))[:, 0])
  np.testing.assert_allclose(
      once[:, :, ::-1], (batch / 255 - 0.5) / 0.25, atol=1e-5
  )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(0, 3), st.integers(0, 2),
    st.sampled_from([1, 3]),
)
def test_blends_stay_in_range_and_factor_one_changes_nothing(
    seed, factor, op, channels
):
  image = jax.random.uniform(jax.random.key(seed), (5, 6, channels))
  out = image_ops.blend(image, jnp.asarray(op), factor)
  assert 0 <= out.min() and out.max() <= 1
  np.testing.assert_allclose(
      image_ops.blend(image, jnp.asarray(op), 1.0), image, atol=1e-6
  )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.5, 0.5))
def test_hue_keeps_value_and_chroma_and_comes_back(seed, shift):
  image = jax.random.uniform(jax.random.key(seed), (5, 6, 3))
  out = image_ops.shift_hue(image, shift)
  np.testing.assert_allclose(out.max(-1), image.max(-1), atol=1e-5)
  np.testing.assert_allclose(out.min(-1), image.min(-1), atol=1e-5)
  np.testing.assert_allclose(
      image_ops.shift_hue(out, -shift), image, atol=1e-4
  )
  np.testing.assert_allclose(image_ops.shift_hue(image, 0.0), image, atol=1e-5)
  np.testing.assert_allclose(image_ops.shift_hue(image, 1.0), image, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(4)))
def test_jitter_applies_its_adjustments_in_the_given_order(seed, order):
  image = jax.random.uniform(jax.random.key(seed), (5, 6, 3))
  factors = jnp.asarray((1.3, 0.7, 1.2, 0.08))
  expected = image
  for op in order:
    if op == image_ops.HUE:
      expected = image_ops.shift_hue(expected, factors[op])
    else:
      expected = image_ops.blend(expected, jnp.asarray(op), factors[op])
  actual = image_ops.jitter(image, jnp.asarray(order), factors)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 2.0))
def test_blur_keeps_constants_and_stays_in_range(seed, sigma):
  np.testing.assert_allclose(
      image_ops.blur(jnp.full((9, 7, 3), 0.3), sigma), 0.3, atol=1e-5
  )
  image = jax.random.uniform(jax.random.key(seed), (9, 7, 3))
  out = image_ops.blur(image, sigma)
  assert 0 <= out.min() and out.max() <= 1


def test_solarize_leaves_no_bright_pixel():
  image = jnp.asarray(images(channels=3)[0]) / 255
  once = image_ops.solarize(image)
  np.testing.assert_allclose(once, jnp.minimum(image, 1 - image), atol=1e-6)
  np.testing.assert_array_equal(image_ops.solarize(once), once)


def test_normalise_has_an_inverse():
  c = config()
  x = jnp.asarray(images()) / 255
  np.testing.assert_allclose(
      image_ops.normalise(x, c.data) * 0.25 + 0.5, x, atol=1e-6
  )


def test_views_differ_between_views_examples_and_keys_and_repeat():
  c = config(flip_prob=0.5)
  make = jax.jit(augment.build(augment.both_views(c.augment), c.data))
  batch = np.repeat(images(1), 4, axis=0)
  a = np.asarray(make(batch, jax.random.key(0)))
  assert len(np.unique(a.reshape(8, -1), axis=0)) == 8
  np.testing.assert_array_equal(a, make(batch, jax.random.key(0)))
  assert np.any(a != np.asarray(make(batch, jax.random.key(1))))


def test_an_example_draws_the_same_in_a_larger_batch():
  c = config()
  make = jax.jit(augment.build(augment.both_views(c.augment), c.data))
  batch = images(8)
  np.testing.assert_allclose(
      make(batch, jax.random.key(0))[:4], make(batch[:4], jax.random.key(0)),
      atol=1e-6,
  )


@pytest.mark.parametrize('size', [8, 16])
def test_evaluation_sees_the_whole_image_resized(size):
  c = config(size)
  out = augment.whole_images(jnp.asarray(images(size=8)), c.data)
  assert out.shape == (4, size, size, 1)
  if size == 8:
    np.testing.assert_allclose(out, (images() / 255 - 0.5) / 0.25, atol=1e-5)
