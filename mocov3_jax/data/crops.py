"""Random-resized crops and antialiased resizing, on the host, per image.

This is for sources whose images differ in size. Images of one size are cropped
on the device instead (augment.py).
"""

import math
from typing import NamedTuple

import cv2
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.data.channels import Planes
from mocov3_jax.data.decode import JPEG_FLAGS, Encoded
from mocov3_jax.sources import Unreadable

TRIES = 10
# Random numbers per box: areas and ratios of all tries, and the position.
NUMBERS = 2 * TRIES + 2
# Share of the shorter side that evaluation sees. Paper s5: 224 of 256 pixels.
CENTRE = 0.875
# A JPEG is decoded at least this many times larger than its crop. On the most
# detailed photographs the crop then differs by at most 1.5 of 255, on average,
# from a crop of the image at full size.
MARGIN = 1.5
# Maximum number of channels that OpenCV resizes together.
MOST_CHANNELS = 4
# From this shrink factor on, an image is averaged before it is smoothed.
COARSE = 4.0


class Box(NamedTuple):
  """A rectangle of an image, in pixels; whole numbers at the full size."""

  top: float
  left: float
  height: float
  width: float


def random_box(
    numbers: np.ndarray, height: int, width: int, view: ConfigDict
) -> Box:
  """Draws the box of a random-resized crop, as torchvision does.

  Makes ten tries (area uniform, aspect ratio log-uniform) and takes the first
  box that fits; if none does, the largest centred box within the ratios.

  Args:
    numbers: float64 [NUMBERS], uniform in [0, 1).
    height, width: size of the image, pixels.
    view: has `crop_min`, the smallest share of the area, and `crop_ratio`.
  """
  low, high = view.crop_ratio
  areas, ratios = numbers[:TRIES].tolist(), numbers[TRIES:2 * TRIES].tolist()
  for u, v in zip(areas, ratios, strict=True):
    area = height * width * (view.crop_min + (1 - view.crop_min) * u)
    ratio = low * (high / low) ** v
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      top, left = numbers[-2] * (height - h + 1), numbers[-1] * (width - w + 1)
      return Box(int(top), int(left), h, w)
  w = max(1, min(width, round(height * high)))
  h = max(1, min(height, round(width / low)))
  return Box((height - h) // 2, (width - w) // 2, h, w)


def centre_box(height: int, width: int) -> Box:
  """Returns the square in the middle that evaluation sees."""
  side = max(1, round(CENTRE * min(height, width)))
  return Box((height - side) // 2, (width - side) // 2, side, side)


def cut(
    encoded: Encoded | Planes, boxes: list[Box], out: np.ndarray
) -> None:
  """Decodes an image once and cuts boxes out of it.

  A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as long as every box
  stays MARGIN times as large as its crop. The boxes then keep their exact
  place, and may begin and end within a pixel of the smaller image.

  Args:
    encoded: the image.
    boxes: boxes in pixels of the full-size image.
    out: uint8 [len(boxes), size, size, C], contiguous; receives the crops.

  Raises:
    Unreadable: if the image is damaged, or has another size than its header
      says.
  """
  smallest = min(min(box.height, box.width) for box in boxes)
  room = smallest / (MARGIN * out.shape[1])
  shrink = max(s for s in JPEG_FLAGS if s <= max(room, 1))
  image = encoded.pixels(shrink)
  # Formats other than JPEG come out at full size.
  whole = encoded.height, encoded.width
  if image.shape[:2] == whole:
    shrink = 1
  elif image.shape[:2] != tuple(-(-side // shrink) for side in whole):
    raise Unreadable(
        f'decodes to {image.shape[:2]} pixels at 1/{shrink} of {whole}'
    )
  rows, columns = encoded.begins(shrink)
  for box, crop in zip(boxes, out, strict=True):
    resize(image, crop, Box(
        (box.top + rows) / shrink, (box.left + columns) / shrink,
        box.height / shrink, box.width / shrink,
    ))


def resize(image: np.ndarray, out: np.ndarray, box: Box | None = None) -> None:
  """Resizes uint8 [H, W, C] into `out`, uint8 [h, w, C], antialiased.

  If `box` is given, only that part of the image is used.

  The result is close to that of Pillow's (and torchvision's) bilinear resize,
  whose triangle filter widens as it shrinks the image. Here a small blur adds
  the variance that the wider triangle has, and OpenCV then interpolates. This
  is three to four times faster. On photographs it differs from Pillow by 1 of
  255 on average.
  """
  if box is None:
    box = Box(0, 0, *image.shape[:2])
  if out.shape[2] <= MOST_CHANNELS:
    _resize(image, out, box)
    return
  for begin in range(0, out.shape[2], MOST_CHANNELS):
    some = slice(begin, begin + MOST_CHANNELS)
    part = np.empty_like(out[..., some], order='C')
    _resize(np.ascontiguousarray(image[..., some]), part, box)
    out[..., some] = part


def _resize(image: np.ndarray, out: np.ndarray, box: Box) -> None:
  height, width = out.shape[:2]
  top, left = math.floor(box.top), math.floor(box.left)
  image = image[
      top:math.ceil(box.top + box.height), left:math.ceil(box.left + box.width)
  ]
  box = box._replace(top=box.top - top, left=box.left - left)
  scale = box.height / height, box.width / width
  if max(scale) >= COARSE:
    image, box, scale = _averaged(image, box, scale)
  down, across = map(_lowpass, scale)
  if len(down) > 1 or len(across) > 1:
    image = cv2.sepFilter2D(
        image, -1, across, down, borderType=cv2.BORDER_REPLICATE
    )
  if box == (0, 0, *image.shape[:2]):
    cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    return
  # The same, for a box that begins or ends within a pixel.
  down, across = box.height / height, box.width / width
  cv2.warpAffine(
      image, np.array([
          [across, 0, box.left + across / 2 - 0.5],
          [0, down, box.top + down / 2 - 0.5],
      ]), (width, height), dst=out, borderMode=cv2.BORDER_REPLICATE,
      flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
  )


def _averaged(
    image: np.ndarray, box: Box, scale: tuple[float, float]
) -> tuple[np.ndarray, Box, tuple[float, float]]:
  """Shrinks an image by averaging, to about twice the size that is wanted.

  A blur costs time in proportion to its width at every pixel; averaging uses
  every pixel only once.

  Args:
    image: uint8 [H, W, C].
    box: the part of the image that is to be resized.
    scale: pixels of the box per pixel of the result, down and across.

  Returns:
    The smaller image, the box in it, and the scales for which it still has to
    be smoothed, given that averaging has smoothed it already.
  """
  sides = tuple(
      max(1, round(2 * side / s)) if s >= COARSE else side
      for side, s in zip(image.shape[:2], scale, strict=True)
  )
  rows, columns = (
      side / left for side, left in zip(image.shape[:2], sides, strict=True)
  )
  image = cv2.resize(image, sides[::-1], interpolation=cv2.INTER_AREA)
  box = Box(
      box.top / rows, box.left / columns, box.height / rows,
      box.width / columns,
  )
  # The variances of a triangle of s and of an average over r pixels are s^2 / 6
  # and (r^2 - 1) / 12.
  return image, box, tuple(
      math.sqrt(s**2 - (r**2 - 1) / 2) / r
      for s, r in zip(scale, (rows, columns), strict=True)
  )


def _lowpass(scale: float) -> np.ndarray:
  # A triangle that reaches `scale` pixels to either side has the variance
  # scale^2 / 6; interpolation itself is such a triangle of scale 1.
  variance = (scale**2 - 1) / 6
  if scale <= 1:
    return np.ones(1, np.float32)
  if scale <= 2:
    return np.float32([variance / 2, 1 - variance, variance / 2])
  reach = int(np.ceil(scale))
  kernel = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * variance))
  return (kernel / kernel.sum()).astype(np.float32)
