"""Pictures of what a network learned: they show what they say they show."""

import json
import shutil
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import photos
from PIL import Image
import pytest
from scipy.special import erf
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.data import workers
from mocov3_jax.models.vit import ViT, sincos_positions
from mocov3_jax.pictures import attention, projection, sheets
from mocov3_jax.pictures import draw as draw_lib
from mocov3_jax.pictures.showing import Options

COLOR = {
    'data.image_size': 32, 'data.mean': (0.5,) * 3, 'data.std': (0.25,) * 3,
    'batch_size': 32,
}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  path = tmp_path_factory.mktemp('visualize') / 'digits'
  return str(tiny.random_run(path, tiny.config()))


@pytest.fixture(scope='module')
def tiles(tmp_path_factory):
  """Five tiles of each of ten photographs, one file broken, and a run."""
  folder = tmp_path_factory.mktemp('visualize')
  photos.write_tiles(folder / 'tiles', tile=40, each=5)
  (folder / 'tiles' / 'china' / 'broken.jpg').write_bytes(b'\xff\xd8')
  config = tiny.config(**COLOR | {
      'data.source': f'folder:{folder}/tiles',
      'model.scan': True, 'model.remat': True, 'model.depth': 2,
  })
  return str(tiny.random_run(folder / 'run', config))


def size(path):
  """Of a PNG that is not blank."""
  with Image.open(path) as image:
    assert image.format == 'PNG'
    assert np.asarray(image.convert('L')).std() > 10
    return image.size


def normed(x, p):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1)[..., None] + 1e-6)
  return x * p['scale'] + p['bias']


def dense(x, p):
  return x @ p['kernel'] + p['bias']


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def by_hand(params, images, *, patch, heads, depth):
  """The class token's attention in the last block, in float64."""
  params = jax.tree.map(np.float64, params)
  b, side, _, c = images.shape
  n = side // patch
  x = images.reshape(b, n, patch, n, patch, c).transpose(0, 1, 3, 2, 4, 5)
  kernel = params['patch_embed']['kernel'].reshape(patch * patch * c, -1)
  x = x.reshape(b, n * n, -1) @ kernel + params['patch_embed']['bias']
  dim = x.shape[-1]
  x = np.concatenate([np.tile(params['cls_token'], (b, 1, 1)), x], axis=1)
  x = x + sincos_positions(n, n, dim)
  for i in range(depth):
    p = params[f'blocks_{i}']
    qkv = dense(normed(x, p['norm1']), p['attn']['qkv'])
    q, k, v = qkv.reshape(b, -1, 3, heads, dim // heads).transpose(
        2, 0, 3, 1, 4
    )
    weights = softmax(q @ k.swapaxes(2, 3) / np.sqrt(dim // heads))
    y = (weights @ v).swapaxes(1, 2).reshape(x.shape)
    x = x + dense(y, p['attn']['proj'])
    y = dense(normed(x, p['norm2']), p['mlp']['fc1'])
    x = x + dense(y * (1 + erf(y / np.sqrt(2))) / 2, p['mlp']['fc2'])
  return weights[:, :, 0]


@pytest.mark.parametrize('how', [
    {}, {'remat': True}, {'scan': True}, {'remat': True, 'scan': True},
    {'patch_embed': 'conv'}, {'dtype': jnp.bfloat16},
])
def test_the_weights_are_those_of_a_computation_by_hand(how):
  vit = ViT(patch_size=4, dim=16, depth=3, num_heads=2, **how)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 12, 12, 3)).astype(np.float32)
  variables = vit.init(jax.random.key(0), images, train=False)
  # So large that the weights are far from uniform.
  params = jax.tree.map(
      lambda x: x + jnp.asarray(
          rng.normal(scale=0.3, size=x.shape), jnp.float32
      ),
      variables['params'],
  )
  weights = attention.class_attention(
      vit, params, variables['batch_stats'] if 'batch_stats' in variables
      else {}, images,
  )
  assert weights.shape == (2, 2, 10) and weights.dtype == jnp.float32
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  assert weights.max() > 0.3
  if how == {'patch_embed': 'conv'}:
    return
  want = by_hand(params, images, patch=4, heads=2, depth=3)
  tolerance = 0.05 if 'dtype' in how else 2e-5
  np.testing.assert_allclose(weights, want, atol=tolerance)


def test_attention_has_a_row_an_image_and_a_column_a_head(digits, tmp_path):
  out = tmp_path / 'new' / 'a.png'
  result = draw_lib.attention(Options(digits, str(out), images=3))
  assert result['images'] == 3 and result['heads'] == 2
  assert result['patches'] == 4 and 0 < result['class_token'] < 1
  width, height = size(out)
  assert width >= 4 * sheets.SIDE and height > 3 * sheets.SIDE


def test_a_map_lies_where_its_patch_is_and_reaches_its_maximum():
  weights = np.zeros((4, 4))
  weights[1, 2] = 0.02
  made = sheets.overlay(np.zeros((8, 8, 1), np.uint8), weights)
  place = made.astype(int).sum(-1)
  y, x = np.unravel_index(place.argmax(), place.shape)
  side = sheets.SIDE / 4
  assert side <= y < 2 * side and 2 * side <= x < 3 * side
  np.testing.assert_array_equal(
      made, sheets.overlay(np.zeros((8, 8, 1), np.uint8), 50 * weights)
  )


def test_neighbours_are_framed_by_label(digits, tmp_path):
  out = tmp_path / 'n.png'
  result = draw_lib.neighbours(Options(digits, str(out), images=4), k=3)
  assert result['images'] == 4 and result['k'] == 3
  assert result['bank'] == 1437 and 0.05 < result['chance'] < 0.2
  width, height = size(out)
  assert width >= 4 * sheets.SIDE and height > 4 * sheets.SIDE
  with Image.open(out) as image:
    pixels = np.asarray(image.convert('RGB')).reshape(-1, 3)
  shown = {
      color: (pixels == tuple(bytes.fromhex(color[1:]))).all(-1).any()
      for color in (sheets.SAME, sheets.OTHER)
  }
  assert shown[sheets.SAME] == (result['hits'] > 0)
  assert shown[sheets.OTHER] == (result['hits'] < 1)


@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_an_embedding_is_the_same_every_time(digits, tmp_path, method):
  first, second = (
      draw_lib.embedding(
          Options(digits, str(tmp_path / name), images=60), method
      )
      for name in ('a.png', 'b.png')
  )
  assert first['images'] == 60
  assert first['classes'] == 10 and first['method'] == method
  if method == 'pca':
    assert 0 < first['explained_variance'] <= 1
  assert min(size(tmp_path / 'a.png')) > 500
  assert first | {'out': ''} == second | {'out': ''}
  same = [(tmp_path / name).read_bytes() for name in ('a.png', 'b.png')]
  assert same[0] == same[1]


def test_pca_keeps_the_plane_in_which_points_lie():
  rng = np.random.default_rng(0)
  angles = rng.uniform(0, 2 * np.pi, 50)
  circle = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
  turned, _ = np.linalg.qr(rng.normal(size=(7, 2)))
  points, axes, numbers = projection.plane(
      5 * circle @ turned.T.astype(np.float32), 'pca'
  )
  assert points.shape == (50, 2) and 'component 1' in axes[0]
  assert numbers['explained_variance'] == pytest.approx(1)


def test_umap_that_is_missing_is_named_before_any_work(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'umap', None)
  with pytest.raises(UserError, match='pip install umap-learn'):
    draw_lib.embedding(Options('nowhere', str(tmp_path / 'u.png')), 'umap')


def test_umap_is_used_where_it_is_installed(monkeypatch, digits, tmp_path):
  class Umap:
    def __init__(self, **options):
      assert options['random_state'] == projection.SEED

    def fit_transform(self, x):
      return x[:, :2]

  monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=Umap))
  result = draw_lib.embedding(
      Options(digits, str(tmp_path / 'u.png'), images=20), 'umap'
  )
  assert result['method'] == 'umap' and size(tmp_path / 'u.png')


def test_a_folder_is_drawn_with_the_names_of_its_classes(
    tiles, tmp_path, capsys, monkeypatch
):
  drawn = []
  text = sheets.Sheet.text
  monkeypatch.setattr(
      sheets.Sheet, 'text',
      lambda self, left, top, text_, *args, **more: (
          drawn.append(text_), text(self, left, top, text_, *args, **more)
      ),
  )
  a, n, e = (str(tmp_path / f'{name}.png') for name in 'ane')
  # All held-out images: every tenth.
  result = draw_lib.attention(Options(tiles, a, images=64))
  assert result['images'] == 6 and result['patches'] == 64
  result = draw_lib.neighbours(Options(tiles, n, images=2), k=2)
  assert result['bank'] == 45 and {'china', 'hubble_deep_fie…'} & set(drawn)
  drawn.clear()
  result = draw_lib.embedding(Options(tiles, e, batch_size=16), 'pca')
  assert result['images'] == 50 and result['classes'] == 10
  assert {'astronaut', 'chelsea', 'china', 'coffee', 'retina'} < set(drawn)
  assert 'unreadable: china/broken.jpg' in capsys.readouterr().err
  assert min(map(min, map(size, (a, n, e)))) > 300


@pytest.mark.slow
def test_without_labels_there_are_no_frames_and_gray_points(tiles, tmp_path):
  n, e = (str(tmp_path / f'{name}.png') for name in 'ne')
  result = draw_lib.neighbours(
      Options(tiles, n, labels='none', images=60), k=3
  )
  assert result['images'] == 50 and 'hits' not in result
  result = draw_lib.embedding(Options(tiles, e, labels='none'), 'pca')
  assert result['classes'] == 0
  with Image.open(e) as image:
    pixels = np.asarray(image.convert('RGB')).astype(int)
  assert np.ptp(pixels, axis=-1).max() < 8
  assert size(n)[0] >= 4 * sheets.SIDE


def test_names_are_shown_literally(tmp_path):
  for name in '$x_1$', '_hidden', 'a\nb', 'a\udcff', '猫' * 40:
    assert len(sheets.printable(name)) <= sheets.SHOWN
    sheet = sheets.scatter_sheet(
        np.eye(2), np.array([0, -1]), {0: name}, ('x', 'y'), ['title']
    )
    with warnings.catch_warnings(action='error'):
      sheet.save(sheets.epath.Path(tmp_path / 'x.png'))
    assert size(tmp_path / 'x.png')


def run(*arguments):
  return tiny.call('visualize', *arguments)


def test_the_command_ends_with_one_line_of_json(digits, tmp_path):
  code, out, err = run(
      'embedding', f'--checkpoint={digits}', f'--out={tmp_path}/e.png',
      '--images=40', '--encoder=momentum',
  )
  assert code == 0, err
  result = json.loads(out.splitlines()[-1])
  assert result['encoder'] == 'momentum' and result['method'] == 'pca'
  assert size(tmp_path / 'e.png')


BAD = {
    'word': (['atention'], ['attention', 'embedding', 'neighbours']),
    'no word': ([], ['attention, neighbours, embedding']),
    'method': (['embedding', '--method=lda'], ["'lda'", 'pca, tsne, umap']),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_ends_the_command_with_2(case, digits, tmp_path):
  arguments, words = BAD[case]
  code, out, err = run(
      *arguments, f'--checkpoint={digits}', f'--out={tmp_path}/x.png'
  )
  assert code == 2 and out == '' and 'Traceback' not in err
  assert err.count('error: ') == 1
  for word in words:
    assert word in err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('options, message', [
    ({'encoder': 'key'}, "--encoder='key'.*momentum, query"),
    ({'images': 0}, '--images=0.*1 to 64'),
    ({'images': 65}, '--images=65.*1 to 64'),
    ({'batch_size': 12}, '--batch_size=12.*8 devices'),
    ({'threads': -1}, '--threads=-1'),
    ({'out': 'x.jpg'}, 'x.jpg does not end with .png'),
    ({'out': ''}, '--out is empty'),
    ({'checkpoint': 'nowhere'}, 'nowhere'),
    ({'source': 'digit'}, "Did you mean 'digits'"),
    ({'labels': 'none'}, "labels='none' is only for folder"),
])
def test_bad_options_are_named(digits, tmp_path, options, message):
  given = {'checkpoint': digits, 'out': str(tmp_path / 'x.png')} | options
  with pytest.raises(UserError, match=message):
    draw_lib.neighbours(Options(**given), k=5)
  assert not list(tmp_path.iterdir())


def test_what_is_out_of_range_is_said(digits, tiles, tmp_path):
  out = str(tmp_path / 'x.png')
  for k in 0, 21:
    with pytest.raises(UserError, match=f'--k={k} .*1 to 20'):
      draw_lib.neighbours(Options(digits, out), k=k)
  few = tmp_path / 'few'
  few.mkdir()
  for i in range(3):
    Image.new('RGB', (40, 40), (i, 0, 0)).save(few / f'{i}.png')
  with pytest.raises(UserError, match='--k=3 .*1 to 2'):
    draw_lib.neighbours(Options(tiles, out, f'folder:{few}'), k=3)
  with pytest.raises(UserError, match='3 images .* 4 or more'):
    draw_lib.embedding(Options(tiles, out, f'folder:{few}'), 'pca')
  with pytest.raises(UserError, match='1 channels.*trained on 3'):
    draw_lib.attention(Options(tiles, out, 'digits'))
  (few / '0.png').write_bytes(b'')
  (few / '1.png').write_bytes(b'')
  (few / '2.png').write_bytes(b'')
  with pytest.raises(UserError, match='none of the 3 images could be read'):
    draw_lib.attention(Options(tiles, out, f'folder:{few}'))
  assert not (tmp_path / 'x.png').exists()


def test_a_file_that_is_there_is_never_written_over(digits, tmp_path):
  (tmp_path / 'x.png').write_text('mine')
  for draw in (
      draw_lib.attention, lambda o: draw_lib.neighbours(o, 5),
      lambda o: draw_lib.embedding(o, 'pca'),
  ):
    with pytest.raises(UserError, match='x.png exists.*new file'):
      draw(Options(digits, str(tmp_path / 'x.png')))
  assert (tmp_path / 'x.png').read_text() == 'mine'


@pytest.mark.parametrize('model, message', [
    ({'name': 'resnet18', 'depth': 0, 'num_heads': 0},
     "'resnet18' .*no attention.*vit_s"),
    ({'readout': 'pool'}, "readout='pool' .*no class token.*'cls'"),
])
def test_networks_without_a_class_token_are_refused(
    digits, tmp_path, model, message
):
  # Which is found from the config, before any array is read.
  shutil.copytree(digits, tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  config = json.loads(path.read_text())
  config['model'].update(model)
  path.write_text(json.dumps(config))
  out = tmp_path / 'x.png'
  with pytest.raises(UserError, match=message):
    draw_lib.attention(Options(str(tmp_path / 'run'), str(out)))
  assert not out.exists()


def test_a_machine_that_cannot_count_its_cores_is_not_told_so(
    monkeypatch, recwarn, capfd
):
  from joblib.externals.loky.backend import context

  def unknown():
    raise ValueError('found 0 physical cores < 1')

  monkeypatch.setattr(context, 'physical_cores_cache', None)
  monkeypatch.setattr(context, '_count_physical_cores_linux', unknown)
  projection.plane(np.eye(8, dtype=np.float32), 'tsne')
  # With a single one there is nothing to be counted.
  assert workers.cores() == 1 or context.physical_cores_cache == 'not found'
  assert not recwarn.list and not capfd.readouterr().err
