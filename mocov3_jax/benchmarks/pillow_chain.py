"""The original's input pipeline: everything on the host, with Pillow.

It is the baseline of `benchmark input`; nothing else uses it.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import io
import math
import multiprocessing
import random

from ml_collections import ConfigDict
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mocov3_jax.sources import Source, Unreadable


@contextlib.contextmanager
def processes(
    count: int, source: Source, config: ConfigDict
) -> Iterator[Callable[[list[int]], int]]:
  """Yields f(indices) -> number of images, which works in `count` processes.

  The processes live until the end of the context.
  """
  with concurrent.futures.ProcessPoolExecutor(
      count, multiprocessing.get_context('spawn'),
      initializer=_remember, initargs=(source, config),
  ) as pool:

    def run(indices):
      parts = [part.tolist() for part in np.array_split(indices, 8 * count)]
      return sum(pool.map(_make, parts))

    yield run


def _remember(source: Source, config: ConfigDict) -> None:
  # Source and config are sent to a worker process once, not with every task.
  _make.source, _make.config = source, config


def _make(indices: list[int]) -> int:
  source, config = _make.source, _make.config
  for index in indices:
    with contextlib.suppress(OSError, Unreadable):
      two_views(source.read(index), config, config.data.image_size)
  return len(indices)


def two_views(data: bytes, config: ConfigDict, size: int) -> np.ndarray:
  """Returns both views of an image, float32 [2, 3, size, size], normalised.

  Args:
    data: the encoded image.
    config: the config of the run. `augment` describes the views, and `data` has
      mean and std.
    size: side of the views, pixels.
  """
  image = Image.open(io.BytesIO(data)).convert('RGB')
  mean, std = (
      np.asarray(v, np.float32)[:, None, None]
      for v in (config.data.mean, config.data.std)
  )
  views = []
  for view in config.augment.view1, config.augment.view2:
    pixels = np.asarray(_view(image, view, size), np.float32) / 255
    views.append((pixels.transpose(2, 0, 1) - mean) / std)
  return np.stack(views)


def _view(image: Image.Image, view: ConfigDict, size: int) -> Image.Image:
  image = _crop(image, view, size)
  if random.random() < view.jitter_prob:
    adjustments = _adjustments(view)
    random.shuffle(adjustments)
    for adjust in adjustments:
      image = adjust(image)
  if random.random() < view.gray_prob:
    image = image.convert('L').convert('RGB')
  if random.random() < view.blur_prob:
    sigma = random.uniform(*view.blur_sigma)
    image = image.filter(ImageFilter.GaussianBlur(sigma))
  if random.random() < view.solarize_prob:
    image = ImageOps.solarize(image, 128)
  if random.random() < view.flip_prob:
    image = ImageOps.mirror(image)
  return image


def _crop(image: Image.Image, view: ConfigDict, size: int) -> Image.Image:
  width, height = image.size
  low, high = (math.log(r) for r in view.crop_ratio)
  for _ in range(10):
    area = width * height * random.uniform(view.crop_min, 1)
    ratio = math.exp(random.uniform(low, high))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = random.randint(0, width - w), random.randint(0, height - h)
      break
  else:
    w = h = min(width, height)
    left, top = (width - w) // 2, (height - h) // 2
  cut = image.crop((left, top, left + w, top + h))
  return cut.resize((size, size), Image.Resampling.BILINEAR)


def _adjustments(
    view: ConfigDict
) -> list[Callable[[Image.Image], Image.Image]]:
  around = lambda spread: random.uniform(1 - spread, 1 + spread)
  return [
      lambda i: ImageEnhance.Brightness(i).enhance(around(view.brightness)),
      lambda i: ImageEnhance.Contrast(i).enhance(around(view.contrast)),
      lambda i: ImageEnhance.Color(i).enhance(around(view.saturation)),
      lambda i: _shift_hue(i, random.uniform(-view.hue, view.hue)),
  ]


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
  hsv = np.array(image.convert('HSV'))
  hsv[..., 0] += np.uint8(round(shift * 255) % 256)
  return Image.fromarray(hsv, 'HSV').convert('RGB')
