"""RandAugment for fine-tuning: on the host, per image, with Pillow.

The definitions come from these sources:

- Cubuk et al. 2020 (arXiv 1909.13719): a fixed number of operations per image,
  drawn uniformly with replacement, all of one magnitude on a scale to 10.
- AutoAugment (Cubuk et al. 2019, arXiv 1805.09501): the operations but
  SolarizeAdd, and their ranges: 30 degrees; shear 0.3; factors up to 0.9 from
  1; thresholds 0 to 256. It translates by up to 150 pixels; later
  implementations use 0.45 of the side.
- Touvron et al. 2021 (arXiv 2012.12877), Table 9: magnitude 9, standard
  deviation 0.5. In the notation of timm that is `rand-m9-mstd0.5-inc1`.
- timm, as documented: 2 operations, each applied with probability 0.5;
  magnitudes are normal about the one given; and with `inc1` every operation
  does more at a higher magnitude. In the papers Posterize and Solarize do
  less, and the factors go from 0.1 to 1.9, with no change in the middle.
- Common practice, in no paper: SolarizeAdd with up to 110, Posterize with 4
  to 0 bits (AutoAugment: 8 to 4).

The resulting table of severities is the commonly used one.
"""

from collections.abc import Callable
import dataclasses
import statistics

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mocov3_jax.base.errors import UserError

# The magnitude of the severest operations.
MAX_MAGNITUDE = 10.0
# Probability of applying an operation that was drawn.
PROBABILITY = 0.5
MAX_LAYERS = 4
# Random words per layer: whether it happens, operation, magnitude, sign.
WORDS_A_LAYER = 4
WORDS = MAX_LAYERS * WORDS_A_LAYER

Fill = tuple[int, ...]
Operation = Callable[[Image.Image, float, Fill], Image.Image]


def _posterize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
  # Keeps four bits at magnitude 0, and none (all black) at 10.
  # ImageOps.posterize of recent Pillow refuses to keep no bits.
  bits = 4 - int(4 * abs(level))
  return _by_value(image, lambda value: value & (256 - 2 ** (8 - bits)))


def _solarize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
  # At magnitude 0 the threshold is above all pixels.
  return ImageOps.solarize(image, 256 - int(256 * abs(level)))


def _solarize_add(image: Image.Image, level: float, fill: Fill) -> Image.Image:
  add = int(110 * abs(level))
  return _by_value(image, lambda v: min(v + add, 255) if v < 128 else v)


def _by_value(image: Image.Image, new: Callable[[int], int]) -> Image.Image:
  return image.point([new(v) for v in range(256)] * len(image.getbands()))


def _affine(
    image: Image.Image, fill: Fill, *, xx: float = 1.0, xy: float = 0.0,
    x: float = 0.0, yx: float = 0.0, yy: float = 1.0, y: float = 0.0,
) -> Image.Image:
  # The pixel at (u, v) comes from (xx u + xy v + x, yx u + yy v + y), so a
  # shear leaves the first row or column in place.
  return image.transform(
      image.size, Image.Transform.AFFINE, (xx, xy, x, yx, yy, y),
      resample=Image.Resampling.BICUBIC, fillcolor=fill,
  )


# f(image, level, fill): `level` is +- magnitude / MAX_MAGNITUDE, in [-1, 1];
# an operation without a direction takes its absolute value. The order is part
# of what a seed means.
OPERATIONS: dict[str, Operation] = {
    'AutoContrast': lambda image, level, fill: ImageOps.autocontrast(image),
    'Equalize': lambda image, level, fill: ImageOps.equalize(image),
    'Invert': lambda image, level, fill: ImageOps.invert(image),
    'Rotate': lambda image, level, fill: image.rotate(
        30 * level, resample=Image.Resampling.BICUBIC, fillcolor=fill
    ),
    'Posterize': _posterize,
    'Solarize': _solarize,
    'SolarizeAdd': _solarize_add,
    'Color': lambda image, level, fill: (
        ImageEnhance.Color(image).enhance(1 + 0.9 * level)
    ),
    'Contrast': lambda image, level, fill: (
        ImageEnhance.Contrast(image).enhance(1 + 0.9 * level)
    ),
    'Brightness': lambda image, level, fill: (
        ImageEnhance.Brightness(image).enhance(1 + 0.9 * level)
    ),
    'Sharpness': lambda image, level, fill: (
        ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level)
    ),
    'ShearX': lambda image, level, fill: _affine(image, fill, xy=0.3 * level),
    'ShearY': lambda image, level, fill: _affine(image, fill, yx=0.3 * level),
    'TranslateX': lambda image, level, fill: (
        _affine(image, fill, x=0.45 * level * image.width)
    ),
    'TranslateY': lambda image, level, fill: (
        _affine(image, fill, y=0.45 * level * image.height)
    ),
}
NAMES = tuple(OPERATIONS)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """A function of (image, random words); see the top of this file.

  Attributes:
    magnitude: mean of the magnitudes, in [0, 10].
    std: their standard deviation; they are clipped to [0, 10].
    layers: operations drawn per image, at most MAX_LAYERS.
    fill: colour of areas outside the image, one byte per channel; by default
      the mean pixel of ImageNet.

  Raises:
    UserError: if `layers` is not in [0, MAX_LAYERS].
  """

  magnitude: float = 9.0
  std: float = 0.5
  layers: int = 2
  fill: Fill = (124, 116, 104)

  def __post_init__(self):
    if not 0 <= self.layers <= MAX_LAYERS:
      raise UserError(
          f'RandAugment: layers={self.layers}; allowed: 0 to {MAX_LAYERS}'
      )

  def __call__(self, image: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Applies the operations that the random words choose.

    Args:
      image: uint8 [H, W, C]; C is 3 (RGB), or 1 (gray, which Color leaves
        unchanged).
      words: uint64 [WORDS], as `pipeline.random_words` gives them.

    Returns:
      uint8 [H, W, C], a new array.

    Raises:
      UserError: if `fill` does not have C values.
    """
    channels = image.shape[-1]
    if channels != len(self.fill):
      raise UserError(
          f'RandAugment: fill={self.fill} for images of {channels} channels; '
          'allowed: one value per channel'
      )
    pixels = Image.fromarray(image[..., 0] if channels == 1 else image)
    for name, level in self.draw(words):
      pixels = OPERATIONS[name](pixels, level, self.fill)
    return np.array(pixels).reshape(image.shape)

  def draw(self, words: np.ndarray) -> list[tuple[str, float]]:
    """Returns the names and levels (see OPERATIONS) to apply, in order.

    Args:
      words: uint64 [WORDS]. Each layer has its own, used or not, so that what
        it draws does not depend on other layers.
    """
    layers = words[:WORDS].reshape(MAX_LAYERS, WORDS_A_LAYER)[:self.layers]
    # Uniform in (0, 1), without the ends, where the normal quantile is
    # infinite.
    numbers = ((layers >> np.uint64(12)) + 0.5) * 2.0**-52
    chosen = []
    for happens, which, height, sign in numbers.tolist():
      if happens >= PROBABILITY:
        continue
      spread = self.std * statistics.NormalDist().inv_cdf(height)
      magnitude = min(max(self.magnitude + spread, 0.0), MAX_MAGNITUDE)
      level = magnitude / MAX_MAGNITUDE
      name = NAMES[int(which * len(NAMES))]
      chosen.append((name, level if sign < 0.5 else -level))
    return chosen
