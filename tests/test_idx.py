"""The format of MNIST: read whole, or one clear message."""

import gzip
import struct

import numpy as np
import pytest

from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import catalog

IMAGES = {
    split: np.random.default_rng(n).integers(0, 256, (n, 5, 4), np.uint8)
    for split, n in (('train', 12), ('t10k', 6))
}
LABELS = {'train': np.arange(12) % 3 + 1, 't10k': np.arange(6) % 3 + 1}


def packed(array):
  array = np.asarray(array, np.uint8)
  head = struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
  return head + array.tobytes()


def write(folder, form='{}-{}-idx{}-ubyte.gz', **changes):
  """Writes the four files; `changes` are other bytes for some of them."""
  for split in 'train', 't10k':
    for kind, array in ('images', IMAGES), ('labels', LABELS):
      data = packed(array[split])
      if f'{split}_{kind}' in changes:
        data = changes[f'{split}_{kind}']
      name = form.format(split, kind, 3 if kind == 'images' else 1)
      if data is not None:
        (folder / name).write_bytes(
            gzip.compress(data) if name.endswith('.gz') else data
        )


@pytest.mark.parametrize('form', [
    '{}-{}-idx{}-ubyte.gz', '{}-{}-idx{}-ubyte', '{}-{}.idx{}-ubyte',
])
def test_the_files_of_a_set_are_read(tmp_path, form):
  write(tmp_path, form)
  splits = catalog.load(f'idx:{tmp_path}')
  assert splits.train.shape == (5, 4, 1) and len(splits.test) == 6
  for source, split in (splits.train, 'train'), (splits.test, 't10k'):
    np.testing.assert_array_equal(source.images[..., 0], IMAGES[split])
    # EMNIST's letters count from 1.
    np.testing.assert_array_equal(source.all_labels, LABELS[split] - 1)
  assert splits.train.classes == ('1', '2', '3')
  assert splits.bank is splits.train and '12 images of 5 x 4' in splits.note


def test_emnist_is_turned_upright(tmp_path):
  write(tmp_path, 'emnist-letters-{}-{}-idx{}-ubyte.gz')
  for path in tmp_path.glob('*t10k*'):
    path.rename(path.with_name(path.name.replace('t10k', 'test')))
  images = catalog.load(f'idx:{tmp_path}').train.images[..., 0]
  np.testing.assert_array_equal(images, IMAGES['train'].swapaxes(1, 2))


def test_a_run_goes_on_in_a_folder_that_was_moved(tmp_path):
  prints = []
  for name in 'here', 'there':
    (tmp_path / name).mkdir()
    write(tmp_path / name)
    prints.append(catalog.load(f'idx:{tmp_path / name}').fingerprint())
  assert prints[0] == prints[1]


WHOLE = packed(IMAGES['train'])


@pytest.mark.parametrize('changes, words', [
    ({'t10k_labels': None}, 'lacks test labels.*dataset-fashion-mnist'),
    ({'train_images': WHOLE[:-1]}, 'has fewer'),
    ({'train_images': WHOLE + b'x'}, 'has more'),
    ({'train_images': b'\x89PNG' + WHOLE}, 'no IDX file'),
    ({'train_images': b''}, 'no IDX file'),
    ({'train_images': WHOLE[:6]}, 'cannot be read'),
    # A terabyte, which nothing is made for.
    ({'train_images': struct.pack('>4B3I', 0, 0, 8, 3, 2**20, 2**10, 2**10)},
     'its header says'),
    ({'train_images': packed(IMAGES['train'][:11])}, 'train files.*do not fit'),
    ({'t10k_images': packed(IMAGES['t10k'][:, :4])}, 'to test on'),
])
def test_what_is_wrong_is_named(tmp_path, changes, words):
  write(tmp_path, **changes)
  with pytest.raises(UserError, match=f'(?s){words}'):
    catalog.load(f'idx:{tmp_path}')


def test_other_folders_are_refused(tmp_path):
  with pytest.raises(UserError, match='lacks train images, train labels'):
    catalog.load(f'idx:{tmp_path / "absent"}')
  write(tmp_path)
  write(tmp_path, 'emnist-letters-{}-{}-idx{}-ubyte.gz')
  with pytest.raises(UserError, match='several sets: , emnist-letters-'):
    catalog.load(f'idx:{tmp_path}')
  broken = tmp_path / 'broken'
  broken.mkdir()
  write(broken)
  (broken / 'train-images-idx3-ubyte.gz').write_bytes(b'no gzip at all')
  with pytest.raises(UserError, match='cannot be read: Not a gzipped file'):
    catalog.load(f'idx:{broken}')
