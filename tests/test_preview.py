"""The sheet shows what training sees."""

import jax
import numpy as np
import photos
from PIL import Image
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.method import augment, image_ops
from mocov3_jax.method.build import run_keys
from mocov3_jax.pictures import views


def test_the_sheet_has_a_row_an_example(tmp_path):
  out = tmp_path / 'views.png'
  result = views.preview(tiny.config(), str(out), count=3)
  assert result == {'out': str(out), 'examples': 3}
  with Image.open(out) as sheet:
    height = 3 * (views.SIDE + views.GAP) + views.GAP + views.HEADER
    assert sheet.size[1] == height
    # No picture is blank.
    pixels = np.asarray(sheet.convert('L'))
  for left in (views.GAP, views.SIDE + 2 * views.GAP):
    picture = pixels[36:166, left + 5 : left + 150]
    assert picture.std() > 10


@pytest.mark.slow
def test_a_sheet_of_a_folder_shows_whole_images_and_their_crops(tmp_path):
  root = tmp_path / 'photos'
  photos.write_tiles(root, tile=100, each=4)
  (root / 'china' / 'broken.jpg').write_bytes(b'no image')
  Image.new('RGB', (4000, 20)).save(root / 'china' / 'panorama.png')
  c = tiny.config(**{
      'data.source': f'folder:{root}', 'batch_size': 32,
      'data.mean': (0.5,) * 3, 'data.std': (0.2,) * 3,
  })
  out = tmp_path / 'views.png'
  assert views.preview(c, str(out), count=32)['examples'] == 32
  with Image.open(out) as sheet:
    pixels = np.asarray(sheet.convert('RGB'))[views.HEADER:]
  top, left = views.GAP, views.GAP
  picture = pixels[top:top + views.SIDE, left:left + views.SIDE]
  # In colour, so from the folder; with the red box of a crop on it.
  assert np.ptp(picture.astype(int), axis=-1).max() > 10
  assert (picture == (255, 0, 0)).all(axis=-1).any()


def test_fewer_images_than_a_batch_are_shown_all_the_same(tmp_path):
  root = tmp_path / 'photos'
  root.mkdir()
  rng = np.random.default_rng(0)
  for i in range(5):
    pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(root / f'{i}.png')
  c = tiny.config(**{
      'data.source': f'folder:{root}', 'batch_size': 256,
      'data.mean': (0.5,) * 3, 'data.std': (0.2,) * 3,
  })
  out = tmp_path / 'views.png'
  assert views.preview(c, str(out))['examples'] == 5
  with pytest.raises(UserError, match='--count=6 .* from 1 to 5'):
    views.preview(c, str(out), count=6)


@pytest.mark.slow
def test_the_views_are_those_of_the_first_step():
  c = tiny.config()
  images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
  _, key = run_keys(c.seed)
  key = jax.random.fold_in(key, 0)
  make = augment.build(augment.both_views(c.augment), c.data)
  trained = make(images, key)
  for i, example_key in enumerate(augment.example_keys(key, 3)):
    made, _ = views._views(images[i], example_key, c)
    for v in 0, 1:
      np.testing.assert_allclose(
          image_ops.normalise(made[v], c.data), trained[i, v], atol=1e-5
      )


def test_a_recipe_for_more_devices_than_there_are_is_shown(tmp_path):
  c = tiny.config(fsdp_devices=2 * jax.device_count())
  out = tmp_path / 'views.png'
  assert views.preview(c, str(out), count=1)['examples'] == 1


def test_the_config_of_an_evaluation_is_refused(tmp_path):
  with pytest.raises(UserError, match='unknown fields'):
    views.preview(eval_config(), str(tmp_path / 'x.png'), count=1)


def test_what_was_drawn_is_said_in_words():
  c = tiny.config()
  view = c.augment.view2
  view.update({
      'jitter_prob': 1.0, 'hue': 0.0, 'gray_prob': 1.0, 'blur_prob': 1.0,
      'solarize_prob': 1.0, 'flip_prob': 1.0,
  })
  drawn = jax.device_get(augment.draw_params(jax.random.key(0), view, 8, 8))
  lines = views.describe(drawn, (0, 0, 4, 4), view)
  assert lines[0].startswith('crop ') and len(lines) == 8
  assert [line.split()[0] for line in lines[4:]] == [
      'gray', 'blur', 'solarize', 'flip'
  ]
  assert {line.split()[0] for line in lines[1:4]} == {
      'brightness', 'contrast', 'saturation'
  }
