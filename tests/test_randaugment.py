"""RandAugment: each operation against Pillow, the draws, one channel."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
import scipy.stats

from mocov3_jax.base.errors import UserError
from mocov3_jax.data import randaugment
from mocov3_jax.data.pipeline import random_words
from mocov3_jax.data.randaugment import NAMES, OPERATIONS, WORDS, RandAugment

STREAM = 9
FILL = (10, 200, 60)
BICUBIC = Image.Resampling.BICUBIC
AFFINE = Image.Transform.AFFINE
# What turns a magnitude into nothing at all, by name.
GRADED = [
    'Rotate', 'Solarize', 'SolarizeAdd', 'Color', 'Contrast', 'Brightness',
    'Sharpness', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY',
]
SIGNED = [n for n in GRADED if not n.startswith('Solarize')]


def picture(height=24, width=32, channels=3, seed=0):
  """Noise on a gradient, not over the whole range of bytes."""
  rng = np.random.default_rng(seed)
  ramp = np.linspace(30, 180, width)[None, :, None]
  noise = rng.integers(0, 50, (height, width, channels))
  return (ramp + noise).astype(np.uint8)


def word(number):
  """The random word that means this number in [0, 1)."""
  return int(number * 2**52) << 12


def planted(*layers):
  """Words of layers (happens, name, magnitude's quantile, positive)."""
  words = np.full(WORDS, word(0.99), np.uint64)  # By default nothing happens.
  for i, (happens, name, quantile, positive) in enumerate(layers):
    words[4 * i:4 * i + 4] = [
        word(0.1 if happens else 0.7),
        word((NAMES.index(name) + 0.5) / len(NAMES)),
        word(quantile),
        word(0.2 if positive else 0.8),
    ]
  return words


def words(place, seed=0):
  return random_words(seed, place, STREAM, WORDS)


def directly(image, name, magnitude, sign):
  """The operation by Pillow, from its description."""
  level, (width, height) = sign * magnitude / 10, image.size
  bits, add = 4 - int(0.4 * magnitude), int(11 * magnitude)
  affine = lambda *six: image.transform(
      image.size, AFFINE, six, resample=BICUBIC, fillcolor=FILL
  )
  pixels = np.array(image).astype(int)
  match name:
    case 'AutoContrast':
      return ImageOps.autocontrast(image)
    case 'Equalize':
      return ImageOps.equalize(image)
    case 'Invert':
      return 255 - pixels
    case 'Rotate':
      return image.rotate(30 * level, resample=BICUBIC, fillcolor=FILL)
    case 'Posterize':
      return ImageOps.posterize(image, bits) if bits else 0 * pixels
    case 'Solarize':
      return ImageOps.solarize(image, 256 - int(25.6 * magnitude))
    case 'SolarizeAdd':
      return np.where(pixels < 128, np.minimum(pixels + add, 255), pixels)
    case 'ShearX':
      return affine(1, 0.3 * level, 0, 0, 1, 0)
    case 'ShearY':
      return affine(1, 0, 0, 0.3 * level, 1, 0)
    case 'TranslateX':
      return affine(1, 0, 0.45 * level * width, 0, 1, 0)
    case 'TranslateY':
      return affine(1, 0, 0, 0, 1, 0.45 * level * height)
  kind = {
      'Color': ImageEnhance.Color, 'Contrast': ImageEnhance.Contrast,
      'Brightness': ImageEnhance.Brightness,
      'Sharpness': ImageEnhance.Sharpness,
  }[name]
  return kind(image).enhance(1 + 0.9 * level)


@pytest.mark.parametrize('magnitude', [3.0, 9.0, 10.0])
@pytest.mark.parametrize('positive', [True, False])
@pytest.mark.parametrize('name', NAMES)
def test_every_operation_is_the_described_call_of_pillow(
    name, positive, magnitude
):
  image = picture()
  augment = RandAugment(magnitude, 0.0, 1, FILL)
  actual = augment(image, planted((True, name, 0.5, positive)))
  expected = directly(
      Image.fromarray(image), name, magnitude, 1 if positive else -1
  )
  assert actual.dtype == np.uint8 and actual.shape == image.shape
  np.testing.assert_array_equal(actual, np.asarray(expected))
  assert np.any(actual != image)


@pytest.mark.parametrize('name', GRADED)
def test_at_magnitude_zero_an_operation_changes_nothing(name):
  augment = RandAugment(0.0, 0.0, 1)
  for positive in True, False:
    out = augment(picture(), planted((True, name, 0.5, positive)))
    np.testing.assert_array_equal(out, picture())


def test_posterize_keeps_four_bits_to_none():
  image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
  for magnitude, bits in (0.0, 4), (4.9, 3), (5.0, 2), (9.0, 1), (10.0, 0):
    augment = RandAugment(magnitude, 0.0, 1)
    out = augment(image, planted((True, 'Posterize', 0.5, True)))
    assert len(np.unique(out)) == 2**bits
    assert np.all(out <= image)


@pytest.mark.parametrize('name', SIGNED)
def test_a_sign_turns_an_operation_around(name):
  augment = RandAugment(layers=1)
  plus, minus = (
      augment(picture(), planted((True, name, 0.5, positive)))
      for positive in (True, False)
  )
  assert np.any(plus != minus)


@pytest.mark.parametrize('name', sorted(set(NAMES) - set(SIGNED)))
def test_an_operation_without_a_direction_ignores_the_sign(name):
  augment = RandAugment(layers=1)
  plus, minus = (
      augment(picture(), planted((True, name, 0.5, positive)))
      for positive in (True, False)
  )
  np.testing.assert_array_equal(plus, minus)


def test_what_comes_from_outside_has_the_colour_given():
  augment = RandAugment(10.0, 0.0, 1, FILL)
  out = augment(picture(), planted((True, 'TranslateX', 0.5, True)))
  # 0.45 of 32 pixels are 14.4: the last fourteen columns are from outside.
  np.testing.assert_array_equal(out[:, -14:], np.full((24, 14, 3), FILL))
  assert np.all(np.any(out[:, :-15] != FILL, axis=(0, 2)))


def test_layers_apply_in_order_and_only_as_many_as_asked():
  chosen = [
      (True, 'Invert', 0.5, True), (False, 'Equalize', 0.5, True),
      (True, 'Rotate', 0.5, False), (True, 'SolarizeAdd', 0.5, True),
  ]
  three = RandAugment(9.0, 0.0, 3)
  assert three.draw(planted(*chosen)) == [('Invert', 0.9), ('Rotate', -0.9)]
  out = three(picture(), planted(*chosen))
  inverted = Image.fromarray(255 - picture())
  expected = inverted.rotate(-27, resample=BICUBIC, fillcolor=three.fill)
  np.testing.assert_array_equal(out, expected)
  four = dataclasses.replace(three, layers=4)
  assert four.draw(planted(*chosen))[2:] == [('SolarizeAdd', 0.9)]
  none = dataclasses.replace(three, layers=0)
  np.testing.assert_array_equal(none(picture(), planted(*chosen)), picture())


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, 4), st.integers(4, 30),
    st.integers(4, 30), st.sampled_from([1, 3]),
)
def test_the_result_is_pure_in_image_and_words(
    place, layers, height, width, channels
):
  augment = RandAugment(layers=layers, fill=FILL[:channels])
  image, drawn = picture(height, width, channels), words(place)
  out = augment(image, drawn)
  assert out.shape == image.shape and out.dtype == np.uint8
  assert out.flags.writeable and not np.shares_memory(out, image)
  np.testing.assert_array_equal(augment(image, drawn), out)
  np.testing.assert_array_equal(image, picture(height, width, channels))
  np.testing.assert_array_equal(drawn, words(place))


def test_different_words_give_different_images():
  augment = RandAugment()
  outs = {augment(picture(), words(place)).tobytes() for place in range(60)}
  assert len(outs) > 30  # A quarter stays as it is.


def test_extreme_words_are_allowed():
  augment = RandAugment(layers=4)
  for extreme in 0, 2**64 - 1:
    drawn = np.full(WORDS, extreme, np.uint64)
    assert augment(picture(), drawn).shape == (24, 32, 3)
  drawn = np.full(WORDS, 2**64 - 1, np.uint64)
  drawn[::4] = 0  # All layers happen.
  assert augment.draw(drawn) == [('TranslateY', -1.0)] * 4
  # The lowest normal is eight deviations down.
  level = augment.draw(np.zeros(WORDS, np.uint64))[0][1]
  assert 0.4 < level < 0.6


def sample(n=6000, **fields):
  augment = RandAugment(**fields)
  return [augment.draw(words(place, seed=1)) for place in range(n)]


def test_operations_and_their_number_have_the_expected_frequencies():
  drawn = sample()
  counts = np.bincount([len(d) for d in drawn], minlength=3)
  expected = len(drawn) * np.asarray([0.25, 0.5, 0.25])
  assert scipy.stats.chisquare(counts, expected).pvalue > 0.01
  names = [name for d in drawn for name, _ in d]
  counts = [names.count(name) for name in NAMES]
  assert scipy.stats.chisquare(counts).pvalue > 0.01
  # Of two, each pair is as likely, also an operation with itself.
  pairs = np.zeros((len(NAMES), len(NAMES)))
  for d in drawn:
    if len(d) == 2:
      pairs[NAMES.index(d[0][0]), NAMES.index(d[1][0])] += 1
  assert scipy.stats.chisquare(pairs.ravel()).pvalue > 0.01


def test_magnitudes_are_normal_and_clipped_and_signs_fair():
  levels = np.asarray([level for d in sample() for _, level in d])
  magnitudes = 10 * abs(levels)
  assert magnitudes.max() == 10.0
  clipped = np.mean(magnitudes == 10.0)
  assert abs(clipped - scipy.stats.norm.sf(2)) < 0.01
  # Those below, against the normal cut off there.
  below = scipy.stats.truncnorm(-np.inf, 2, 9, 0.5)
  test = scipy.stats.kstest(magnitudes[magnitudes < 10], below.cdf)
  assert test.pvalue > 0.01
  assert abs(np.mean(levels > 0) - 0.5) < 4 * 0.5 / np.sqrt(len(levels))


def test_magnitudes_are_clipped_at_zero():
  levels = [level for d in sample(500, magnitude=0.0) for _, level in d]
  assert 0.4 < np.mean(np.asarray(levels) == 0) < 0.6


@pytest.mark.parametrize('name', NAMES)
def test_one_channel_is_treated_as_three_equal_ones(name):
  gray = picture(channels=1)
  drawn = planted((True, name, 0.5, True))
  out = RandAugment(layers=1, fill=(77,))(gray, drawn)
  assert out.shape == gray.shape and out.dtype == np.uint8
  rgb = gray.repeat(3, axis=2)
  expected = RandAugment(layers=1, fill=(77, 77, 77))(rgb, drawn)
  np.testing.assert_array_equal(out.repeat(3, axis=2), expected)
  if name == 'Color':
    np.testing.assert_array_equal(out, gray)


def test_a_fill_of_another_number_of_channels_is_refused():
  with pytest.raises(UserError, match=r'fill=\(124, 116, 104\).* 1 channels'):
    RandAugment()(picture(channels=1), words(0))


@pytest.mark.parametrize('layers', [-1, 5])
def test_too_many_layers_are_refused(layers):
  with pytest.raises(UserError, match=f'layers={layers}.*0 to 4'):
    RandAugment(layers=layers)


def test_the_order_of_the_operations_stays():
  # A seed means the same images only as long as it does.
  assert ' '.join(OPERATIONS) == (
      'AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd '
      'Color Contrast Brightness Sharpness ShearX ShearY TranslateX TranslateY'
  )
  assert randaugment.WORDS == 16
