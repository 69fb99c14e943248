"""Decodes images to pixels: JPEG by OpenCV, everything else by Pillow."""

import io

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from mocov3_jax.data.metadata import stripped
from mocov3_jax.sources import Unreadable

# Called on import, not at the first image: Pillow loads its formats without a
# lock.
Image.init()
# The only formats that are tried. Pillow knows more, but some of them start
# other programs.
FORMATS = 'JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM'
# Maximum pixels of an image, scans of a progressive JPEG, and pixels times
# scans: a small file could otherwise take minutes and gigabytes.
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
# The orientations that reverse the rows, and those that reverse the columns.
UP_TO_DOWN, LEFT_TO_RIGHT = (3, 4, 7, 8), (2, 3, 6, 7)
# OpenCV's flags by the factor that it shrinks a JPEG by while decoding it. All
# flags but the first give BGR.
JPEG_FLAGS = {
    1: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_REDUCED_COLOR_8,
}
# End-of-image marker of a JPEG, and how many bytes may follow it.
EOI, TRAILER = b'\xff\xd9', 64
# JPEG_FLAGS for gray images, which need no conversion of channels.
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
      data: the bytes of an image file in one of FORMATS.
      gray: whether its pixels are to have one gray channel instead of RGB.

    Raises:
      Unreadable: if it is not an image, or exceeds the limits above.
    """
    self._data, self._gray = data, gray
    self._image = open_image(data)
    self.width, self.height = self._image.size
    self._orientation = orientation(self._image)
    if self._orientation >= 5:
      self.width, self.height = self.height, self.width

  @property
  def is_plain_jpeg(self) -> bool:
    """Whether OpenCV decodes the image correctly: a whole JPEG, gray or RGB.

    OpenCV silently fills a truncated JPEG with gray. So a file without the
    end-of-image marker is left to Pillow, which reports the damage.
    """
    return (
        self._image.format in ('JPEG', 'MPO')
        and self._image.mode in ('RGB', 'L')
        and EOI in self._data[-TRAILER:]
    )

  def begins(self, shrink: int) -> tuple[int, int]:
    """Returns where the image begins in the result of `pixels`.

    A shrunk JPEG is rounded up to whole pixels at its right and lower edges.
    Its orientation may turn these edges to the left and to the top.

    Returns:
      Rows and columns before the image, in pixels of the full-size image.
    """
    rows, columns = (-side % shrink for side in (self.height, self.width))
    return (
        rows if self._orientation in UP_TO_DOWN else 0,
        columns if self._orientation in LEFT_TO_RIGHT else 0,
    )

  def pixels(self, shrink: int = 1) -> np.ndarray:
    """Decodes the image.

    Transparent images are composited on white. 16-bit images keep their high
    byte. Animated images give their first frame.

    Args:
      shrink: 1, 2, 4 or 8. A JPEG comes out this many times smaller (rounded
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
      # Some damage shows only in decoding.
      again = Encoded(plain, self._gray)
      again._orientation = 1
      image = again.pixels(shrink)
    if image.ndim == 2:
      image = image[..., None]
    return np.ascontiguousarray(TURNS[self._orientation](image))


def open_image(data: bytes) -> Image.Image:
  """Opens an image in one of FORMATS, and reads only its header.

  Raises:
    Unreadable: if it is not such an image, or exceeds the limits above.
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
          pass  # The damage is not in the metadata.
    if isinstance(e, UnidentifiedImageError):
      raise Unreadable(
          'not an image' if not data.startswith(TIFF) else
          'a TIFF that is damaged, or neither gray nor RGB (which needs as '
          'many values in data.mean as it has channels)'
      ) from e
    raise Unreadable(str(e)) from e


def _opened(data: bytes) -> Image.Image:
  return Image.open(io.BytesIO(data), formats=FORMATS)


def orientation(image: Image.Image) -> int:
  """Returns how an image lies by its EXIF data, a key of TURNS."""
  if image.format == 'TIFF':  # Pillow turns these itself.
    return 1
  try:
    found = image.getexif()[ORIENTATION]
  except Exception:  # No EXIF, or damaged. Pillow raises many kinds.
    return 1
  return found if found in TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == 'F':  # A TIFF; nothing says which value is white.
    raise Unreadable('its pixels are floating-point numbers')
  if image.mode.startswith('I'):  # 16-bit gray; Pillow itself would clip it.
    gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
    return Image.fromarray(gray.astype(np.uint8)).convert('RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')
  return image.convert('RGB')
