"""Every kind of image file becomes the same RGB pixels that Pillow sees."""

import io
import os
import struct
import zlib

import numpy as np
import photos
from PIL import Image, ImageOps
import pytest

from mocov3_jax.data.decode import Encoded, Unreadable
from mocov3_jax.data.metadata import stripped

PHOTO = Image.fromarray(photos.photographs()['china'][:120, :160])


def encode(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def difference(a, b):
  return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'BMP', 'GIF'])
def test_each_format_equals_pillow(kind):
  data = encode(PHOTO, kind)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(image.convert('RGB'))
  encoded = Encoded(data)
  assert (encoded.height, encoded.width) == (120, 160)
  # Two JPEG decoders may round differently, and smooth chroma differently.
  limit = 3 if kind == 'JPEG' else 0
  assert difference(encoded.pixels(), expected).max() <= limit


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'CMYK', 'YCbCr'])
def test_each_colour_mode_equals_pillow(mode):
  kind = {'CMYK': 'JPEG', 'YCbCr': 'JPEG'}.get(mode, 'PNG')
  data = encode(PHOTO.convert(mode), kind)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(image.convert('RGB'))
  pixels = Encoded(data).pixels()
  assert pixels.shape == (120, 160, 3) and pixels.dtype == np.uint8
  assert difference(pixels, expected).max() <= (3 if kind == 'JPEG' else 0)


def test_sixteen_bit_gray_keeps_its_high_byte():
  values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
  data = encode(Image.fromarray(values), 'PNG')
  np.testing.assert_array_equal(
      Encoded(data).pixels()[..., 0], (values >> 8).astype(np.uint8)
  )


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA'])
def test_transparent_pixels_are_white(mode):
  image = Image.new('RGBA', (4, 2), (10, 20, 30, 255))
  image.putpixel((0, 0), (10, 20, 30, 0))
  if mode == 'PA':
    data = encode(image.convert('P'), 'PNG', transparency=0)
    pixels = Encoded(data).pixels()
    assert pixels.shape == (2, 4, 3)
    return
  pixels = Encoded(encode(image.convert(mode), 'PNG')).pixels()
  assert pixels[0, 0].tolist() == [255, 255, 255]
  assert pixels[1, 1].max() <= 30


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_the_exif_orientation_is_applied(orientation, kind):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(PHOTO, kind, exif=exif)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(ImageOps.exif_transpose(image))
  encoded = Encoded(data)
  assert (encoded.height, encoded.width) == expected.shape[:2]
  assert difference(encoded.pixels(), expected).max() <= 3
  small = encoded.pixels(2)
  if kind == 'JPEG':
    assert small.shape[:2] == (expected.shape[0] // 2, expected.shape[1] // 2)


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
# One entry, the orientation 6: as a BYTE, and as a big-endian LONG.
EXIF = {
    'byte': b'II*\0\x08\0\0\0\x01\0\x12\x01\x01\0\x01\0\0\0\x06\0\0\0',
    'long': b'MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x06',
}


@pytest.mark.parametrize('kind', ['xmp', 'byte', 'long'])
def test_unusual_orientations_are_read_one_way_only(kind):
  data = encode(PHOTO, 'JPEG')
  text = XMP if kind == 'xmp' else b'Exif\0\0' + EXIF[kind] + bytes(4)
  segment = b'\xff\xe1' + (len(text) + 2).to_bytes(2, 'big') + text
  data = data[:2] + segment + data[2:]
  encoded = Encoded(data)
  # Whatever it was understood to be, header and pixels agree.
  for shrink in 1, 2, 4:
    small = encoded.pixels(shrink)
    assert small.shape[:2] == (
        -(-encoded.height // shrink), -(-encoded.width // shrink)
    )
  if kind == 'xmp':
    assert (encoded.height, encoded.width) == (160, 120)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_a_repaired_picture_is_turned_as_before(kind):
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(PHOTO, kind, exif=exif, icc_profile=b'no profile')
  repaired = stripped(data, exif=True)
  assert b'no profile' not in repaired
  np.testing.assert_array_equal(
      Encoded(repaired).pixels(), Encoded(data).pixels()
  )
  assert Encoded(stripped(data, exif=False)).pixels().shape == (
      PHOTO.height, PHOTO.width, 3
  )


def test_an_animation_gives_its_first_frame():
  frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
  data = encode(
      frames[0], 'GIF', save_all=True, append_images=frames[1:]
  )
  assert Encoded(data).pixels()[0, 0].tolist() == [255, 0, 0]


def test_a_jpeg_decoded_smaller_looks_the_same():
  photo = Image.fromarray(photos.photographs()['flower'])
  data = encode(photo, 'JPEG', quality=95)
  for shrink in 2, 4, 8:
    small = Encoded(data).pixels(shrink)
    expected = photo.resize(small.shape[1::-1], Image.Resampling.BOX)
    assert difference(small, expected).mean() < 4
    # The same brightness, and nothing moved.
    assert abs(small.mean() - np.asarray(photo).mean()) < 1
    moved = np.roll(small, 1, axis=1)
    assert difference(small, expected).mean() < difference(
        moved, expected).mean() / 2


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP'])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.3, 0.9])
def test_a_truncated_file_is_unreadable(kind, share):
  data = encode(PHOTO, kind)
  with pytest.raises(Unreadable):
    Encoded(data[:int(share * len(data))]).pixels()


def test_a_jpeg_with_a_preview_inside_is_truncated_all_the_same():
  # The preview in the EXIF data has an end marker of its own.
  thumbnail = encode(PHOTO.resize((32, 24)), 'JPEG')
  exif = Image.Exif()
  exif[0x9286] = b'ASCII\0\0\0' + thumbnail
  data = encode(PHOTO, 'JPEG', exif=exif)
  assert data.count(b'\xff\xd9') == 2
  Encoded(data).pixels()
  with pytest.raises(Unreadable):
    Encoded(data[: int(0.9 * len(data))]).pixels()


def test_what_follows_the_end_of_a_jpeg_does_not_matter():
  data = encode(PHOTO, 'JPEG')
  whole = Encoded(data).pixels()
  np.testing.assert_array_equal(Encoded(data + b'\0' * 99).pixels(), whole)


def test_noise_is_unreadable():
  with pytest.raises(Unreadable):
    Encoded(os.urandom(1000))
  with pytest.raises(Unreadable):
    Encoded(b'')


PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def chunk(kind, data, crc=None):
  crc = zlib.crc32(kind + data) if crc is None else crc
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)


def png(before=b'', after=b'', end=b''):
  """A PNG of PIXELS with more chunks before and after the pixels."""
  rows = b''.join(b'\0' + row.tobytes() for row in PIXELS)
  return b''.join([
      b'\x89PNG\r\n\x1a\n',
      chunk(b'IHDR', struct.pack('>IIBBBBB', 64, 48, 8, 2, 0, 0, 0)), before,
      chunk(b'IDAT', zlib.compress(rows)), after, chunk(b'IEND', b''), end,
  ])


TURNED = b'MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0'
WRONG_TEXT = chunk(b'tEXt', b'Comment\0abc', crc=0)


@pytest.mark.parametrize('before', [
    chunk(b'eXIf', b'\x00\x08\x00\x02\x01\x12\x00\x03'),
    chunk(b'eXIf', b"b'Exif\\x00\\x00MM"), chunk(b'eXIf', b''),
    chunk(b'tEXt', b'Raw profile type exif\0\nexif\n      10\n4578zz\n'),
    chunk(b'iCCP', b'icc\0\0' + zlib.compress(bytes(2 << 20))),
    chunk(b'iCCP', b'no profile'),
    chunk(b'zTXt', b'Comment\0\0' + zlib.compress(b'a' * (2 << 20))),
    chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0<broken'), WRONG_TEXT,
    chunk(b'tIME', b'\0'), chunk(b'pHYs', b'\0'), chunk(b'gAMA', b''),
])
@pytest.mark.parametrize('where', ['before', 'after'])
def test_damaged_metadata_of_a_png_leaves_the_picture(before, where):
  data = png(**{where: before})
  np.testing.assert_array_equal(Encoded(data).pixels(), PIXELS)


def test_a_png_is_not_turned_by_exif_with_a_wrong_checksum():
  data = png(before=chunk(b'eXIf', TURNED, crc=0))
  np.testing.assert_array_equal(Encoded(data).pixels(), PIXELS)


@pytest.mark.parametrize('where', ['before', 'after'])
def test_beside_damaged_text_a_png_is_turned_all_the_same(where):
  data = png(**{where: chunk(b'eXIf', TURNED) + WRONG_TEXT})
  encoded = Encoded(data)
  assert (encoded.height, encoded.width) == (48, 64)
  np.testing.assert_array_equal(encoded.pixels(), PIXELS[::-1, ::-1])


@pytest.mark.parametrize('exif', [b'This_is_not_EXIF', b'Exif\0\0MM', b''])
@pytest.mark.parametrize('kind', ['WEBP', 'JPEG'])
def test_damaged_exif_leaves_the_picture(kind, exif):
  data = encode(Image.fromarray(PIXELS), kind, exif=exif, quality=95)
  assert Encoded(data).pixels().shape == (48, 64, 3)


@pytest.mark.parametrize('kind', [0xE1, 0xE2, 0xED, 0xFE])
@pytest.mark.parametrize('text', [
    b'', b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', b'ICC_PROFILE\0',
    b'Photoshop 3.0\x008BIM\x04', b'MPF\0MM\0*',
])
def test_damaged_segments_of_a_jpeg_leave_the_picture(kind, text):
  data = encode(PHOTO, 'JPEG')
  expected = Encoded(data).pixels()
  segment = b'\xff' + bytes([kind]) + struct.pack('>H', 2 + len(text)) + text
  damaged = data[:2] + segment + data[2:]
  np.testing.assert_array_equal(Encoded(damaged).pixels(), expected)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_tiff_by_another_name_is_turned_once(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(PHOTO, 'TIFF', exif=exif)
  with Image.open(io.BytesIO(encode(PHOTO, 'PNG', exif=exif))) as image:
    expected = np.asarray(ImageOps.exif_transpose(image))
  encoded = Encoded(data)
  assert (encoded.height, encoded.width) == expected.shape[:2]
  np.testing.assert_array_equal(encoded.pixels(), expected)


@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
def test_damaged_metadata_does_not_hide_damaged_pixels(share):
  data = png(before=WRONG_TEXT)
  with pytest.raises(Unreadable):
    Encoded(data[:int(len(data) * share)]).pixels()
