"""Random-resized crops on the host: torchvision's boxes, Pillow's pixels."""

import io

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import photos
from PIL import Image
import pytest
from scipy import stats
import tiny

from mocov3_jax.data import crops, pipeline
from mocov3_jax.data.decode import Encoded, Unreadable
from mocov3_jax.method import augment

VIEW = tiny.config().augment.view1


def boxes(count, height, width, seed=0):
  return [
      crops.random_box(n, height, width, VIEW)
      for n in np.random.default_rng(seed).random((count, crops.NUMBERS))
  ]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**32 - 1))
def test_a_box_lies_within_the_image(height, width, seed):
  (box,) = boxes(1, height, width, seed)
  assert 0 <= box.top <= box.top + box.height <= height
  assert 0 <= box.left <= box.left + box.width <= width
  assert box.height > 0 and box.width > 0


def resize(image, size):
  out = np.empty((size, size, 3), np.uint8)
  crops.resize(image, out)
  return out


def cut(encoded, boxes, size):
  out = np.empty((len(boxes), size, size, 3), np.uint8)
  crops.cut(encoded, boxes, out)
  return out


def test_areas_and_ratios_are_distributed_as_asked():
  # In a square all but the largest, most oblong boxes fit at once.
  drawn = np.array(boxes(4000, 1000, 1000))
  area = drawn[:, 2] * drawn[:, 3] / 1e6
  ratio = np.log(drawn[:, 3] / drawn[:, 2])
  small = area < 0.7
  uniform = stats.uniform(0.08, 0.62)
  assert stats.kstest(area[small], uniform.cdf).pvalue > 1e-3
  limit = np.log(4 / 3)
  uniform = stats.uniform(-limit, 2 * limit)
  assert stats.kstest(ratio[small], uniform.cdf).pvalue > 1e-3


def test_the_place_of_a_box_is_uniform():
  drawn = np.array(boxes(4000, 600, 600))
  room = 600 - drawn[:, 2]
  share = (drawn[:, 0] + 0.5) / (room + 1)
  assert stats.kstest(share[room > 50], 'uniform').pvalue > 1e-3


@pytest.mark.parametrize(
    'height, width, expected',
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))],
)
def test_an_oblong_image_falls_back_to_its_centre(height, width, expected):
  # Only areas of a third and more, which fit in no way.
  numbers = np.full(crops.NUMBERS, 0.9)
  box = crops.random_box(numbers, height, width, VIEW)
  assert box == expected


def test_the_boxes_of_an_example_are_pinned():
  # Changing them would change the continuation of every run there is.
  views = augment.both_views(tiny.config().augment)
  first, second = pipeline.draw_boxes(0, 5, 375, 500, views)
  assert first == (48, 155, 237, 242)
  assert second == (55, 162, 239, 249)
  assert pipeline.draw_boxes(0, 6, 375, 500, views)[0] != first
  assert pipeline.draw_boxes(1, 5, 375, 500, views)[0] != first


@pytest.mark.parametrize(
    'scale',
    [0.3, 0.7, 1.0, 1.2, 1.5, 1.9, 2.5, 3.9, 4.0, 4.1, 6.0, 9.3, 17.0],
)
def test_resizing_is_close_to_pillows(scale):
  size = 64
  for name in 'china', 'flower', 'coffee', 'astronaut':
    side = round(size * scale)
    image = np.ascontiguousarray(
        photos.photographs()[name][:round(0.9 * side), :side]
    )
    expected = Image.fromarray(image).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    difference = resize(image, size).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 2  # Of 255.


@pytest.mark.parametrize('side', [900, 2000])
@pytest.mark.parametrize('size', [8, 32, 224])
def test_shrinking_costs_no_more_the_farther_it_goes(
    side, size, monkeypatch
):
  touched = []  # Products of a blur: its taps at every pixel.
  blur = crops.cv2.sepFilter2D

  def counted(image, depth, across, down, **options):
    touched.append(image.shape[0] * image.shape[1] * (len(across) + len(down)))
    return blur(image, depth, across, down, **options)

  monkeypatch.setattr(crops.cv2, 'sepFilter2D', counted)
  image = np.zeros((side, side + 3, 3), np.uint8)
  assert not resize(image, size).any()
  assert sum(touched) <= 20 * side**2
  # Far out there are only twice the pixels of the result left to blur.
  if side > 4 * size:
    assert sum(touched) <= 20 * (2 * size + 1)**2


def test_a_fine_pattern_leaves_no_alias():
  # A checkerboard of single pixels is gray at half its size.
  board = np.indices((256, 256)).sum(axis=0) % 2 * 255
  image = np.repeat(board[..., None], 3, axis=-1).astype(np.uint8)
  for side in 256, 200, 192:
    small = resize(np.ascontiguousarray(image[:side, :side]), 100)
    assert small[2:-2, 2:-2].std() < 40


def jpeg(image, orientation=1):
  file = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(image).save(file, 'JPEG', quality=95, exif=exif)
  return Encoded(file.getvalue())


def pillows(image, box, size):
  """The crop as Pillow resizes it, int [size, size, 3]."""
  top, left, height, width = box
  return np.asarray(Image.fromarray(image).resize(
      (size, size), Image.Resampling.BILINEAR,
      box=(left, top, left + width, top + height),
  )).astype(int)


# Of odd sides and places, as most are: 1/2, 1/4 and 1/8 fall within pixels.
@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', [16, 32, 64])
def test_crops_of_a_large_jpeg_equal_those_without_its_scaled_decoding(
    orientation, size
):
  for name in 'china', 'flower', 'coffee':
    encoded = jpeg(photos.photographs()[name][:397, :395], orientation)
    whole = encoded.pixels()
    wanted = [
        crops.Box(13, 29, 301, 327), crops.Box(50, 11, 283, 299),
        crops.Box(0, 0, 385, 381), crops.Box(3, 5, 391, 389),
    ]
    for box, got in zip(wanted, cut(encoded, wanted, size), strict=True):
      expected = pillows(whole, box, size)
      assert np.abs(got - expected).mean() < 1.5


def test_a_small_jpeg_of_any_height_is_decoded_smaller():
  photo = photos.photographs()['china'][100:220, 100:204]
  box = crops.Box(0, 8, 96, 96)
  (expected,) = cut(jpeg(np.ascontiguousarray(photo[:96])), [box], 8)
  for height in range(97, 121):  # 97 rows become 13, which is 1/7.5.
    encoded = jpeg(np.ascontiguousarray(photo[:height]))
    got, _ = cut(encoded, [box, crops.Box(height - 96, 0, 96, 96)], 8)
    np.testing.assert_array_equal(got, expected)


def test_a_jpeg_that_decodes_to_another_size_is_unreadable(monkeypatch):
  encoded = jpeg(photos.photographs()['china'])
  decode = encoded.pixels
  monkeypatch.setattr(encoded, 'pixels', lambda shrink: decode(shrink)[1:])
  for side in 64, 400:
    with pytest.raises(Unreadable, match='pixels at 1/'):
      cut(encoded, [crops.Box(0, 0, side, side)], 64)


def test_a_jpeg_is_not_decoded_smaller_than_its_smallest_crop(monkeypatch):
  encoded = jpeg(photos.photographs()['china'])
  asked = []
  decode = encoded.pixels
  monkeypatch.setattr(
      encoded, 'pixels', lambda shrink: asked.append(shrink) or decode(shrink)
  )
  for small in 40, 96, 191, 192, 384:
    cut(
        encoded, [crops.Box(0, 0, 400, 400), crops.Box(0, 0, small, 400)], 64
    )
  assert asked == [1, 1, 1, 2, 4]


def test_evaluation_sees_the_centre():
  assert crops.centre_box(256, 400) == (16, 88, 224, 224)
  assert crops.centre_box(1, 1) == (0, 0, 1, 1)
