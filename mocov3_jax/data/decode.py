"""Encoded images to pixels: JPEG by OpenCV, everything else by Pillow."""

import io

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from mocov3_jax.data.metadata import stripped
from mocov3_jax.sources import Unreadable

# Here and not at the first image: Pillow loads its formats without a lock.
Image.init()
# What is tried, whatever else Pillow knows: some of its formats start other
# programs.
FORMATS = 'JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM'
# Pixels of an image, scans of a progressive JPEG, and pixels times scans, at
# most: a small file may ask for minutes and gigabytes.
MOST_PIXELS, MOST_SCANS, MOST_WORK = 50_000_000, 64, 1_000_000_000
SCAN = b'\xff\xda'
# How a TIFF begins: little or big endian, classic or for files above 4 GiB.
TIFF = b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'
# EXIF tag of the orientation, and how each of its values is undone.
ORIENTATION = 0x0112
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
# Which of them turn rows and columns round.
UP_TO_DOWN, LEFT_TO_RIGHT = (3, 4, 7, 8), (2, 3, 6, 7)
# By how much OpenCV can shrink a JPEG as it decodes it. All flags but the first
# give BGR.
JPEG_FLAGS = {
    1: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_COLOR_8,
}
# End-of-image marker of a JPEG, and how many bytes may follow it.
EOI, TRAILER = b'\xff\xd9', 64
# The same for gray, which comes as it is.
GRAY_FLAGS = {
    1: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class Encoded:
  """An encoded image of which only the header has been read.

  Attributes:
    height, width: pixels, as shown (the EXIF orientation is applied).
  """

  def __init__(self, data: bytes, gray: bool = False):
    """Reads the header.

    Args:
      data: of an image file in one of FORMATS.
      gray: whether its pixels are to have one channel instead of RGB.

    Raises:
      Unreadable: if there is none, or it is beyond the limits above.
    """
    self._data, self._gray = data, gray
    self._image = open_image(data)
    self.width, self.height = self._image.size
    self._orientation = _orientation(self._image)
    if self._orientation >= 5:
      self.width, self.height = self.height, self.width

  @property
  def is_plain_jpeg(self) -> bool:
    """Whether OpenCV decodes the image right: a whole JPEG, gray or RGB.

    OpenCV fills a truncated JPEG with gray in silence, so what does not end
    with the marker of its end is left to Pillow, which tells.
    """
    return (
        self._image.format in ('JPEG', 'MPO')
        and self._image.mode in ('RGB', 'L')
        and EOI in self._data[-TRAILER:]
    )

  def begins(self, shrink: int) -> tuple[int, int]:
    """Returns where the image begins in what `pixels` returns.

    A shrunk JPEG is rounded up to whole pixels at its right and lower edges,
    and these may be turned to the left and to the top.

    Returns:
      Rows and columns before it, in pixels of the whole image.
    """
    rows, columns = (-side % shrink for side in (self.height, self.width))
    return (
        rows if self._orientation in UP_TO_DOWN else 0,
        columns if self._orientation in LEFT_TO_RIGHT else 0,
    )

  def pixels(self, shrink: int = 1) -> np.ndarray:
    """Decodes the image.

    Transparent images are laid on white; 16-bit ones keep their high byte;
    animated ones give their first frame.

    Args:
      shrink: 1, 2, 4 or 8. A JPEG comes out so many times smaller (rounded
        up), which saves work; other formats ignore it.

    Returns:
      uint8 [H, W, 3], RGB, or [H, W, 1], gray (ITU-R 601); C-contiguous.

    Raises:
      Unreadable: if it is damaged.
    """
    try:
      image = None
      if self.is_plain_jpeg:
        data = np.frombuffer(self._data, np.uint8)
        flags = GRAY_FLAGS if self._gray else JPEG_FLAGS
        image = cv2.imdecode(data, flags[shrink])
        if image is not None and shrink > 1 and not self._gray:
          cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
      if image is None:
        image = _to_rgb(self._image)
        image = np.array(image.convert('L') if self._gray else image)
    except Exception as e:  # Both libraries raise many kinds.
      plain = stripped(self._data, exif=False)
      if plain is None or plain == self._data:
        raise Unreadable(str(e)) from e
      # Some damage shows no sooner than here.
      again = Encoded(plain, self._gray)
      again._orientation = 1
      image = again.pixels(shrink)
    if image.ndim == 2:
      image = image[..., None]
    return np.ascontiguousarray(TURNS[self._orientation](image))


def open_image(data: bytes) -> Image.Image:
  """Opens an image of FORMATS, of which only the header has been read.

  Raises:
    Unreadable: if it is none, or beyond the limits above.
  """
  image = _open(data)
  _check_size(image, data)
  return image


def _check_size(image: Image.Image, data: bytes) -> None:
  pixels = image.width * image.height
  if pixels > MOST_PIXELS:
    raise Unreadable(
        f'{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}'
    )
  if image.format in ('JPEG', 'MPO') and 'progressive' in image.info:
    scans = data.count(SCAN)
    if scans > MOST_SCANS or scans * pixels > MOST_WORK:
      raise Unreadable(f'{scans} scans of {pixels:,} pixels are too many')


def _open(data: bytes) -> Image.Image:
  try:
    return _opened(data)
  except Exception as e:  # Pillow raises many kinds.
    for exif in True, False:
      plain = stripped(data, exif)
      if plain is not None:
        try:
          return _opened(plain)
        except Exception:
          pass  # It is not the metadata.
    if isinstance(e, UnidentifiedImageError):
      raise Unreadable(
          'not an image' if not data.startswith(TIFF) else
          'a TIFF that is damaged, or neither gray nor RGB; one with other '
          'channels needs as many values in data.mean'
      ) from e
    raise Unreadable(str(e)) from e


def _opened(data: bytes) -> Image.Image:
  return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
  if image.format == 'TIFF':  # Pillow turns these itself.
    return 1
  try:
    found = image.getexif()[ORIENTATION]
  except Exception:  # None, or damaged. Pillow raises many kinds.
    return 1
  return found if found in TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == 'F':  # Of a TIFF. What is white there, nothing says.
    raise Unreadable('its pixels are floating-point numbers')
  if image.mode.startswith('I'):  # 16-bit gray; Pillow itself would clip it.
    gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
    return Image.fromarray(gray.astype(np.uint8)).convert('RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')
  return image.convert('RGB')
