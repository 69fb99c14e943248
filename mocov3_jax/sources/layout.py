"""Finds out which folders of a tree are splits and which are classes."""

from collections.abc import Iterable, Sequence
import os
import re
from typing import NamedTuple

import numpy as np

from mocov3_jax.base.errors import UserError

# Names of split folders, in upper or lower case. The first of TESTS that exists
# is tested on.
TRAIN = ('train', 'training')
TESTS = (
    'val', 'valid', 'validation', 'dev', 'test', 'testing', 'eval', 'evaluation'
)
# Further words that make a folder name look like a split, such as trainval, and
# words that may stand beside them, as in test_images.
MORE_SPLITS = {'trn', 'tst', 'trainset', 'testset', 'valset', 'trainval'}
FILLERS = {
    'data', 'dataset', 'folder', 'full', 'image', 'images', 'imgs', 'mini',
    'pictures', 'set', 'small', 'split',
}
# Maximum number of names in a message, and of classes in the log.
SHOWN, NAMED = 3, 12


class Layout(NamedTuple):
  """The splits of a tree.

  Attributes:
    train, test: bytes [N], [n], paths to train on and to test on.
    depth: number of levels above the class folders, 0 or 1.
    remarks: what is not used, in words.
  """

  train: np.ndarray
  test: np.ndarray
  depth: int
  remarks: tuple[str, ...]


def find_splits(where: str, paths: np.ndarray, classes_only: bool) -> Layout:
  """Finds the splits of a tree by the names of its folders.

  Args:
    where: name of the tree, for messages.
    paths: bytes [N], paths of the images relative to the root.
    classes_only: whether folders that look like splits in an unknown layout are
      classes.

  Raises:
    UserError: if folders look like splits in an unknown layout, unless
      `classes_only`. Taking them for classes would train on test images.
  """
  tops = [
      os.fsdecode(path.partition(b'/')[0]) if b'/' in path else ''
      for path in paths.tolist()
  ]
  folders = set(tops) - {''}
  layout = _known(paths, tops, folders)
  if not classes_only:
    if layout is None:
      _refuse_lookalikes(where, folders)
    _refuse_nested(where, paths.tolist())
  return layout or Layout(paths, paths[:0], 0, ())


def _known(
    paths: np.ndarray, tops: Sequence[str], folders: set[str]
) -> Layout | None:
  """Returns the layout if it is train/ and folders of TESTS; else None."""
  by_name = {name.lower(): name for name in folders}
  train = [by_name[name] for name in TRAIN if name in by_name]
  tests = [by_name[name] for name in TESTS if name in by_name]
  if len(train) != 1 or {*train, *tests} != folders:
    return None
  tops = np.array(tops)
  test = paths[:0] if not tests else paths[tops == tests[0]]
  remarks = []
  for name in tests[1:]:
    remarks.append(f'{name}/ with {images(np.sum(tops == name))} is not used')
  beside = paths[tops == ''].tolist()
  if beside:  # Contact sheets and the like.
    remarks.append(
        f'not used: {images(len(beside))} beside {train[0]}/ '
        f'({listed(beside)})'
    )
  return Layout(paths[tops == train[0]], test, 1, tuple(remarks))


def _refuse_lookalikes(where: str, folders: set[str]) -> None:
  found = sorted(name for name in folders if _is_split(name))
  if not found:
    found = _pairs(folders)
  if not found:
    return
  others = sorted(folders - set(found))
  beside = f' beside {listed(others)}' if others else ''
  raise UserError(
      f'{where}: {listed(found)} look{"s" if len(found) == 1 else ""} like a '
      f'split{beside}, but this is not a known layout of splits. Allowed: no '
      f'folders except train/ and one or more of {"/, ".join(TESTS)}/ (train '
      'may be called training; upper and lower case are the same; links are '
      f'allowed); a single folder, such as {where.rstrip("/")}/{found[0]}; or '
      'data.labels=folders, if each folder is a class.'
  )


def _refuse_nested(where: str, paths: Iterable[bytes]) -> None:
  parents = {path.rpartition(b'/')[0] for path in paths}
  children = {}
  for folder in parents:
    names = os.fsdecode(folder).split('/')
    for level in range(1, len(names)):
      children.setdefault('/'.join(names[:level]), set()).add(names[level])
  for folder, names in sorted(children.items()):
    splits = [name for name in sorted(names) if _is_split(name)]
    pair = [
        next((name for name in splits if _words(name) & set(known)), None)
        for known in (TRAIN, TESTS)
    ]
    if all(pair):
      raise UserError(
          f'{where}: {folder}/ holds {pair[0]}/ and {pair[1]}/, which look '
          'like splits, but splits are expected only at the top level. '
          f'Allowed: {where.rstrip("/")}/{folder}, if that is the data set; '
          'train/CLASS/ and val/CLASS/, if each class has its own splits; or '
          'data.labels=folders, if they are not splits.'
      )


def _is_split(name: str) -> bool:
  """Whether a name means only a split: Test, train2017, val_images."""
  words = _words(name)
  splits = {*TRAIN, *TESTS, *MORE_SPLITS}
  return bool(words & splits) and words <= splits | FILLERS


def _words(name: str) -> set[str]:
  return set(re.findall('[a-z]+', name.lower()))


def _pairs(folders: Iterable[str]) -> list[str]:
  """Returns names that differ only in the split: cars_train, cars_test."""
  of_kind = {}, {}
  for name in folders:
    words = re.findall('[a-z]+', name.lower())
    for found, known in zip(of_kind, (TRAIN, TESTS), strict=True):
      if set(words) & set(known):
        found[tuple(w for w in words if w not in known)] = name
  return sorted(
      name for rest in of_kind[0].keys() & of_kind[1].keys()
      for name in (of_kind[0][rest], of_kind[1][rest])
  )


def classes_by_folder(
    layout: Layout, stray_images: bool
) -> tuple[dict[bytes, str], tuple[str, ...]]:
  """Finds the classes of images by the names of their folders.

  Args:
    layout: the splits of the tree.
    stray_images: whether images may lie beside the class folders. They then
      have no label.

  Returns:
    {path: class}, empty if these folders cannot be classes; and, in words, why
    images of either split have no label.
  """
  named, strays = {}, []
  for image in layout.train.tolist():
    name = class_folder(image, layout.depth)
    if name is None:
      strays.append(image)
    else:
      named[image] = name
  names = set(named.values())
  if not names:
    return {}, ('there are no subfolders to be classes',)
  if len(names) == 1:
    (only,) = names
    return {}, (f'{only}/ is the only subfolder, and one class is too few',)
  remarks = []
  if strays:
    remarks.append(
        f'{images(len(strays))} beside the {len(names)} subfolders '
        f'({listed(strays)})'
    )
    if not stray_images:
      return {}, (
          f'{remarks[0]}: move them away, or set data.labels=folders to leave '
          'them alone without a label',
      )
  lost, unknown = [], set()
  for image in layout.test.tolist():
    name = class_folder(image, layout.depth)
    if name in names:
      named[image] = name
    else:
      lost.append(image)
      unknown.add(name)
  if lost:
    unknown.discard(None)
    which = (
        f'folders that are no class of the training images: '
        f'{listed(sorted(unknown))}' if unknown else
        f'no folder of a class, such as {listed(lost[:1])}'
    )
    remarks.append(
        f'left out: {len(lost)} of {images(len(layout.test), "test image")} in '
        f'{which}'
    )
  return named, tuple(remarks)


def class_folder(image: bytes, depth: int) -> str | None:
  """Returns an image's parent folder at this depth; None if there is none."""
  folders = image.split(b'/')[:-1]
  return os.fsdecode(folders[depth]) if len(folders) > depth else None


def images(count: int, what: str = 'image') -> str:
  """Returns '1 image' or '2 images'."""
  return f'{count} {what}' + ('s' if count != 1 else '')


def listed(names: Sequence[str | bytes], shown: int = SHOWN) -> str:
  """Returns the first of some names, and how many more there are."""
  text = ', '.join(os.fsdecode(name) for name in names[:shown])
  if len(names) > shown:
    text += f' and {len(names) - shown:,} more'
  return text
