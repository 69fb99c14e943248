"""Soft labels, mixup, cutmix, random erasing."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from mocov3_jax.protocols import mixup


def batch(n=4, size=8, classes=5, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(n, size, size, 3)).astype(np.float32)
  targets = mixup.smooth(rng.integers(0, classes, n), classes, 0.1)
  return jnp.asarray(images, dtype), targets


def numbered(n=4, size=16):
  """Images whose every pixel says whose it is; targets that say the same."""
  images = jnp.broadcast_to(
      jnp.arange(n, dtype=jnp.float32)[:, None, None, None], (n, size, size, 3)
  )
  return images, jnp.eye(n)


@jax.jit
def both(images, targets, key):
  return mixup.mix(images, targets, key, 0.8, 1.0)


# Compiled once for each size, not operation by operation.
erase = jax.jit(mixup.erase, static_argnums=2)
draw_cut = jax.jit(mixup.draw_cut, static_argnums=(1, 2))


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


# Labels and loss.


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=9), st.floats(0, 0.99)
)
def test_smoothed_labels_sum_to_one_and_follow_the_formula(labels, s):
  targets = mixup.smooth(jnp.asarray(labels), 7, s)
  assert targets.dtype == jnp.float32 and targets.shape == (len(labels), 7)
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(
      targets, (1 - s) * np.eye(7)[labels] + s / 7, atol=1e-6
  )


def test_an_unknown_label_gives_a_row_of_zeros():
  targets = mixup.smooth(jnp.asarray([-1, 2]), 3, 0.3)
  np.testing.assert_allclose(targets, [[0, 0, 0], [0.1, 0.1, 0.8]], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 50))
def test_soft_cross_entropy_is_that_of_scipy(seed, scale):
  rng, rows = np.random.default_rng(seed), 5
  logits = scale * rng.normal(size=(rows, 6)).astype(np.float32)
  targets = rng.dirichlet(np.ones(6), rows).astype(np.float32)
  unknown = rng.random(rows) < 0.3
  targets[unknown] = 0
  each = -(targets * scipy.special.log_softmax(logits, axis=1)).sum(1)
  expected = each[~unknown].mean() if not unknown.all() else 0.0
  actual = mixup.soft_cross_entropy(logits, targets)
  assert actual.shape == () and actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_soft_cross_entropy_of_hard_labels_is_that_of_the_label():
  logits = jnp.asarray([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
  loss = mixup.soft_cross_entropy(logits, jnp.eye(3)[:2])
  first = -2 + np.log(np.exp(2) + 1 + np.exp(-1))
  np.testing.assert_allclose(loss, (first + np.log(3)) / 2, rtol=1e-6)


def test_a_batch_of_unknown_labels_has_no_loss_and_no_gradient():
  targets = mixup.smooth(jnp.full(3, -1), 4, 0.1)
  loss, grad = jax.value_and_grad(mixup.soft_cross_entropy)(
      jnp.ones((3, 4)), targets
  )
  assert loss == 0
  np.testing.assert_array_equal(grad, 0)


def test_an_unknown_row_gets_no_gradient_and_does_not_dilute_the_others():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), 'float32')
  targets = mixup.smooth(jnp.asarray([1, -1, 3]), 4, 0.1)
  grad = jax.grad(mixup.soft_cross_entropy)(logits, targets)
  np.testing.assert_array_equal(grad[1], 0)
  known = jnp.asarray([0, 2])
  expected = jax.grad(mixup.soft_cross_entropy)(logits[known], targets[known])
  np.testing.assert_allclose(grad[known], expected, rtol=1e-6)


def test_the_loss_of_bfloat16_logits_is_float32():
  logits = jnp.asarray([[1.0, 2.0, 4.0]], jnp.bfloat16)
  loss = mixup.soft_cross_entropy(logits, jnp.eye(3)[:1])
  assert loss.dtype == jnp.float32
  expected = -scipy.special.log_softmax([1.0, 2.0, 4.0])[0]
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


# Mixing.


@pytest.mark.parametrize('n', [1, 4, 5])
@pytest.mark.parametrize('lam', [0.0, 0.3, 1.0])
def test_mixup_blends_with_the_reversed_batch(n, lam):
  images, targets = batch(n)
  mixed, soft = mixup.mixup(images, targets, lam)
  x, y = np.asarray(images), np.asarray(targets)
  np.testing.assert_allclose(mixed, lam * x + (1 - lam) * x[::-1], atol=1e-6)
  np.testing.assert_allclose(soft, lam * y + (1 - lam) * y[::-1], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_cutmix_takes_the_box_and_its_share_from_the_partner(data):
  size = 16
  top, left = (data.draw(st.integers(0, size)) for _ in range(2))
  height = data.draw(st.integers(0, size - top))
  width = data.draw(st.integers(0, size - left))
  images, targets = numbered(4, size)
  mixed, soft = mixup.cutmix(images, targets, (top, left, height, width))
  expected = np.array(images)
  inside = (slice(None), slice(top, top + height), slice(left, left + width))
  expected[inside] = np.asarray(images)[::-1][inside]
  np.testing.assert_array_equal(mixed, expected)
  share = np.mean(np.asarray(mixed) == np.asarray(images), axis=(1, 2, 3))
  np.testing.assert_array_equal(np.diag(soft), share)
  np.testing.assert_array_equal(soft.sum(1), 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_a_drawn_cut_lies_inside_and_is_at_most_of_the_asked_size(seed, lam):
  height, width = 20, 30
  box = draw_cut(jax.random.key(seed), height, width, lam)
  top, left, h, w = map(int, box)
  assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
  assert h <= height * np.sqrt(1 - lam) + 1
  assert w <= width * np.sqrt(1 - lam) + 1


def test_cuts_that_stay_inside_have_the_asked_area_and_uniform_centres():
  size, lam = 1000, 0.91  # Sides of 300.
  top, left, h, w = jax.vmap(
      lambda key: jnp.stack(mixup.draw_cut(key, size, size, lam))
  )(keys(2000)).T
  whole = (top > 0) & (top + h < size)
  np.testing.assert_allclose(h[whole], 300, atol=1)
  # Centres between 150 and 850 stay inside.
  assert abs(np.mean(whole) - 0.7) < 0.04
  centre = (left + w / 2)[(left > 0) & (left + w < size)]
  assert scipy.stats.kstest(centre, 'uniform', (150, 700)).pvalue > 0.01


def test_lambda_of_cutmix_is_the_true_share_of_pixels_after_clipping():
  images, targets = numbered(2, 16)
  run = jax.jit(lambda key: mixup.mix(images, targets, key, 0.0, 1.0))
  shares = []
  for key in keys(40):
    mixed, soft = run(key)
    kept = np.mean(np.asarray(mixed) == np.asarray(images), axis=(1, 2, 3))
    np.testing.assert_array_equal(np.diag(soft), kept)
    np.testing.assert_array_equal(mixed[0] + mixed[1], 1)  # Whole pixels.
    shares.append(kept[0])
  assert len(set(shares)) > 20


@functools.cache
def lambdas(mixup_alpha, cutmix_alpha):
  """Lambda of each of 2000 keys, and whether mixup was chosen."""
  images, targets = numbered(2, 16)

  def one(key):
    mixed, soft = mixup.mix(images, targets, key, mixup_alpha, cutmix_alpha)
    # Mixup makes one value of all pixels, which is neither image's.
    blended = jnp.all(mixed[0] == mixed[0, 0, 0, 0])
    whole = (mixed[0, 0, 0, 0] == 0) | (mixed[0, 0, 0, 0] == 1)
    return soft[0, 0], blended & ~whole

  lam, by_mixup = jax.jit(jax.vmap(one))(keys(2000))
  return np.asarray(lam), np.asarray(by_mixup)


@pytest.mark.parametrize('alpha', [0.2, 0.8])
def test_lambda_of_mixup_is_beta_distributed(alpha):
  lam, _ = lambdas(alpha, 0.0)
  beta = scipy.stats.beta(alpha, alpha)
  assert abs(lam.mean() - 0.5) < 4 * beta.std() / np.sqrt(2000)
  assert scipy.stats.kstest(lam, beta.cdf).pvalue > 0.01


def test_mixup_and_cutmix_are_chosen_equally_often():
  _, blended = lambdas(0.8, 1.0)
  assert abs(blended.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_an_alpha_of_zero_switches_a_method_off():
  _, blended = lambdas(0.8, 0.0)
  assert blended.all()
  _, blended = lambdas(0.0, 1.0)
  assert not blended.any()


def test_without_alphas_mix_returns_its_very_arguments():
  images, targets = batch()
  mixed, soft = mixup.mix(images, targets, jax.random.key(0), 0.0, 0.0)
  assert mixed is images and soft is targets


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_mix_keeps_the_sum_of_targets_and_of_pairs_and_repeats(seed):
  images, targets = batch()
  mixed, soft = both(images, targets, jax.random.key(seed))
  np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
  # Whatever one of a pair loses the other gains.
  np.testing.assert_allclose(
      mixed + mixed[::-1], images + images[::-1], atol=1e-5
  )
  again = both(images, targets, jax.random.key(seed))
  np.testing.assert_array_equal(mixed, again[0])


def test_mix_keeps_shapes_and_dtypes():
  images, targets = batch(3, dtype=jnp.bfloat16)
  for alphas in (0.8, 1.0), (0.8, 0.0), (0.0, 1.0):
    mixed, soft = jax.eval_shape(
        lambda key, a=alphas: mixup.mix(images, targets, key, *a),
        jax.random.key(0),
    )
    assert mixed.shape == images.shape and mixed.dtype == images.dtype
    assert soft.shape == targets.shape and soft.dtype == targets.dtype


def test_an_unknown_partner_takes_its_share_away_and_brings_no_label():
  images, _ = batch(2)
  targets = mixup.smooth(jnp.asarray([-1, 2]), 4, 0.0)
  _, soft = mixup.mixup(images, targets, 0.75)
  np.testing.assert_array_equal(soft, [[0, 0, 0.25, 0], [0, 0, 0.75, 0]])


# Erasing.

BLANK = 100.0  # No noise comes near.


@functools.cache
def erased(n, prob, shape):
  """Returns the images, and bool [n, H, W], where they were erased."""
  images = jnp.full((n, *shape), BLANK)
  out = np.asarray(erase(images, keys(n), prob))
  changed = out != BLANK
  np.testing.assert_array_equal(changed.all(-1), changed.any(-1))
  return out, changed.all(-1)


@pytest.mark.parametrize('prob', [0.25, 0.9])
def test_the_asked_share_of_images_is_erased(prob):
  n = 2000
  _, where = erased(n, prob, (16, 16, 1))
  share = where.any((1, 2)).mean()
  assert abs(share - prob) < 4 * np.sqrt(prob * (1 - prob) / n)


def test_without_probability_erase_returns_its_very_argument():
  images, _ = batch()
  assert mixup.erase(images, keys(4), 0.0) is images


def test_what_is_erased_is_a_box_of_the_asked_area_and_ratio():
  size = 40
  _, where = erased(2000, 1.0, (size, size, 3))
  areas, ratios = [], []
  for mask in where:
    rows, columns = mask.any(1), mask.any(0)
    h, w = rows.sum(), columns.sum()
    assert mask.sum() == h * w  # The product of an interval and an interval:
    assert np.ptp(np.flatnonzero(rows)) == h - 1
    assert np.ptp(np.flatnonzero(columns)) == w - 1
    # Both sides were rounded, by up to half a pixel each.
    rounding = (h + w) / 2 + 0.25
    assert 0.02 * size**2 - rounding <= h * w <= size**2 / 3 + rounding
    areas.append(h * w / size**2)
    assert 0.3 <= (h + 0.5) / (w - 0.5) and (h - 0.5) / (w + 0.5) <= 1 / 0.3
    ratios.append(np.log(h / w))
  # Nearly uniform: a few large and thin boxes did not fit.
  assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.02
  assert abs(np.mean(ratios)) < 0.12


def test_boxes_are_erased_everywhere_alike():
  _, where = erased(2000, 1.0, (40, 40, 3))
  share = where.mean(0)
  for other in share[::-1], share[:, ::-1], share.T:
    np.testing.assert_allclose(share, other, atol=0.06)
  # They reach all four edges, and one without the one across from it.
  for along in 1, 2:
    hit = where.any(along)
    assert np.any(hit[:, 0] & ~hit[:, -1]) and np.any(hit[:, -1] & ~hit[:, 0])


def test_erased_pixels_are_standard_normal_in_every_channel():
  out, where = erased(2000, 1.0, (40, 40, 3))
  noise = out[where]  # [pixels, 3]
  np.testing.assert_allclose(noise.mean(0), 0, atol=0.03)
  np.testing.assert_allclose(noise.std(0), 1, atol=0.03)
  assert scipy.stats.kstest(noise[:5000].ravel(), 'norm').pvalue > 0.01
  off_diagonal = np.corrcoef(noise.T)[np.triu_indices(3, 1)]
  np.testing.assert_allclose(off_diagonal, 0, atol=0.03)


def test_what_an_example_gets_depends_on_its_own_key_alone():
  images, _ = batch(8)
  all_keys = keys(8)
  whole = erase(images, all_keys, 0.7)
  np.testing.assert_array_equal(
      erase(images[2:5], all_keys[2:5], 0.7), whole[2:5]
  )
  np.testing.assert_array_equal(
      erase(images[::-1], all_keys[::-1], 0.7), whole[::-1]
  )
  changed = np.asarray(whole != images).any((1, 2, 3))
  assert 0 < changed.sum() < 8


def test_an_image_in_which_no_box_fits_stays_as_it_is():
  # The lowest box has sqrt(0.02 * 1000 * 0.3) = 2.4 rows.
  _, where = erased(50, 1.0, (1, 1000, 1))
  assert not where.any()


def test_erase_keeps_the_dtype():
  images, _ = batch(4, dtype=jnp.bfloat16)
  out = jax.eval_shape(lambda k: mixup.erase(images, k, 1.0), keys(4))
  assert out.dtype == jnp.bfloat16 and out.shape == images.shape
