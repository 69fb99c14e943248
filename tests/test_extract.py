"""Features of a source from a checkpoint."""

import numpy as np
import photos
from PIL import Image
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.evals import extract
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import network
from mocov3_jax.sources import catalog
from mocov3_jax.training import pretrain
from mocov3_jax.weights import convert


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('extract') / 'run'
  return tiny.random_run(path, tiny.config())


def arrays(path):
  with np.load(path) as file:
    return dict(file)


def test_features_are_the_backbones_of_each_image(run, tmp_path):
  result = extract.extract(str(run), 'digits', str(tmp_path / 'f.npz'))
  assert result['images'] == 1797 and result['step'] == 4
  found = arrays(tmp_path / 'f.npz')
  splits = catalog.digits()
  assert (found['splits'] == 'test').sum() == len(splits.test) == 360
  np.testing.assert_array_equal(
      found['labels'][found['splits'] == 'test'],
      splits.test.all_labels,
  )
  # Any of them, computed alone.
  checkpoint = network.find(str(run))
  params, stats = network.restore(checkpoint, sharding.make_mesh())
  i = found['names'].tolist().index('digits test[7]')
  image = splits.test.images[7].astype(np.float32) / 255
  image = (image - checkpoint.config.data.mean) / checkpoint.config.data.std
  want = checkpoint.model.apply(
      {'params': params, 'batch_stats': stats}, image[None].astype(np.float32),
      train=False, method='features',
  )
  np.testing.assert_allclose(found['features'][i], want[0], atol=1e-5)
  assert found['features'].shape == (1797, 16)


def test_layer_and_encoder_are_what_they_say(run, tmp_path):
  for layer, dim in ('backbone', 16), ('projector', 8):
    for encoder in 'query', 'momentum':
      extract.extract(
          str(run), '', str(tmp_path / f'{layer}_{encoder}.npz'),
          layer=layer, encoder=encoder,
      )
    query, momentum = (
        arrays(tmp_path / f'{layer}_{encoder}.npz')['features']
        for encoder in ('query', 'momentum')
    )
    assert query.shape == momentum.shape == (1797, dim)
    assert np.abs(query - momentum).max() > 1e-4


def test_a_gray_network_sees_a_folder_of_colour_images_gray(run, tmp_path):
  photos.write_tiles(tmp_path / 'colour', tile=32, each=1)
  for path in (tmp_path / 'colour').rglob('*.jpg'):
    gray = tmp_path / 'gray' / path.relative_to(tmp_path / 'colour')
    gray.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as image:
      image.convert('L').save(gray.with_suffix('.png'))
  found = {}
  for name in 'colour', 'gray':
    out = tmp_path / f'{name}.npz'
    extract.extract(str(run), f'folder:{tmp_path}/{name}', str(out))
    found[name] = arrays(out)['features']
  # Two JPEG decoders may round differently.
  np.testing.assert_allclose(found['colour'], found['gray'], atol=0.003)
  assert np.std(found['gray'], axis=0).max() > 0.02  # They differ by more.


def test_a_source_of_other_channels_is_refused(tmp_path):
  config = tiny.config(**{'data.mean': (0.5,) * 3, 'data.std': (0.25,) * 3})
  run = tiny.random_run(tmp_path / 'run', config)
  with pytest.raises(UserError, match='1 channels.*trained on 3'):
    extract.extract(str(run), 'digits', str(tmp_path / 'f.npz'))
  assert not (tmp_path / 'f.npz').exists()


def test_a_flat_folder_has_names_and_no_labels(tmp_path, capsys):
  photos.write_tiles(tmp_path / 'p', tile=32, each=3, nested=False)
  (tmp_path / 'p' / 'broken.jpg').write_bytes(b'\xff\xd8')
  config = tiny.config(**{
      'data.source': f'folder:{tmp_path}/p', 'batch_size': 8,
      'data.mean': (0.5,) * 3, 'data.std': (0.25,) * 3,
  })
  tiny.random_run(tmp_path / 'run', config)
  result = extract.extract(
      str(tmp_path / 'run'), '', str(tmp_path / 'f.npz'), batch_size=16
  )
  assert 'unreadable: broken.jpg' in capsys.readouterr().err
  found = arrays(tmp_path / 'f.npz')
  assert result['unreadable'] == 1 and result['images'] == 30
  assert 'broken.jpg' not in found['names']
  assert set(found['labels']) == {-1} and set(found['splits']) == {'train'}
  names = {p.name for p in (tmp_path / 'p').iterdir()} - {'broken.jpg'}
  assert set(found['names']) == names
  with pytest.raises(UserError, match='new file'):
    extract.extract(str(tmp_path / 'run'), '', str(tmp_path / 'f.npz'))
  # Labels that the run had not.
  rows = [f'{name},{i % 2}' for i, name in enumerate(sorted(names))]
  (tmp_path / 'labels.csv').write_text('\n'.join(['path,label', *rows]))
  extract.extract(
      str(tmp_path / 'run'), '', str(tmp_path / 'l.npz'), batch_size=16,
      labels=str(tmp_path / 'labels.csv'),
  )
  found = arrays(tmp_path / 'l.npz')
  assert len(found['labels']) == 30 and set(found['labels']) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind',
    [pytest.param('batch_norm', marks=pytest.mark.slow), 'weight_norm'],
)
def test_a_normed_projection_is_used_like_any_other(kind, tmp_path):
  config = tiny.config(**{
      'schedule.steps': 2, 'schedule.warmup_epochs': 0.0,
      'knn.every_steps': 0, 'model.patch_embed': kind,
  })
  pretrain.pretrain(config, str(tmp_path / 'run'))
  extract.extract(str(tmp_path / 'run'), '', str(tmp_path / 'f.npz'))
  found = arrays(tmp_path / 'f.npz')['features']
  assert found.shape == (1797, 16) and np.all(np.isfinite(found))
  # Only files of PyTorch have no names for it.
  with pytest.raises(UserError, match=f'patch_embed={kind!r} has no place'):
    convert.convert(
        str(tmp_path / 'run'), str(tmp_path / 'x.pth'), 'query', None, 0, ()
    )
