"""Folders of images: layouts, labels, what is skipped, the cached listing."""

import os
import pathlib
import time

import numpy as np
from PIL import Image
import pytest

from mocov3_jax.base.errors import UserError
from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.data import catalog, listing
from mocov3_jax.evals.opened import Opened
from mocov3_jax.protocols import setup


def plant(root, *paths):
  for path in paths:
    file = pathlib.Path(root) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4)).save(file)


def names(source):
  return [source.name(i) for i in range(len(source))]


def labels(source):
  return source.labels(np.arange(len(source))).tolist()


def test_a_flat_folder_has_no_labels(tmp_path):
  plant(tmp_path, 'b.png', 'a.jpg', 'C.JPEG')
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.train) == ['C.JPEG', 'a.jpg', 'b.png']
  assert splits.test is None and splits.train.num_classes == 0
  assert splits.train.read(0)[:2] == b'\xff\xd8'


def test_nested_folders_are_searched_to_any_depth(tmp_path):
  plant(tmp_path, '2020/05/a.png', '2020/b.png', 'c.gif', 'x/y/z/d.webp')
  splits = catalog.load(f'folder:{tmp_path}')
  assert len(splits.train) == 4 and splits.test is None


def test_subfolders_are_classes_and_every_tenth_image_is_held_out(tmp_path):
  plant(tmp_path, *(
      f'{c}/{i:02}.png' for c in ('cat', 'ant') for i in range(15)
  ))
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.train.num_classes == 2
  assert names(splits.test) == ['ant/00.png', 'ant/10.png', 'cat/05.png']
  assert labels(splits.test) == [0, 0, 1]
  assert len(splits.train) == 27
  assert not set(names(splits.train)) & set(names(splits.test))
  assert labels(splits.train) == [
      name.startswith('cat') for name in names(splits.train)
  ]


def test_a_folder_with_a_class_of_one_image_can_be_evaluated(tmp_path):
  plant(tmp_path, 'ant/0.png', *(f'cat/{i:02}.png' for i in range(15)))
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.test) == ['cat/00.png', 'cat/09.png']
  opened = Opened(None, f'folder:{tmp_path}', 'auto', splits, None, None)
  found = setup.labelled_splits(eval_config(), opened)
  assert (len(found.bank), len(found.test)) == (14, 2)


def test_classes_of_one_image_each_leave_none_to_test_on(tmp_path):
  plant(tmp_path, 'a/1.png', 'b/2.png')
  splits = catalog.load(f'folder:{tmp_path}')
  assert len(splits.train) == 2 and splits.test is None
  assert '2 images without labels to test on' in splits.note


@pytest.mark.parametrize('test', ['val', 'valid', 'validation', 'test'])
def test_train_and_val_folders_are_the_splits(tmp_path, test):
  plant(
      tmp_path, 'train/a/1.png', 'train/b/2.png', f'{test}/b/3.png',
      f'{test}/a/sub/4.png',
  )
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.train) == ['train/a/1.png', 'train/b/2.png']
  assert labels(splits.train) == [0, 1]
  assert names(splits.test) == [f'{test}/a/sub/4.png', f'{test}/b/3.png']
  assert labels(splits.test) == [0, 1]


def test_train_alone_is_a_split_too(tmp_path):
  plant(tmp_path, *(f'train/{c}/{i}.png' for c in 'ab' for i in range(10)))
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.train.num_classes == 2
  assert (len(splits.train), len(splits.test)) == (18, 2)


def test_a_class_may_be_called_train(tmp_path):
  plant(tmp_path, *(f'{c}/{i}.png' for c in ('train', 'bus') for i in range(3)))
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.train.num_classes == 2


def test_train_and_val_without_classes_have_no_labels(tmp_path):
  plant(tmp_path, 'train/1.png', 'train/2.png', 'val/3.png')
  splits = catalog.load(f'folder:{tmp_path}')
  assert len(splits.train) == 2 and splits.test is None


def test_labels_can_be_turned_off(tmp_path):
  plant(tmp_path, 'a/1.png', 'b/2.png')
  splits = catalog.load(f'folder:{tmp_path}', 'none')
  assert len(splits.train) == 2 and splits.test is None


def test_a_csv_gives_labels_to_some_images(tmp_path):
  plant(tmp_path, *(f'{i:02}.png' for i in range(30)))
  rows = [f'{i:02}.png,{"xy"[i % 2]}' for i in range(20)]
  csv = tmp_path / 'mine.csv'
  csv.write_text('\n'.join(['path,label', *rows]) + '\n')
  splits = catalog.load(f'folder:{tmp_path}', str(csv))
  assert splits.train.num_classes == 2
  assert names(splits.test) == ['00.png', '10.png']
  assert labels(splits.test) == [0, 0]
  assert len(splits.train) == 28
  assert labels(splits.train).count(-1) == 10


@pytest.mark.parametrize(
    'text, words',
    [
        ('path,label\n1.png,a\nno.png,b\n', ['1 files', 'no.png']),
        ('file,class\n1.png,a\n', ['file, class', 'path and label']),
        ('path,label\n1.png,a\n2.png,a\n', ['1 different labels']),
        ('path,label\n1.png,a\n2.png\n', ['row 2', 'both in every row']),
        ('label,path\na\nb,2.png\n', ['row 1', 'both in every row']),
        ('path,label\n1.png,a\n2.png,\n', ['row 2', 'both in every row']),
        ('path,label\n1.png,a\n./1.png,b\n', ['row 2', "'a'", "'b'"]),
        ('path,label\n1.png,"' + 'a' * 200_000, ['cannot be read']),
        ('', ['none', 'path and label']),
    ],
)
def test_a_wrong_csv_is_explained(tmp_path, text, words):
  plant(tmp_path, '1.png', '2.png')
  (tmp_path / 'l.csv').write_text(text)
  with pytest.raises(UserError) as error:
    catalog.load(f'folder:{tmp_path}', str(tmp_path / 'l.csv'))
  for word in [*words, 'l.csv']:
    assert word in str(error.value)


def test_a_csv_that_is_not_there_is_named(tmp_path):
  plant(tmp_path, '1.png')
  with pytest.raises(UserError, match="data.labels='/no.csv'"):
    catalog.load(f'folder:{tmp_path}', '/no.csv')


def test_test_images_outside_of_the_classes_are_left_out(tmp_path):
  classes = [f'train/{c}/{i}.png' for c in 'ab' for i in range(10)]
  plant(tmp_path, *classes, 'test/1.png', 'test/c/2.png', 'test/a/3.png')
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.test) == ['test/a/3.png'] and len(splits.train) == 20
  # With none in a class, a part of train/ is held out instead.
  (tmp_path / 'test/a/3.png').unlink()
  splits = catalog.load(f'folder:{tmp_path}')
  assert len(splits.test) == 2 and len(splits.train) == 18


def test_a_picture_beside_train_and_val_belongs_to_no_split(tmp_path):
  plant(
      tmp_path, 'overview.png', 'train/a/1.png', 'train/b/2.png', 'val/a/3.png'
  )
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.train) == ['train/a/1.png', 'train/b/2.png']
  assert names(splits.test) == ['val/a/3.png']


def test_a_csv_may_label_train_alone(tmp_path):
  images = [f'train/{i:02}.png' for i in range(20)]
  plant(tmp_path, *images, 'val/1.png')
  csv = tmp_path / 'l.csv'
  rows = [f'{path},{"xy"[i % 2]}' for i, path in enumerate(images)]
  csv.write_text('\n'.join(['path,label', *rows]))
  splits = catalog.load(f'folder:{tmp_path}', str(csv))
  assert (len(splits.train), len(splits.test)) == (18, 2)
  csv.write_text('path,label\ntrain/00.png,a\nval/1.png,b\n')
  splits = catalog.load(f'folder:{tmp_path}', str(csv))
  assert len(splits.bank) == 1 and names(splits.test) == ['val/1.png']


def test_hidden_folders_and_what_is_no_file_are_skipped(tmp_path):
  plant(
      tmp_path, 'a/1.png', 'a/5.png', 'b/2.png', '.thumbnails/3.png',
      'a/.cache/4.png',
  )
  os.mkfifo(tmp_path / 'a' / 'pipe.jpg')
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.train.num_classes == 2
  assert len(splits.train) + len(splits.test) == 3


def test_the_fingerprint_tells_other_images(tmp_path):
  plant(tmp_path, '1.png', '2.png')
  before = catalog.load(f'folder:{tmp_path}').fingerprint()
  assert catalog.load(f'folder:{tmp_path}').fingerprint() == before
  (tmp_path / '2.png').rename(tmp_path / '3.png')
  assert catalog.load(f'folder:{tmp_path}').fingerprint() != before


def test_symlinks_and_other_files_are_skipped_and_counted(tmp_path):
  root = tmp_path / 'root'
  plant(root, 'a.png', '.hidden.png')
  plant(tmp_path / 'elsewhere', 'b.png')
  (root / 'notes.txt').write_text('x')
  (root / 'link.png').symlink_to(root / 'a.png')
  (root / 'loop').symlink_to(root)
  splits = catalog.load(f'folder:{root}')
  assert names(splits.train) == ['a.png']
  assert 'skipped 2 symlinks, 2 other files' in splits.note


def test_an_empty_folder_is_an_error_that_counts_what_is_there(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(UserError, match='no image.*1 other files.*jpg'):
    catalog.load(f'folder:{tmp_path}')


@pytest.mark.parametrize('path', ['', '/nowhere/at/all'])
def test_no_folder_is_an_error(path):
  with pytest.raises(UserError, match='folder'):
    catalog.load(f'folder:{path}')


def test_names_that_are_no_text_are_read(tmp_path):
  with open(os.fsencode(tmp_path) + b'/\xff.png', 'wb') as file:
    file.write(b'x')
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.train.read(0) == b'x'


def age(root, seconds=10):
  """Makes the folders look as if nothing had happened for some seconds."""
  for folder, _, _ in os.walk(root):
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_a_listing_is_kept_until_the_tree_changes(tmp_path, monkeypatch):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, 'a/1.png', 'b/2.png')
  age(root)
  walks = []
  walk = listing.walk
  monkeypatch.setattr(
      listing, 'walk', lambda root: walks.append(root) or walk(root)
  )
  load = lambda: names(catalog.load(f'folder:{root}', 'none', cache).train)
  assert load() == load() == ['a/1.png', 'b/2.png']
  assert len(walks) == 1
  plant(root, 'b/3.png')
  assert load() == ['a/1.png', 'b/2.png', 'b/3.png'] and len(walks) == 2
  age(root)
  (root / 'a/1.png').unlink()
  assert load() == ['b/2.png', 'b/3.png']
  age(root)
  plant(root, 'c/deep/4.png')
  assert 'c/deep/4.png' in load()
  age(root)
  plant(root, 'c/deep/5.png')
  assert 'c/deep/5.png' in load()


def test_a_folder_that_changes_right_now_is_not_kept(tmp_path):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  catalog.load(f'folder:{root}', 'auto', cache)
  assert not cache.exists()


def test_a_listing_made_with_other_suffixes_is_not_used(tmp_path, monkeypatch):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  (root / '2.new').write_text('x')
  age(root)
  load = lambda: names(catalog.load(f'folder:{root}', 'none', cache).train)
  assert load() == ['1.png'] and cache.exists()
  monkeypatch.setattr(listing, 'SUFFIXES', (*listing.SUFFIXES, b'.new'))
  assert load() == ['1.png', '2.new']


def test_a_damaged_listing_is_made_anew(tmp_path):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  age(root)
  catalog.load(f'folder:{root}', 'auto', cache)
  (file,) = cache.iterdir()
  for text in b'', b'PK\x03\x04 no archive', file.read_bytes()[:-40]:
    file.write_bytes(text)
    assert len(catalog.load(f'folder:{root}', 'auto', cache).train) == 1


def test_a_listing_that_cannot_be_kept_does_no_harm(tmp_path):
  root, cache = tmp_path / 'root', tmp_path / 'file'
  plant(root, '1.png')
  age(root)
  cache.write_text('mine')
  assert len(catalog.load(f'folder:{root}', 'auto', cache).train) == 1
  assert cache.read_text() == 'mine'
