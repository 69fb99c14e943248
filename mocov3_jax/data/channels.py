"""Images with any number of channels: gray, RGB, or those of a satellite.

Images are read with as many channels as `data.mean` has values. Every image can
be converted to three channels (RGB) or one (gray). Any other number must be the
image's own: that of a TIFF with as many samples per pixel or as many pages, or
of an image with an alpha channel or the like.
"""

from collections.abc import Iterator
import io
import itertools
import logging
import math
from typing import Any
import zlib

import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.data import decode
from mocov3_jax.sources import Unreadable

# Maximum bytes of an image's pixels, including the padding of tiles.
MOST_BYTES = 4 * decode.MOST_PIXELS
# Compression codes of a TIFF: none, and the two codes for deflate.
NONE, DEFLATE = 1, (8, 32946)
# Photometric interpretation of a TIFF in which 0 is white.
WHITE_IS_ZERO = 0


def opened(data: bytes, channels: int) -> 'decode.Encoded | Planes':
  """Reads the header of an encoded image.

  Args:
    data: the bytes of an image file.
    channels: number of channels that its pixels are to have.

  Raises:
    Unreadable: if it is not an image, exceeds the limits, or has another number
      of channels.
    UserError: for a TIFF, if the package that reads it is not installed.
  """
  if channels in (1, 3):
    return decode.Encoded(data, gray=channels == 1)
  return Planes(data, channels)


class Planes:
  """An image with neither one nor three channels, used like a `decode.Encoded`.

  Attributes:
    height, width: pixels, as shown (the orientation is applied).
  """

  def __init__(self, data: bytes, channels: int):
    """Reads the header.

    Args:
      data: the bytes of an image file.
      channels: number of channels that it must have.

    Raises:
      Unreadable: if it is not an image, exceeds the limits, or has another
        number of channels.
      UserError: for a TIFF, if the package that reads it is not installed.
    """
    self._image, self._pages = None, []
    if data.startswith(decode.TIFF):
      self._pages = _pages(data, channels)
      sides = self._pages[0].axes, self._pages[0].shape
      self.height, self.width = (sides[1][sides[0].index(a)] for a in 'YX')
      self._orientation = _orientation(self._pages[0])
    else:
      self._image = decode.open_image(data)
      self.width, self.height = self._image.size
      self._orientation = decode.orientation(self._image)
      if len(self._image.getbands()) != channels:
        raise _wrong(len(self._image.getbands()), channels)
    if self._orientation >= 5:
      self.width, self.height = self.height, self.width

  def begins(self, shrink: int) -> tuple[int, int]:
    """Returns zeros; see `Encoded.begins`."""
    del shrink
    return 0, 0

  def pixels(self, shrink: int = 1) -> np.ndarray:
    """Decodes the whole image; 16-bit values keep their high byte.

    Returns:
      uint8 [H, W, channels], C-contiguous.

    Raises:
      Unreadable: if it is damaged.
    """
    del shrink
    try:
      if self._image is not None:
        found = np.asarray(self._image)
      else:
        found = self._planes()
    except Exception as e:  # Both libraries raise many kinds.
      raise Unreadable(str(e)) from e
    if found.dtype == np.uint16:
      found = found >> 8
    turned = decode.TURNS[self._orientation](found)
    return np.ascontiguousarray(turned, np.uint8)

  def _planes(self) -> np.ndarray:
    """Returns the pages of a TIFF as [H, W, channels]."""
    planes = [page.asarray(maxworkers=1) for page in self._pages]
    axes = self._pages[0].axes
    if axes == 'YX':
      return np.stack(planes, axis=-1)
    return np.moveaxis(planes[0], 0, -1) if axes == 'SYX' else planes[0]


def _pages(data: bytes, channels: int) -> list[Any]:
  """Returns the pages of a TIFF with its channels: one for all, or one each."""
  try:
    import tifffile
  except ImportError as e:
    raise UserError(
        'TIFF images whose number of channels (data.mean) is neither one nor '
        'three are read by the package tifffile, which is not installed. Use '
        "pip install 'mocov3-jax[channels]'."
    ) from e
  # Errors are reported once, by the code that reads the image.
  logging.getLogger('tifffile').setLevel(logging.CRITICAL)
  try:
    # Looks for no more pages than needed: there may be millions.
    file = tifffile.TiffFile(io.BytesIO(data))
    pages = list(itertools.islice(_each(file.pages), channels + 1))
    found = pages[0].axes, pages[0].shape, pages[0].dtype
    one = 'S' in found[0]
    if one:
      pages = pages[:1]
    if any((page.axes, page.shape, page.dtype) != found for page in pages):
      raise Unreadable('its pages differ in size or type')
    count = found[1][found[0].index('S')] if one else len(pages)
    if found[0] not in ('YX', 'YXS', 'SYX'):
      raise Unreadable(f'its axes are {found[0]}, not one image')
    if count != channels:
      raise _wrong(count, channels, or_more=not one)
    if any(
        page.dtype not in (np.uint8, np.uint16)
        or page.bitspersample != 8 * page.dtype.itemsize
        or page.photometric == WHITE_IS_ZERO for page in pages
    ):
      raise Unreadable(
          f'its pixels are {found[2]} of {pages[0].bitspersample} bits, '
          f'{pages[0].photometric.name}; with this many channels, only 8-bit '
          'and 16-bit pixels in which 0 is black can be read'
      )
    whole = sum(map(_bytes, pages))
    if whole > MOST_BYTES:
      raise Unreadable(f'{whole:,} bytes are more than {MOST_BYTES:,}')
    for page in pages:
      _check_parts(data, page)
  except (Unreadable, UserError):
    raise
  except Exception as e:  # tifffile raises many kinds.
    raise Unreadable(str(e)) from e
  return pages


def _each(pages: Any) -> Iterator[Any]:
  for number in itertools.count():
    try:
      yield pages[number]
    except IndexError:
      return


def _orientation(page: Any) -> int:
  """Returns how a page lies, a key of decode.TURNS."""
  if decode.ORIENTATION not in page.tags:
    return 1
  found = page.tags[decode.ORIENTATION].value
  return found if isinstance(found, int) and found in decode.TURNS else 1


def _bytes(page: Any) -> int:
  """Returns the bytes of a page's strips or tiles, unpacked."""
  parts, values = math.prod(page.chunked), math.prod(page.chunks)
  return parts * values * page.dtype.itemsize


def _check_parts(data: bytes, page: Any) -> None:
  """Raises Unreadable if a part of a page is missing or unpacks to too much.

  Libraries unpack a part completely, however large it turns out to be, and fill
  in missing parts.
  """
  counts = len(page.dataoffsets), len(page.databytecounts)
  if counts != (math.prod(page.chunked),) * 2:
    raise Unreadable(f'has {counts[0]} parts, not {math.prod(page.chunked)}')
  if not all(page.dataoffsets) or not all(page.databytecounts):
    raise Unreadable('a part of it is missing')
  if page.compression == NONE:
    return
  if page.compression not in DEFLATE:
    raise Unreadable(
        f'compressed by {page.compression.name}; with this many channels, only '
        'images without compression or with deflate can be read'
    )
  whole = math.prod(page.chunks) * page.dtype.itemsize
  for begin, size in zip(page.dataoffsets, page.databytecounts, strict=True):
    unpacked, part = zlib.decompressobj(), data[begin : begin + size]
    if len(unpacked.decompress(part, whole + 1)) > whole:
      raise Unreadable(f'a part of it is larger than its {whole:,} bytes')


def _wrong(found: int, wanted: int, or_more: bool = False) -> Unreadable:
  more = ' or more' if or_more and found > wanted else ''
  return Unreadable(
      f'has {found} channels{more}, and data.mean has {wanted} values'
  )
