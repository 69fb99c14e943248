"""Sets prepared by TFDS: read without TensorFlow, or told how to prepare."""

import collections
import io
import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_digits
import tiny
import toy_tfds

from mocov3_jax import sources
from mocov3_jax.base.errors import UserError
from mocov3_jax.data import pipeline
from mocov3_jax.data.workers import Workers
from mocov3_jax.sources import Unreadable, catalog

FLAGS = tiny.flags(**{
    'data.source': 'tfds:toy_digits', 'data.mean': '(.3,.3,.3)',
    'data.std': '(.4,.4,.4)', 'schedule.epochs': 2.0,
})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  for builder in (
      toy_tfds.ToyDigits, toy_tfds.ToyPhotos, toy_tfds.ToyRgba,
      toy_tfds.ToyContest,
  ):
    toy_tfds.prepare(folder, builder)
  return folder


@pytest.fixture
def data_dir(folder, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  monkeypatch.setattr(
      'tensorflow_datasets.core.constants.DATA_DIR', str(folder)
  )
  return folder


def test_a_set_of_one_size_is_read(data_dir):
  splits = catalog.load('tfds:toy_digits')
  assert (len(splits.train), len(splits.test)) == (400, 100)
  assert splits.train.shape == (8, 8, 3) and len(splits.train.classes) == 10
  everything = [
      (Image.open(io.BytesIO(source.read(i))).convert('L').tobytes(), label)
      for source in (splits.train, splits.test)
      for i, label in enumerate(source.labels(np.arange(len(source))))
  ]
  data = load_digits()
  expected = [
      (np.round(image * (255 / 16)).astype(np.uint8).tobytes(), label)
      for image, label in zip(data.images[:500], data.target, strict=False)
  ]
  assert sorted(everything) == sorted(expected)
  assert splits.train.name(3) == 'toy_digits:train[3]'


def test_a_set_of_parquet_files_is_read_alike(folder, tmp_path, monkeypatch):
  toy_tfds.prepare(tmp_path, toy_tfds.ToyPhotos, 'parquet')
  found = []
  for data_dir in folder, tmp_path:
    monkeypatch.setattr(
        'tensorflow_datasets.core.constants.DATA_DIR', str(data_dir)
    )
    source = catalog.load('tfds:toy_photos').train.source
    labels = source.labels(np.arange(len(source)))
    found.append({
        (source.read(i), label) for i, label in enumerate(labels.tolist())
    })
  assert found[0] == found[1] and len(found[0]) > 80


@pytest.mark.parametrize('split, count', [('train', 400), ('train[:20]', 20)])
def test_parquet_files_of_which_images_are_lost_are_refused(
    tmp_path, monkeypatch, split, count
):
  # As TFDS 4.9.10 writes and reads them. Should it have learned to, these are
  # all there.
  toy_tfds.prepare(tmp_path, file_format='parquet')
  monkeypatch.setattr(
      'tensorflow_datasets.core.constants.DATA_DIR', str(tmp_path)
  )
  try:
    splits = catalog.load(f'tfds:toy_digits:{split}')
    assert len(splits.train) == count
  except UserError as e:
    assert f'has {count} images, but TFDS' in str(e)


def test_a_set_of_many_sizes_without_test_split_is_read(data_dir):
  splits = catalog.load('tfds:toy_photos')
  assert splits.train.shape is None
  assert (len(splits.train), len(splits.test)) == (90, 10)


@pytest.mark.parametrize(
    'spec, count',
    [('toy_digits:train[:10%]', 40), ('toy_digits:train[:30]+test', 117),
     ('toy_digits:1.0.0', 400), ('toy_digits:1.0.0:test', 90)],
)
def test_a_split_and_a_version_can_be_named(data_dir, spec, count):
  assert len(catalog.load(f'tfds:{spec}').train) == count


def test_knn_is_never_tested_on_what_is_trained_on(data_dir):
  for split in 'test', 'train+test', 'all', 'train[:50]+test[:50]':
    splits = catalog.load(f'tfds:toy_digits:{split}')
    names = [
        {source.name(i) for i in range(len(source))}
        for source in (splits.train, splits.test)
    ]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    'split, train, test',
    [('train', 100, 50), ('train+validation', 135, 15),
     ('validation', 45, 5)],
)
def test_a_test_split_without_labels_is_not_tested_on(
    data_dir, split, train, test
):
  splits = catalog.load(f'tfds:toy_contest:{split}')
  assert (len(splits.train), len(splits.test)) == (train, test)
  assert (splits.test.labels(np.arange(test)) >= 0).all()


def test_a_set_of_four_channels_is_refused(data_dir):
  with pytest.raises(UserError, match='4 channels. Allowed: 1 .gray. or 3'):
    catalog.load('tfds:toy_rgba')


class Counted:
  """Records that count how often each is read."""

  def __init__(self, records):
    self.records = records
    self.reads = collections.Counter()

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    self.reads[index] += 1
    return self.records[index]


class Damaged(Counted):
  """Records of which every seventh is damaged."""

  def __getitem__(self, index):
    if index % 7 == 0:
      raise ValueError('corrupt')
    return self.records[index]


def test_images_whose_label_cannot_be_read_are_not_left_out(data_dir):
  source = catalog.load('tfds:toy_digits').test
  source._records = Damaged(source._records)
  kept, labels = sources.labelled(source)
  # Who reads them will find out, and say so.
  assert len(kept) == len(source) == 100
  # (The first ten were read when the set was opened.)
  lost = np.flatnonzero(labels == sources.LOST)
  assert lost.tolist() == [*range(14, 100, 7)]
  with pytest.raises(Unreadable, match='corrupt'):
    kept.read(14)


def test_labels_of_a_batch_need_no_second_read(data_dir):
  source = catalog.load('tfds:toy_digits').train
  counted = source._records = Counted(source._records)
  read = pipeline.BatchReader(
      source, np.arange(64), 64, 0, (), 8, Workers(2), labelled=True
  )
  for step in range(6):
    batch, indices = read(step), read.indices(step)
    expected = [counted.records[i]['label'] for i in indices.tolist()]
    assert batch.labels.tolist() == expected
  assert len(counted.reads) == 6 * 64 and set(counted.reads.values()) == {1}


def test_an_empty_split_is_an_error(data_dir):
  with pytest.raises(UserError, match='toy_digits:train'):
    catalog.load('tfds:toy_digits:train[5:3]')


def test_an_unknown_split_is_told_the_known_ones(data_dir):
  with pytest.raises(UserError, match='train, test|test, train'):
    catalog.load('tfds:toy_digits:valid')


def test_an_unknown_set_is_told_the_nearest():
  with pytest.raises(UserError, match='Nearest: .*cifar10'):
    catalog.load('tfds:cifar01')


def test_a_set_that_is_not_prepared_gets_the_command(data_dir):
  with pytest.raises(UserError) as error:
    catalog.load('tfds:cifar10')
  text = str(error.value)
  assert "tfds.builder('cifar10'" in text
  assert f"data_dir='{data_dir}', file_format='array_record'" in text
  assert '.download_and_prepare()' in text


def test_a_set_of_tfrecord_files_gets_the_command_that_converts(
    tmp_path, monkeypatch
):
  path = toy_tfds.prepare(tmp_path)
  toy_tfds.pretend_tfrecord(path)
  monkeypatch.setattr(
      'tensorflow_datasets.core.constants.DATA_DIR', str(tmp_path)
  )
  with pytest.raises(UserError) as error:
    catalog.load('tfds:toy_digits')
  assert (
      f'tfds convert_format --dataset_version_dir={path} '
      '--out_file_format=array_record'
  ) in str(error.value)


@pytest.mark.slow
def test_training_on_a_prepared_set_imports_no_tensorflow(folder, tmp_path):
  # The command itself, followed by a look at what it imported.
  code = (
      'import runpy, sys\n'
      'try:\n'
      '  runpy.run_module("mocov3_jax.train", run_name="__main__")\n'
      'finally:\n'
      '  assert "tensorflow" not in sys.modules\n'
      '  assert "tensorflow_datasets" in sys.modules\n'
      '  print("IMPORTS CHECKED", file=sys.stderr)\n'
  )
  result = subprocess.run(
      [sys.executable, '-c', code, f'--workdir={tmp_path / "run"}', *FLAGS],
      cwd=tiny.ROOT, capture_output=True, text=True,
      env=os.environ | {'TFDS_DATA_DIR': str(folder), 'JAX_PLATFORMS': 'cpu'},
  )
  assert result.returncode == 0, result.stderr
  assert 'IMPORTS CHECKED' in result.stderr
  final = json.loads(result.stdout.splitlines()[-1])
  assert final['step'] == 12 and 0 <= final['knn/top1'] <= 1


def test_a_set_that_is_not_prepared_exits_with_2(
    folder, tmp_path, monkeypatch
):
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  code, out, err = tiny.call(
      'train', '--config=configs/cifar10.py', f'--workdir={tmp_path / "run"}'
  )
  assert code == 2 and out == '' and 'Traceback' not in err
  assert "tfds.builder('cifar10'" in err
  assert not (tmp_path / 'run').exists()
