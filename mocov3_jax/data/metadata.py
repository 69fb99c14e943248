"""Removes from encoded images what is not part of the picture.

Cameras, editors and transfers leave damaged metadata in files whose pixels are
intact: an EXIF block without its header, a colour profile or a comment of
megabytes, a wrong checksum of a text. Pillow refuses such files.
"""

from collections.abc import Iterator
import struct
import zlib

PNG = b'\x89PNG\r\n\x1a\n'
# The chunks of a PNG that the picture needs, and its EXIF block, which holds
# the orientation.
PNG_KEPT = (b'IHDR', b'PLTE', b'tRNS', b'IDAT', b'IEND', b'eXIf')
JPEG = b'\xff\xd8'
# Of a JPEG's APP0 to APP15 segments and comments, only these are kept: JFIF,
# EXIF, and Adobe's, which gives the colour space.
JPEG_KEPT = {0xE0: b'JFIF\0', 0xE1: b'Exif\0\0', 0xEE: b'Adobe'}
# The flags in a WebP's header of the metadata that may be removed.
WEBP_FLAGS = {b'ICCP': 0b100000, b'EXIF': 0b1000, b'XMP ': 0b100}


def stripped(data: bytes, exif: bool) -> bytes | None:
  """Returns an image without damaged or superfluous metadata.

  Args:
    data: the bytes of a PNG, JPEG or WebP file.
    exif: whether to keep the EXIF block, which holds the orientation.

  Returns:
    The bytes of the same picture; None if the file has another format, or its
    parts cannot be told apart.
  """
  try:
    if data.startswith(PNG):
      return PNG + b''.join(_png(data, exif))
    if data.startswith(JPEG):
      return JPEG + b''.join(_jpeg(data, exif))
    if data[:4] == b'RIFF' and data[8:12] == b'WEBP':
      body = b'WEBP' + b''.join(_webp(data, exif))
      return b'RIFF' + struct.pack('<I', len(body)) + body
  except (struct.error, IndexError):  # Cut off within a part.
    pass
  return None


def _png(data: bytes, exif: bool) -> Iterator[bytes]:
  place = len(PNG)
  while place < len(data):
    (length,) = struct.unpack_from('>I', data, place)
    kind = data[place + 4:place + 8]
    chunk = data[place:place + 12 + length]
    kept = kind in PNG_KEPT
    if kind == b'eXIf':
      checksum = zlib.crc32(chunk[4:-4]).to_bytes(4, 'big')
      kept = exif and chunk[-4:] == checksum
    if kept:
      yield chunk
    place += len(chunk)


def _jpeg(data: bytes, exif: bool) -> Iterator[bytes]:
  place = len(JPEG)
  while True:
    mark, kind, length = struct.unpack_from('>BBH', data, place)
    if mark != 0xFF or kind == 0xDA:  # The scan, to the end.
      yield data[place:]
      return
    segment = data[place:place + 2 + length]
    kept = not (0xE0 <= kind <= 0xEF or kind == 0xFE)
    if kind in JPEG_KEPT and segment[4:].startswith(JPEG_KEPT[kind]):
      kept = exif or kind != 0xE1
    if kept:
      yield segment
    place += len(segment)


def _webp(data: bytes, exif: bool) -> Iterator[bytes]:
  dropped = {k: v for k, v in WEBP_FLAGS.items() if not exif or k != b'EXIF'}
  place = 12
  while place < len(data):
    kind = data[place:place + 4]
    (length,) = struct.unpack_from('<I', data, place + 4)
    chunk = data[place:place + 8 + length + length % 2]
    if kind == b'VP8X':
      flags = chunk[8] & ~sum(dropped.values())
      chunk = chunk[:8] + bytes([flags]) + chunk[9:]
    if kind not in dropped:
      yield chunk
    place += len(chunk)
