"""Folders of images: layouts, labels, what is skipped, the cached listing."""

import os
import pathlib
import pwd
import time
from unittest import mock

import numpy as np
from PIL import Image
import pytest

from mocov3_jax.base.errors import UserError
from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.evals.opened import Opened
from mocov3_jax.protocols import setup
from mocov3_jax.sources import catalog, listing


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
  assert splits.test is None and splits.train.classes == ()
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
  assert len(splits.train.classes) == 2
  assert names(splits.test) == ['ant/00.png', 'ant/10.png', 'cat/05.png']
  assert labels(splits.test) == [0, 0, 1]
  assert len(splits.train) == 27
  assert not set(names(splits.train)) & set(names(splits.test))
  assert splits.train.classes == ('ant', 'cat')
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


@pytest.mark.parametrize('train, test', [
    ('train', 'val'), ('train', 'valid'), ('train', 'validation'),
    ('train', 'test'), ('Train', 'Test'), ('TRAIN', 'VAL'),
    ('training', 'validation'), ('Training', 'testing'), ('train', 'dev'),
    ('train', 'Evaluation'),
])
def test_train_and_val_folders_are_the_splits(tmp_path, train, test):
  plant(
      tmp_path, f'{train}/a/1.png', f'{train}/b/2.png', f'{test}/b/3.png',
      f'{test}/a/sub/4.png',
  )
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.train) == [f'{train}/a/1.png', f'{train}/b/2.png']
  assert labels(splits.train) == [0, 1]
  assert splits.train.classes == ('a', 'b')
  assert names(splits.test) == [f'{test}/a/sub/4.png', f'{test}/b/3.png']
  assert labels(splits.test) == [0, 1]


@pytest.mark.parametrize('link', ['train', 'val', 'train/a', 'val/b', '.'])
def test_splits_and_classes_may_be_links(tmp_path, link):
  root = tmp_path / 'root'
  plant(root, *(
      f'{split}/{c}/{i}.png' for split in ('train', 'val') for c in 'ab'
      for i in range(3)
  ))
  before = catalog.load(f'folder:{root}')
  target = (root / link).rename(tmp_path / 'elsewhere')
  (root if link == '.' else root / link).symlink_to(target)
  after = catalog.load(f'folder:{root}')
  assert names(after.train) == names(before.train)
  assert names(after.test) == names(before.test)
  assert after.train.read(0) == before.train.read(0)


def test_pictures_may_be_links(tmp_path):
  root = tmp_path / 'root'
  plant(tmp_path / 'elsewhere', '1.png', '2.png')
  root.mkdir()
  (root / 'a.png').symlink_to(tmp_path / 'elsewhere/1.png')
  (root / 'b.png').symlink_to(tmp_path / 'elsewhere/gone.png')
  splits = catalog.load(f'folder:{root}')
  assert names(splits.train) == ['a.png']
  assert '1 broken or circular links' in splits.note


def test_links_that_lead_back_end(tmp_path):
  root = tmp_path / 'root'
  plant(root, 'a/1.png', 'b/2.png')
  (root / 'a/up').symlink_to(root)
  (root / 'b/itself').symlink_to('itself')
  found = listing.walk(os.fsencode(root))
  assert found.paths.tolist() == [b'a/1.png', b'b/2.png']
  assert found.broken_links == 2


def test_folders_full_of_links_to_each_other_are_refused(tmp_path):
  root = tmp_path / 'root'
  for name in 'abcdefgh':
    plant(root, f'{name}/1.png')
  for name in 'abcdefgh':
    for other in set('abcdefgh') - {name}:
      (root / name / other).symlink_to(root / other)
  with pytest.raises(UserError, match='more than 100 ways'):
    catalog.load(f'folder:{root}')


@pytest.mark.parametrize('folders', [
    ('train2017', 'val2017'), ('train', 'test', 'extra'), ('cars', 'test'),
    ('seg_train', 'seg_test', 'seg_pred'), ('train_images', 'unlabeled'),
    ('cars_train', 'cars_test'), ('train', 'Train'), ('train_val2019', 'x'),
    ('Final_Training', 'Final_Test'), ('training_set', 'test_set'),
    ('train', 'training'), ('test', 'val'), ('bus', 'train'), ('test',),
    ('train', 'test1'), ('bounding_box_train', 'bounding_box_test', 'query'),
    ('set/train', 'set/val'), ('a/train', 'a/test', 'b/train', 'b/test'),
    ('images/Train', 'images/Val', 'masks/Train', 'masks/Val'),
    ('coco/train2017', 'coco/val2017'),
    ('train/x/train', 'train/x/dev', 'val/x/train'),
])
@pytest.mark.parametrize('chosen', ['auto', 'none'])
def test_what_looks_like_splits_in_another_layout_is_refused(
    tmp_path, folders, chosen
):
  plant(tmp_path, *(f'{f}/{c}/{i}.png' for f in folders for c in 'ab'
                    for i in range(2)))
  with pytest.raises(UserError, match='like.* split') as error:
    catalog.load(f'folder:{tmp_path}', chosen)
  assert 'data.labels=folders' in str(error.value)


@pytest.mark.parametrize('folders', [
    ('train_station', 'bus_station'), ('bullet_train', 'test_tube'),
    ('devices', 'valley'), ('evaluated', 'images'), ('contest', 'strain'),
    ('2017', '2018'),
])
def test_words_that_only_hold_a_split_are_classes(tmp_path, folders):
  plant(tmp_path, *(f'{f}/{i}.png' for f in folders for i in range(3)))
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.train.classes == tuple(sorted(folders))


def test_the_first_line_names_the_classes(tmp_path):
  plant(tmp_path, *(f'c{n:02}/{i}.png' for n in range(15) for i in range(2)))
  note = catalog.load(f'folder:{tmp_path}').note
  assert 'in 15 classes (c00, c01, ' in note and 'c11 and 3 more)' in note


def test_train_alone_is_a_split_too(tmp_path):
  plant(tmp_path, *(f'train/{c}/{i}.png' for c in 'ab' for i in range(10)))
  splits = catalog.load(f'folder:{tmp_path}')
  assert len(splits.train.classes) == 2
  assert (len(splits.train), len(splits.test)) == (18, 2)


def test_a_class_may_be_called_train_if_one_says_so(tmp_path):
  plant(tmp_path, *(f'{c}/{i}.png' for c in ('train', 'bus') for i in range(3)))
  splits = catalog.load(f'folder:{tmp_path}', 'folders')
  assert splits.train.classes == ('bus', 'train')


def test_an_image_beside_the_classes_may_stay_without_a_label(tmp_path):
  plant(
      tmp_path, 'train/montage.png',
      *(f'{s}/{c}/{i}.png' for s in ('train', 'val') for c in 'ab'
        for i in range(3))
  )
  splits = catalog.load(f'folder:{tmp_path}')
  assert splits.test is None
  assert '1 image beside the 2 subfolders (train/montage.png)' in (
      splits.note
  )
  splits = catalog.load(f'folder:{tmp_path}', 'folders')
  assert labels(splits.train) == [0, 0, 0, 1, 1, 1, -1]
  assert len(splits.test) == 6 and len(splits.bank) == 6
  assert '1 of them without a label' in splits.note


@pytest.mark.parametrize('paths, words', [
    (['train/a/1.png', 'train/b/1.png', 'val/A/1.png', 'val/B/1.png'],
     '2 of 2 test images in folders that are no class of the training '
     'images: A, B'),
    (['train/a/1.png', 'train/b/1.png', 'val/1.png'],
     '1 of 1 test image in no folder of a class, such as val/1.png'),
    (['1.png', '2.png'], 'no subfolders'),
    (['images/1.png', 'images/2.png'], 'images/ is the only subfolder'),
    (['train/a/1.png', 'train/b/1.png', 'val/a/1.png', 'test/a/2.png'],
     'test/ with 1 image is not used'),
])
def test_lost_labels_and_test_images_say_why(tmp_path, paths, words):
  plant(tmp_path, *paths)
  assert words in catalog.load(f'folder:{tmp_path}').note


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
  assert len(splits.train.classes) == 2
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
  assert len(splits.train.classes) == 2
  assert len(splits.train) + len(splits.test) == 3


def test_the_fingerprint_tells_other_images(tmp_path):
  plant(tmp_path, '1.png', '2.png')
  before = catalog.load(f'folder:{tmp_path}').fingerprint()
  assert catalog.load(f'folder:{tmp_path}').fingerprint() == before
  (tmp_path / '2.png').rename(tmp_path / '3.png')
  assert catalog.load(f'folder:{tmp_path}').fingerprint() != before


def test_other_files_are_skipped_and_counted(tmp_path):
  plant(tmp_path, 'a.png', '.hidden.png')
  (tmp_path / 'notes.txt').write_text('x')
  splits = catalog.load(f'folder:{tmp_path}')
  assert names(splits.train) == ['a.png']
  assert 'skipped 2 other files' in splits.note


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


@pytest.fixture
def later(monkeypatch):
  """Lets the clock say that all folders have been quiet for a while."""
  now = time.time
  monkeypatch.setattr(listing.time, 'time', lambda: now() + 10)


def test_a_listing_is_kept_until_the_tree_changes(tmp_path, monkeypatch, later):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, 'a/1.png', 'b/2.png')
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
  (root / 'a/1.png').unlink()
  assert load() == ['b/2.png', 'b/3.png']
  plant(root, 'c/deep/4.png')
  assert 'c/deep/4.png' in load()
  plant(root, 'c/deep/5.png')
  assert 'c/deep/5.png' in load()


@pytest.mark.parametrize('then', [0, 1_000_000_000])
def test_a_listing_does_not_trust_times_that_do_not_change(
    tmp_path, later, then
):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  load = lambda: names(catalog.load(f'folder:{root}', 'none', cache).train)
  for number in range(3):
    plant(root, f'a/{number}.png')
    for folder in root, root / 'a':
      os.utime(folder, (then, then))
    assert len(load()) == number + 1


def test_a_listing_of_a_mounted_bucket_is_not_kept(
    tmp_path, later, monkeypatch
):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  device = os.stat(root).st_dev
  monkeypatch.setattr(listing.files, 'fuse_devices', lambda: {device})
  catalog.load(f'folder:{root}', 'none', cache)
  assert not cache.exists()


def test_mounts_of_fuse_are_told_from_others(monkeypatch):
  lines = (
      '36 27 0:31 / /data rw - ext4 /dev/vdb rw\n'
      '37 27 0:45 / /mnt/my\\040bucket ro shared:1 - fuse.gcsfuse b ro\n'
      '38 27 0:46 / /mnt/x rw - fuse s rw\n'
      '39 27 0:47 / /mnt/y rw - fuseblk /dev/sdb1 rw\n'
  )
  monkeypatch.setattr('builtins.open', mock.mock_open(read_data=lines))
  found = listing.files.fuse_devices()
  monkeypatch.undo()
  assert found == {os.makedev(0, 45), os.makedev(0, 46)}


def test_listings_are_kept_in_the_users_cache(tmp_path, monkeypatch, later):
  root = tmp_path / 'root'
  plant(root, '1.png')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  place = listing.cache_folder('')
  assert place == tmp_path / 'cache' / 'mocov3_jax' / 'listings'
  catalog.load(f'folder:{root}', 'none', place)
  assert len(list(place.iterdir())) == 1
  assert place.stat().mode & 0o777 == 0o700
  # What is not absolute is ignored, as the specification of XDG demands.
  monkeypatch.setenv('XDG_CACHE_HOME', 'cache')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert listing.cache_folder('') == (
      tmp_path / '.cache' / 'mocov3_jax' / 'listings'
  )
  assert listing.cache_folder(str(tmp_path / 'mine')) == tmp_path / 'mine'


def test_a_user_without_a_home_keeps_no_listings(monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.delenv('HOME', raising=False)
  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  assert listing.cache_folder('') is None


def test_a_folder_that_changes_right_now_is_not_kept(tmp_path):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  catalog.load(f'folder:{root}', 'auto', cache)
  assert not cache.exists()


def test_a_listing_made_with_other_suffixes_is_not_used(
    tmp_path, monkeypatch, later
):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  (root / '2.new').write_text('x')
  load = lambda: names(catalog.load(f'folder:{root}', 'none', cache).train)
  assert load() == ['1.png'] and cache.exists()
  monkeypatch.setattr(listing, 'SUFFIXES', (*listing.SUFFIXES, b'.new'))
  assert load() == ['1.png', '2.new']


def test_a_damaged_listing_is_made_anew(tmp_path, later):
  root, cache = tmp_path / 'root', tmp_path / '.listings'
  plant(root, '1.png')
  catalog.load(f'folder:{root}', 'auto', cache)
  (file,) = cache.iterdir()
  for text in b'', b'PK\x03\x04 no archive', file.read_bytes()[:-40]:
    file.write_bytes(text)
    assert len(catalog.load(f'folder:{root}', 'auto', cache).train) == 1


def test_a_listing_that_cannot_be_kept_does_no_harm(tmp_path, later):
  root, cache = tmp_path / 'root', tmp_path / 'file'
  plant(root, '1.png')
  cache.write_text('mine')
  assert len(catalog.load(f'folder:{root}', 'auto', cache).train) == 1
  assert cache.read_text() == 'mine'
