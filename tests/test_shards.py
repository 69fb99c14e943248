"""Shards of webdataset, and sets of Hugging Face datasets."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile

import datasets
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.data import decode
from mocov3_jax.sources import catalog, folder, shards

RGB = {
    'data.mean': (0.5,) * 3, 'data.std': (0.25,) * 3, 'data.image_size': 32,
    'model.patch_size': 8, 'batch_size': 16, 'schedule.epochs': 2.0,
    'schedule.warmup_epochs': 0.5, 'knn.every_steps': 2, 'save.every_steps': 3,
}


def encoded(number, form='JPEG', side=40):
  """An image that tells its number by its colour."""
  pixels = np.full((side, side + 8, 3), number * 5 % 256, np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, form, quality=95)
  return buffer.getvalue()


def write_shard(path, members):
  """Writes (name, bytes) as a tar file."""
  with tarfile.open(path, 'w') as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def write_set(root, split='train', count=3, each=12, kind='cls'):
  """Writes shards; sample n of a split has the label n % 4."""
  root.mkdir(parents=True, exist_ok=True)
  for shard in range(count):
    members = []
    for place in range(each):
      n = shard * each + place
      members.append((f'{n:05d}.jpg', encoded(n)))
      label = str(n % 4)
      if kind == 'json':
        label = json.dumps({'label': n % 4, 'text': 'x'})
      if kind:
        members.append((f'{n:05d}.{kind}', label.encode()))
    write_shard(root / f'set-{split}-{shard:06d}.tar', members)


@pytest.mark.parametrize('kind', ['cls', 'json'])
def test_images_are_read_where_they_lie(tmp_path, kind):
  write_set(tmp_path, kind=kind)
  splits = catalog.load(f'wds:{tmp_path}/set-train-*.tar', 'auto', None)
  assert len(splits.train) + len(splits.test) == 36
  whole = splits.train.source
  assert whole.classes == ('0', '1', '2', '3')
  for n in range(36):
    assert whole.read(n) == encoded(n)
    assert whole.labels(np.array([n])) == [n % 4]
  assert whole.name(13) == 'set-train-000001.tar/00013'
  assert '36' not in splits.note and '3 shards' in splits.note


def test_shards_called_val_are_tested_on(tmp_path):
  write_set(tmp_path)
  write_set(tmp_path, 'val', count=2, each=5)
  write_set(tmp_path, 'test', count=1, each=5)
  splits = catalog.load(f'wds:{tmp_path}/*.tar', 'auto', None)
  assert len(splits.train) == 36 and len(splits.test) == 10
  assert '1 shards of further splits are not used' in splits.note
  ranged = catalog.load(
      f'wds:{tmp_path}/set-train-{{000000..000001}}.tar', 'auto', None
  )
  assert len(ranged.train) + len(ranged.test) == 24


def test_a_set_without_labels_trains_without_knn(tmp_path):
  write_set(tmp_path, kind='')
  splits = catalog.load(f'wds:{tmp_path}/*.tar', 'auto', None)
  assert splits.test is None and len(splits.train) == 36


def test_numbers_are_in_the_order_of_numbers(tmp_path):
  write_shard(tmp_path / 'a.tar', [
      part for n in range(22) for part in (
          (f'{n}.png', encoded(n, 'PNG')), (f'{n}.cls', str(n // 2).encode())
      )
  ])
  splits = catalog.load(f'wds:{tmp_path}/a.tar', 'auto', None)
  assert splits.train.classes == tuple(map(str, range(11)))


def test_many_classes_and_any_label_are_no_trouble(tmp_path):
  (tmp_path / 'cache').mkdir(mode=0o700)
  many = shards.Index(
      np.zeros(20000, np.int64), np.ones(20000, np.int64),
      list(map(str, range(20000))), list(map(str, range(20000))),
  )
  write_shard(tmp_path / 'a.tar', [
      ('1.png', encoded(1, 'PNG')), ('1.json', b'{"label": "\\ud83d"}'),
      ('2.png', encoded(2, 'PNG')), ('2.json', b'{"label": "b"}'),
  ])
  for _ in range(2):  # The second time as it was kept.
    splits = catalog.load(f'wds:{tmp_path}/a.tar', 'auto', tmp_path / 'cache')
    assert len(splits.train.classes) == 2
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, 'index', lambda shard: many)
    splits = catalog.load(f'wds:{tmp_path}/a.tar', 'auto', None)
  assert splits.train.classes[:3] == ('0', '1', '2')


def test_the_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
  write_set(tmp_path / 'set')
  (tmp_path / 'cache').mkdir(mode=0o700)
  passes, real = [], shards.index
  monkeypatch.setattr(
      shards, 'index', lambda shard: passes.append(shard) or real(shard)
  )
  spec = f'wds:{tmp_path}/set/*.tar'
  prints = []
  for expected in 3, 3:  # The second time it is known.
    splits = catalog.load(spec, 'auto', tmp_path / 'cache')
    prints.append(splits.fingerprint())
    assert len(passes) == expected
    assert splits.train.source.read(30) == encoded(30)
  assert prints[0] == prints[1]
  write_shard(tmp_path / 'set' / 'set-train-000002.tar', [
      (f'{n}.jpg', encoded(n)) for n in range(3)
  ])
  assert len(catalog.load(spec, 'auto', tmp_path / 'cache').train.source) == 27
  # What somebody else put there is no index.
  for file in (tmp_path / 'cache').iterdir():
    file.write_bytes(b'PK nonsense')
  assert len(catalog.load(spec, 'auto', tmp_path / 'cache').train.source) == 27


def test_many_shards_are_not_many_open_files(tmp_path):
  write_set(tmp_path, count=300, each=1)
  source = catalog.load(f'wds:{tmp_path}/*.tar', 'auto', None).train.source
  before = len(os.listdir('/proc/self/fd'))
  assert all(source.read(n) == encoded(n) for n in range(300))
  assert len(os.listdir('/proc/self/fd')) == before


def damaged(root, what):
  """Writes a set with one fault; returns its spec."""
  write_set(root)
  path = root / 'set-train-000001.tar'
  spec = f'wds:{root}/*.tar'
  if what == 'cut off':
    path.write_bytes(path.read_bytes()[:9000])
  elif what == 'no tar file':
    path.write_bytes(b'nonsense' * 300)
  elif what == 'a bad header':
    data = bytearray(path.read_bytes())
    place = data.index(b'00015.jpg')
    data[place] ^= 1
    path.write_bytes(data)
  elif what == 'two in one':
    path.write_bytes(path.read_bytes() + path.read_bytes())
  elif what == 'bad json':
    write_shard(path, [('1.jpg', encoded(1)), ('1.json', b'{')])
  elif what == 'several images':
    write_shard(path, [('1.jpg', encoded(1)), ('1.png', encoded(1, 'PNG'))])
  elif what == 'no image':
    for shard in root.iterdir():
      write_shard(shard, [('1.txt', b'text')])
  elif what == 'packed':
    path.rename(root / 'set-train-000001.tar.gz')
    spec = f'wds:{root}/*'
  elif what == 'absent':
    spec = f'wds:{root}/none-*.tar'
  elif what == 'a gap':
    spec = f'wds:{root}/set-train-{{000000..000005}}.tar'
  elif what == 'backwards':
    spec = f'wds:{root}/set-train-{{000005..000000}}.tar'
  elif what == 'nothing':
    spec = 'wds:'
  return spec


@pytest.mark.parametrize('what, words', [
    ('cut off', 'set-train-000001.tar cannot be read as a tar file'),
    ('no tar file', 'set-train-000001.tar cannot be read as a tar file'),
    ('a bad header', 'is no header, and not the end'),
    ('two in one', 'is no header, and not the end'),
    ('bad json', "'1.json' is not JSON"),
    ('several images', "the sample '1' has several images"),
    ('no image', 'holds no image in 3 shards'),
    ('packed', 'is not a .tar file'), ('absent', 'there is no such file'),
    ('a gap', 'set-train-000003.tar is missing'),
    ('backwards', 'is not a range'), ('nothing', 'names no shards'),
])
def test_faults_of_shards_are_named(tmp_path, what, words):
  with pytest.raises(UserError) as error:
    catalog.load(damaged(tmp_path, what), 'auto', None)
  assert words in str(error.value)


def test_a_shard_that_shrinks_later_is_an_unreadable_image(tmp_path):
  write_set(tmp_path)
  source = catalog.load(f'wds:{tmp_path}/*.tar', 'auto', None).train.source
  path = tmp_path / 'set-train-000002.tar'
  path.write_bytes(path.read_bytes()[:2000])
  with pytest.raises(decode.Unreadable, match='shorter'):
    source.read(35)
  path.unlink()
  with pytest.raises(decode.Unreadable, match='No such file'):
    source.read(35)
  assert source.read(0) == encoded(0)


def table(count, typed=True):
  """A set of Hugging Face's with `count` images in four classes."""
  features = datasets.Features({
      'image': datasets.Image(),
      'label': datasets.ClassLabel(names=list('abcd')) if typed
      else datasets.Value('int64'),
  })
  return datasets.Dataset.from_dict({
      'image': [{'bytes': encoded(n), 'path': None} for n in range(count)],
      'label': [n % 4 for n in range(count)],
  }, features=features)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setattr(
      datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf-cache')
  )


@pytest.mark.parametrize('form', ['saved', 'parquet', 'folder', 'one'])
@pytest.mark.parametrize('typed', [True, False])
def test_sets_of_hugging_face_are_read(tmp_path, form, typed):
  parts = datasets.DatasetDict(
      train=table(20, typed), validation=table(8, typed)
  )
  if form == 'saved':
    parts.save_to_disk(tmp_path / 'set')
    path = tmp_path / 'set'
  elif form == 'one':
    parts['train'].save_to_disk(tmp_path / 'set')
    path = tmp_path / 'set'
  elif form == 'parquet':
    path = tmp_path / 'x.parquet'
    parts['train'].to_parquet(path)
  else:
    path = tmp_path / 'set'
    path.mkdir()
    for split, part in parts.items():
      part.to_parquet(path / f'{split}-00000-of-00001.parquet')
  splits = catalog.load(f'hf:{path}')
  assert splits.train.classes == tuple('abcd' if typed else '0123')
  whole = splits.train
  if form in ('one', 'parquet'):
    assert len(splits.train) + len(splits.test) == 20
    whole = splits.train.source
  else:
    assert len(splits.train) == 20 and len(splits.test) == 8
  for n in range(20):
    assert whole.read(n) == encoded(n)
  np.testing.assert_array_equal(whole.labels(np.arange(20)), np.arange(20) % 4)
  assert whole.name(3) == 'train[3]'


def test_values_are_classes_if_any_split_has_them(tmp_path):
  features = datasets.Features({
      'image': datasets.Image(), 'label': datasets.Value('int64')
  })

  def part(labels):
    return datasets.Dataset.from_dict({
        'image': [{'bytes': encoded(n), 'path': None} for n in labels],
        'label': labels,
    }, features=features)

  datasets.DatasetDict(
      train=part([0, 1, 2, 4] * 5), validation=part([1, 3, 2, 1])
  ).save_to_disk(tmp_path / 'set')
  splits = catalog.load(f'hf:{tmp_path}/set')
  assert splits.train.classes == tuple('01234') and len(splits.test) == 4
  assert 'tested on validation' in splits.note


def test_rows_that_were_chosen_are_those_that_are_read(tmp_path):
  table(20).select([7, 3, 11]).save_to_disk(tmp_path / 'set')
  source = catalog.load(f'hf:{tmp_path}/set').train
  source = source.source if hasattr(source, 'source') else source
  assert [source.read(n) for n in range(3)] == [
      encoded(n) for n in (7, 3, 11)
  ]


def test_a_row_without_image_is_unreadable(tmp_path):
  # As others write them, who do not say what the columns are.
  pq.write_table(pa.table({'picture': [
      {'bytes': encoded(0), 'path': None}, None,
      {'bytes': None, 'path': str(tmp_path / 'absent.jpg')},
  ]}), tmp_path / 'x.parquet')
  source = catalog.load(f'hf:{tmp_path}/x.parquet').train
  assert source.read(0) == encoded(0)
  for n in 1, 2:
    with pytest.raises(decode.Unreadable):
      source.read(n)


@pytest.mark.parametrize('what, words', [
    ('split', "there is no split 'vaildation'. Did you mean 'validation'?"),
    ('images', 'has 0 columns of images'), ('two', 'has 2 columns of images'),
    ('absent', 'cannot be opened'), ('pictures', 'is folder:PATH'),
    ('damaged', 'cannot be opened'), ('nothing', 'names no data set'),
])
def test_faults_of_such_sets_are_named(tmp_path, monkeypatch, what, words):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  path = tmp_path / 'set'
  spec = f'hf:{path}'
  if what == 'split':
    datasets.DatasetDict(
        train=table(8), validation=table(8)
    ).save_to_disk(path)
    spec += ':vaildation'
  elif what == 'images':
    table(8).remove_columns('image').save_to_disk(path)
  elif what == 'two':
    pq.write_table(
        pa.table({'a': [encoded(0)], 'b': [encoded(1)]}), tmp_path / 'x.parquet'
    )
    spec = f'hf:{tmp_path}/x.parquet'
  elif what == 'absent':
    spec = 'hf:no/such-set'
  elif what == 'pictures':
    path.mkdir()
    (path / 'a.jpg').write_bytes(encoded(0))
  elif what == 'damaged':
    path = tmp_path / 'x.parquet'
    path.write_bytes(b'PAR1 nonsense')
    spec = f'hf:{path}'
  else:
    spec = 'hf:'
  with pytest.raises(UserError) as error:
    catalog.load(spec)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
  real = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util, 'find_spec',
      lambda name, *rest: None if name == 'datasets' else real(name, *rest),
  )
  with pytest.raises(UserError, match=r"pip install 'mocov3-jax\[hf\]'"):
    catalog.load('hf:x')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['wds', 'hf'])
def test_training_goes_on_exactly_and_imports_no_other_framework(
    tmp_path, kind
):
  if kind == 'wds':
    write_set(tmp_path / 'set', count=4, each=20)
    spec = f'wds:{tmp_path}/set/*.tar'
  else:
    table(80).save_to_disk(tmp_path / 'set')
    spec = f'hf:{tmp_path}/set'
  flags = tiny.flags(**RGB, **{'data.source': spec})
  code, _, err = tiny.call('train', f'--workdir={tmp_path / "whole"}', *flags)
  assert code == 0, err
  workdir = tmp_path / 'killed'
  process = tiny.start(
      'train', f'--workdir={workdir}', *flags, env_add=tiny.here()
  )
  while 'step 4/' not in (line := process.stderr.readline()):
    assert line, 'the run has ended'
  process.kill()
  tiny.finish(process)
  line = ['x', 'train', f'--workdir={workdir}', *flags]
  text = (
      'import sys\n'
      'from mocov3_jax import __main__\n'
      f'code = __main__.main({line!r})\n'
      'assert not {"tensorflow", "torch"} & set(sys.modules)\n'
      'sys.exit(code)\n'
  )
  done = subprocess.run(
      [sys.executable, '-c', text], cwd=tiny.ROOT, capture_output=True,
      text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'} | tiny.here(),
  )
  assert done.returncode == 0, done.stderr
  assert tiny.metrics(workdir) == tiny.metrics(tmp_path / 'whole')


@pytest.mark.parametrize('suffix, form', [
    ('tif', 'TIFF'), ('tiff', 'TIFF'), ('ppm', 'PPM'), ('pgm', 'PPM'),
])
def test_folders_of_tiff_and_ppm_are_images(tmp_path, suffix, form):
  for n in range(4):
    name = 'ab'[n % 2]
    (tmp_path / name).mkdir(exist_ok=True)
    image = Image.new('L' if suffix == 'pgm' else 'RGB', (9, 7), n)
    image.save(tmp_path / name / f'{n}.{suffix}', form)
  source = folder.load(str(tmp_path), 'none', None).train
  assert len(source) == 4
  for n in range(4):
    image = decode.Encoded(source.read(n))
    assert image.pixels().shape == (7, 9, 3)
  # Beside others they were passed over when a run may have begun.
  Image.new('RGB', (9, 7)).save(tmp_path / 'a' / 'x.png')
  splits = folder.load(str(tmp_path), 'none', None)
  assert len(splits.train) == 1
  assert '4 of these are TIFF, PPM or PGM' in splits.note


def test_a_tiff_of_floating_point_numbers_is_no_picture(tmp_path):
  buffer = io.BytesIO()
  Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, 'TIFF')
  with pytest.raises(decode.Unreadable, match='floating-point'):
    decode.Encoded(buffer.getvalue()).pixels()
