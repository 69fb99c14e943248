"""Images of one channel, and of more than RGB has."""

import builtins
import io
import json
import zlib

import jax
import numpy as np
from PIL import Image, ImageOps
import pytest
import safetensors.numpy
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks
from mocov3_jax.data import channels, crops, pipeline
from mocov3_jax.method import augment
from mocov3_jax.sources import Unreadable, catalog

tifffile = pytest.importorskip('tifffile')
RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 256, (40, 52, 5), dtype=np.uint8)


def tiff(pixels, **options):
  file = io.BytesIO()
  tifffile.imwrite(file, pixels, photometric='minisblack', **options)
  return file.getvalue()


def encode(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize('data', [
    tiff(FIVE, planarconfig='contig'),
    tiff(np.moveaxis(FIVE, -1, 0), planarconfig='separate'),
    tiff(np.moveaxis(FIVE, -1, 0)),
    tiff(FIVE, planarconfig='contig', compression='zlib', predictor=True),
    tiff(FIVE, planarconfig='contig', tile=(16, 16), compression='zlib'),
    tiff(FIVE, planarconfig='contig', bigtiff=True, byteorder='>'),
    tiff(FIVE.astype(np.uint16) * 257, planarconfig='contig'),
    tiff(np.moveaxis(FIVE, -1, 0).astype(np.uint16) << 8),
], ids=['samples', 'planes', 'pages', 'deflated', 'tiles', 'big endian',
        '16 bits', '16 bits in pages'])
def test_a_tiff_of_five_channels_is_read_as_it_is(data):
  image = channels.opened(data, 5)
  assert (image.height, image.width) == (40, 52)
  pixels = image.pixels()
  np.testing.assert_array_equal(pixels, FIVE)
  assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous


@pytest.mark.parametrize('planar', [
    {'planarconfig': 'contig'}, {'planarconfig': 'separate'},
    {'planarconfig': 'contig', 'rowsperstrip': 16, 'compression': 'zlib'},
], ids=['samples', 'planes', 'strips'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_tiff_is_turned_as_its_orientation_says(planar, orientation):
  pixels = FIVE
  if planar['planarconfig'] == 'separate':
    pixels = np.moveaxis(FIVE, -1, 0)
  data = tiff(
      pixels, **planar, extratags=[(274, 'H', 1, orientation, True)]
  )
  # Pillow turns each channel on its own.
  exif = Image.Exif()
  exif[274] = orientation
  expected = [
      ImageOps.exif_transpose(Image.open(io.BytesIO(encode(
          Image.fromarray(FIVE[..., channel]), 'PNG', exif=exif
      )))) for channel in range(5)
  ]
  image = channels.opened(data, 5)
  np.testing.assert_array_equal(image.pixels(), np.stack(expected, axis=-1))
  assert (image.width, image.height) == expected[0].size


def test_an_orientation_that_is_none_turns_nothing():
  for found, code, count in (9, 'H', 1), ((6, 6), 'H', 2), (b'up', 's', 3):
    data = tiff(
        FIVE, planarconfig='contig',
        extratags=[(274, code, count, found, True)],
    )
    np.testing.assert_array_equal(channels.opened(data, 5).pixels(), FIVE)


def test_an_image_with_transparency_is_turned_as_its_orientation_says():
  exif = Image.Exif()
  exif[274] = 6
  data = encode(Image.fromarray(FIVE[..., :4], 'RGBA'), 'PNG', exif=exif)
  image = channels.opened(data, 4)
  np.testing.assert_array_equal(
      image.pixels(), np.rot90(FIVE[..., :4], axes=(1, 0))
  )
  assert (image.height, image.width) == (52, 40)


def test_transparency_is_a_fourth_channel_where_four_are_wanted():
  pixels = FIVE[..., :4]
  data = encode(Image.fromarray(pixels, 'RGBA'), 'PNG')
  np.testing.assert_array_equal(channels.opened(data, 4).pixels(), pixels)


def tampered(data, **values):
  """A TIFF with other values of its tags."""
  data = bytearray(data)
  with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
    for name, value in values.items():
      tag = file.pages[0].tags[name]
      size = {3: 2, 4: 4}[int(tag.dtype)]
      data[tag.valueoffset : tag.valueoffset + size] = value.to_bytes(
          size, 'little'
      )
  return bytes(data)


def damaged_deflate():
  """A TIFF whose one strip unpacks to a thousand times what it should."""
  data = tiff(np.zeros((8, 8, 5), np.uint8), planarconfig='contig',
              compression='zlib')
  strip = zlib.compress(bytes(320_000))
  return tampered(
      data, StripOffsets=len(data), StripByteCounts=len(strip)
  ) + strip


def sparse():
  """A TIFF whose one strip is left out, which libraries fill with zeros."""
  return tampered(tiff(FIVE, planarconfig='contig'), StripByteCounts=0)


def parts():
  """A TIFF with more tiles than cover it."""
  data = tiff(FIVE, planarconfig='contig', tile=(16, 16))
  return tampered(data, ImageLength=16)


@pytest.mark.parametrize('data, wanted, words', [
    (tiff(FIVE, planarconfig='contig'), 4, 'has 5 channels, and data.mean'),
    (tiff(np.moveaxis(FIVE, -1, 0)), 4, 'has 5 channels or more'),
    (tiff(np.moveaxis(FIVE, -1, 0)), 6, 'has 5 channels, and data.mean has 6'),
    (tiff(FIVE.astype(np.float32), planarconfig='contig'), 5, 'float32'),
    (encode(Image.fromarray(FIVE[..., :4], 'RGBA'), 'TIFF',
            compression='tiff_lzw'), 4, 'LZW'),
    (tiff(FIVE, planarconfig='contig')[:3000], 5, 'failed to read'),
    (tiff(FIVE, planarconfig='contig', tile=(4096, 16384),
          compression='zlib'), 5, 'bytes are more than 200,000,000'),
    (sparse(), 5, 'a part of it is missing'),
    (parts(), 5, 'parts, not'),
    (damaged_deflate(), 5, 'larger than its 320 bytes'),
    (encode(Image.fromarray(FIVE[..., :3]), 'PNG'), 5, 'has 3 channels'),
    (b'II*\0' + b'\xff' * 40, 5, 'TIFF|offset|page|range'),
    (b'no image', 5, 'not an image'),
], ids=['one less', 'a page less', 'a page more', 'floats', 'LZW', 'cut',
        'a large tile', 'sparse', 'more parts', 'a bomb', 'RGB', 'noise',
        'text'])
def test_what_cannot_be_read_says_why(data, wanted, words):
  with pytest.raises(Unreadable, match=words):
    channels.opened(data, wanted).pixels()


def test_rgb_of_a_tiff_with_five_channels_says_what_it_is():
  with pytest.raises(Unreadable, match=r'as many values in data\.mean'):
    channels.opened(tiff(FIVE, planarconfig='contig'), 3)


def test_without_the_package_the_extra_is_named(monkeypatch):
  known = builtins.__import__

  def without(name, *more):
    if name == 'tifffile':
      raise ImportError(name)
    return known(name, *more)

  data = tiff(FIVE, planarconfig='contig')
  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r'mocov3-jax\[channels\]'):
    channels.opened(data, 5)


PHOTO = Image.fromarray(
    np.add.outer(np.arange(120), np.arange(160)).astype(np.uint8)
).convert('RGB')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'GIF'])
def test_gray_is_pillows(kind):
  data = encode(PHOTO, kind)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(image.convert('RGB').convert('L'), int)
  pixels = channels.opened(data, 1).pixels()
  assert pixels.shape == (120, 160, 1)
  limit = 2 if kind == 'JPEG' else 0
  assert np.abs(pixels[..., 0] - expected).max() <= limit


def test_gray_jpegs_are_shrunk_and_turned_as_colours_are():
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(PHOTO, 'JPEG', exif=exif, quality=95)
  for shrink in 1, 2, 4, 8:
    gray = channels.opened(data, 1).pixels(shrink)
    colour = channels.opened(data, 3).pixels(shrink)
    assert gray.shape == (*colour.shape[:2], 1)
    # PHOTO has three equal channels.
    assert np.abs(gray.astype(int) - colour).max() <= 3


@pytest.mark.parametrize('box', [
    None, crops.Box(3, 5, 30, 40), crops.Box(1.5, 2.25, 20.5, 30.5),
    crops.Box(0, 0, 40, 52),
])
@pytest.mark.parametrize('count', [1, 2, 5, 9])
def test_each_channel_is_resized_as_if_it_were_alone(box, count):
  image = np.ascontiguousarray(np.tile(FIVE, 2)[..., :count])
  # Rounding; and within pixels, OpenCV places some numbers of channels at 32nds
  # of a pixel: noise of 255 then differs by 255 / 64 in each direction.
  limit = 8 if box and box.top % 1 else 1
  for side in 7, 16, 60:
    whole = np.empty((side, side, count), np.uint8)
    crops.resize(image, whole, box)
    for c in range(count):
      alone = np.empty((side, side, 3), np.uint8)
      crops.resize(np.repeat(image[..., c : c + 1], 3, axis=-1), alone, box)
      difference = np.abs(whole[..., c].astype(int) - alone[..., 0])
      assert difference.max() <= limit


def test_brightness_contrast_and_solarize_of_five_channels():
  view = tiny.config(**tiny.COLOUR).augment.view1
  image = FIVE[:8, :8].astype(np.float32) / 255
  drawn = augment.draw_params(jax.random.key(0), view, 8, 8)
  drawn = drawn.replace(
      box=(0.0, 0.0, 8.0, 8.0), jitter=np.bool_(True), flip=np.bool_(False),
      gray=np.bool_(False), solarize=np.bool_(True),
      factors=np.float32([1.2, 0.6, 1.0, 0.0]), order=np.array([0, 1, 2, 3]),
  )
  view = view.copy_and_resolve_references().unlock()
  view.update({'gray_prob': 0.0, 'solarize_prob': 1.0, 'blur_prob': 0.0})
  got = augment.apply(image, drawn, view, 8)
  bright = np.clip(1.2 * image, 0, 1)
  want = np.clip(0.6 * bright + 0.4 * bright.mean(), 0, 1)
  want = np.where(want >= 128 / 255, 1 - want, want)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_operations_on_rgb_are_refused_by_name():
  config = tiny.config(**tiny.COLOUR)
  config.data.mean = config.data.std = (0.5,) * 5
  with pytest.raises(UserError) as e:
    checks.validate(config)
  for field in 'gray_prob=0.2', 'saturation=0.2', 'hue=0.1':
    assert f'augment.view1.{field}' in str(e.value)
  for view in config.augment.values():
    view.gray_prob = view.saturation = view.hue = 0.0
  checks.validate(config)


def write(root, make, count=24):
  """Two classes of pictures of several sizes: dark and light ones."""
  rng = np.random.default_rng(1)
  for number in range(count):
    folder = root / ('dark', 'light')[number % 2]
    folder.mkdir(parents=True, exist_ok=True)
    low = 140 * (number % 2)
    size = 20 + number % 5, 24 + number % 3
    make(folder / f'{number:02}.tif', rng, low, size)


def five(path, rng, low, size):
  tifffile.imwrite(
      path, rng.integers(low, low + 110, (*size, 5), dtype=np.uint8),
      photometric='minisblack', planarconfig='contig',
  )


def gray(path, rng, low, size):
  Image.fromarray(
      rng.integers(low, low + 110, size, dtype=np.uint8)
  ).save(path)


def flags(folder, count):
  overrides = {
      'data.source': f'folder:{folder}', 'data.mean': (0.5,) * count,
      'data.std': (0.25,) * count, 'data.image_size': 8, 'batch_size': 16,
      'schedule.epochs': 2.0, 'schedule.warmup_epochs': 0.0, 'knn.k': 3,
  }
  for view in 'view1', 'view2':
    for field in 'gray_prob', 'saturation', 'hue':
      overrides[f'augment.{view}.{field}'] = 0.0
  return tiny.flags(**overrides)


@pytest.mark.parametrize('make, count', [
    (five, 5), pytest.param(gray, 1, marks=pytest.mark.slow)
])
def test_such_a_folder_trains_evaluates_and_converts(tmp_path, make, count):
  write(tmp_path / 'images', make)
  run = tmp_path / 'run'
  arguments = flags(tmp_path / 'images', count)
  code, out, err = tiny.call('train', f'--workdir={run}', *arguments)
  assert code == 0, err
  # Dark and light are told apart by any network that sees them.
  assert json.loads(out.splitlines()[-1])['knn/top1'] == 1.0
  code, out, err = tiny.call(
      'evaluate', '--config=configs/eval_linear.py:small',
      f'--config.checkpoint={run}', f'--workdir={tmp_path / "linear"}',
      '--config.batch_size=8', '--config.schedule.epochs=1',
  )
  assert code == 0, err
  code, out, err = tiny.call(
      'convert', f'--from={run}', f'--to=timm:{tmp_path / "timm"}'
  )
  assert code == 0, err
  description = json.loads((tmp_path / 'timm' / 'config.json').read_text())
  assert description['model_args']['in_chans'] == count
  assert description['pretrained_cfg']['mean'] == [0.5] * count
  weights = safetensors.numpy.load_file(
      tmp_path / 'timm' / 'model.safetensors'
  )
  assert weights['patch_embed.proj.weight'].shape == (16, count, 4, 4)
  code, out, err = tiny.call(
      'convert', f'--from=timm:{tmp_path / "timm"}',
      f'--to={tmp_path / "again"}',
  )
  assert code == 0, err
  code, out, err = tiny.call(
      'preview', *arguments, f'--out={tmp_path / "views.png"}'
  )
  assert code == 0, err
  with Image.open(tmp_path / 'views.png') as image:
    assert image.width > 100


@pytest.mark.parametrize('count, words', [
    (4, 'has 5 channels'), (3, 'neither gray nor RGB')
])
def test_the_wrong_number_of_channels_ends_with_what_there_is(
    tmp_path, count, words
):
  write(tmp_path / 'images', five)
  code, out, err = tiny.call(
      'train', f'--workdir={tmp_path / "run"}',
      *flags(tmp_path / 'images', count),
  )
  assert code == 2 and not out and words in err, err


def test_fine_tuning_refuses_randaugment_of_five_channels(tmp_path):
  write(tmp_path / 'images', five)
  config = tiny.config(**{
      'data.source': f'folder:{tmp_path / "images"}',
      'data.mean': (0.5,) * 5, 'data.std': (0.25,) * 5,
  })
  run = tiny.random_run(tmp_path / 'run', config)
  code, _, err = tiny.call(
      'evaluate', '--config=configs/eval_finetune.py:small',
      f'--config.checkpoint={run}', f'--workdir={tmp_path / "out"}',
      '--config.finetune.rand_augment=9.0', '--config.batch_size=8',
  )
  assert code == 2 and 'finetune.rand_augment=9.0' in err, err


def test_pixels_of_a_folder_are_those_of_its_files(tmp_path):
  write(tmp_path / 'images', five, count=4)
  source = catalog.load(f'folder:{tmp_path / "images"}', channels=5).train
  boxes = lambda height, width: [crops.Box(0, 0, height, width)]
  for number in range(len(source)):
    pixels = tifffile.imread(tmp_path / 'images' / source.name(number))
    out = np.empty((1, *pixels.shape), np.uint8)
    pipeline.read_crops(source, number, boxes, out)
    np.testing.assert_array_equal(out[0], pixels)
