"""A folder of images: flat, nested, or with a subfolder a class."""

import csv
import dataclasses
import io
import os

from etils import epath
import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.base.files import absolute
from mocov3_jax.data.decode import Unreadable
from mocov3_jax.data.listing import SUFFIXES, cached_walk
from mocov3_jax.data.sources import Source, Splits, Subset, hold_out

# Names of the folders of the splits; the first that is there is tested on.
TRAIN, TESTS = 'train', ('val', 'valid', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class FolderSource:
  """Image files below a folder, as a `sources.Source`.

  Attributes:
    root: of the tree.
    paths: bytes [N], relative to it.
    all_labels: int32 [N], -1 where there is none.
    num_classes: how many labels there are; 0 without labels.
  """

  root: bytes
  paths: np.ndarray
  all_labels: np.ndarray
  num_classes: int
  shape = None

  def __len__(self) -> int:
    return len(self.paths)

  def read(self, index: int) -> bytes:
    """Returns the file's bytes.

    Raises:
      Unreadable: if it cannot be read.
    """
    try:
      with open(os.path.join(self.root, self.paths[index]), 'rb') as file:
        return file.read()
    except OSError as e:
      raise Unreadable(e.strerror or str(e)) from e

  def labels(self, indices: np.ndarray) -> np.ndarray:
    """Labels of these images."""
    return self.all_labels[indices]

  def name(self, index: int) -> str:
    """Returns the path of the file, relative to the root."""
    return os.fsdecode(self.paths[index])


def load(path: str, labels: str, cache: epath.Path | None) -> Splits:
  """Opens a folder of images.

  If its only folders are train/ and such as val/, those are the splits. Else
  all of it is trained on, less every tenth labelled image (never the last of
  a class).

  Args:
    path: of the folder.
    labels: 'auto': the names of the subfolders, if there are at least two
      with images, and none beside them. 'none'. Or the path of a CSV file
      with the columns path (relative to the folder) and label; images that it
      does not name have no label.
    cache: where the listing is kept.

  Raises:
    UserError: if there is no folder, or no image in it, or the CSV is wrong.
  """
  root = _root(path)
  try:
    listing = cached_walk(root, cache)
  except OSError as e:
    raise UserError(
        f"data.source='folder:{path}' cannot be listed: {e.strerror} "
        f'({os.fsdecode(e.filename)}).'
    ) from e
  if not len(listing.paths):
    raise UserError(
        f"data.source='folder:{path}' holds no image ({listing.symlinks} "
        f'symlinks and {listing.others} other files). Allowed: files named '
        f'{" ".join(s.decode() for s in SUFFIXES)}, at any depth.'
    )
  train, test, start = _split(listing.paths)
  if labels == 'none':
    names = {}
  elif labels == 'auto':
    names = _by_subfolder(train, test, start)
  else:
    names = _read_csv(path, listing.paths, labels)
  number = {name: i for i, name in enumerate(sorted(set(names.values())))}
  train, test = (
      FolderSource(
          root, paths,
          np.array([number[names[p]] if p in names else -1
                    for p in paths.tolist()], np.int32),
          len(number),
      )
      for paths in (train, test)
  )
  skipped = (
      f'; skipped {listing.symlinks} symlinks, {listing.others} other files'
  )
  return _splits(path, train, test, skipped)


def _root(path: str) -> bytes:
  if not path:
    raise UserError(
        "data.source='folder:' names no folder. Allowed: folder:PATH."
    )
  folder = absolute(path, 'data.source')
  if not folder.is_dir():
    raise UserError(
        f"data.source='folder:{path}': there is no folder {folder}."
    )
  return os.fsencode(folder)


def _splits(
    path: str, train: FolderSource, test: FolderSource, skipped: str
) -> Splits:
  test_labelled = np.flatnonzero(test.all_labels >= 0)
  labelled = np.flatnonzero(train.all_labels >= 0)
  source: Source = train
  held: Source = Subset(test, test_labelled)
  how = ''
  if not len(test_labelled) and len(labelled) > 1:
    source, held = hold_out(train, labelled, train.all_labels[labelled])
    labelled = np.flatnonzero(source.labels(np.arange(len(source))) >= 0)
    how = ' (every tenth labelled one, held out)'
  note = f'folder:{path}: {len(source)} images'
  if not len(labelled) or not len(held):
    lacking = 'labels to test on' if train.num_classes else 'labels'
    return Splits(source, None, None, f'{note} without {lacking}{skipped}')
  return Splits(
      source, Subset(source, labelled), held,
      f'{note} in {train.num_classes} classes, {len(held)} to test on{how}'
      + skipped,
  )


def _split(paths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """Paths to train on, to test on, and where classes begin in them, bytes."""
  tops = [
      os.fsdecode(path.partition(b'/')[0]) if b'/' in path else ''
      for path in paths.tolist()
  ]
  # Images beside train/ (contact sheets and the like) belong to no split.
  if TRAIN not in tops or not set(tops) <= {TRAIN, *TESTS, ''}:
    return paths, paths[:0], 0
  tests = [name for name in TESTS if name in tops] or [None]
  tops = np.array(tops)
  return paths[tops == TRAIN], paths[tops == tests[0]], len(TRAIN) + 1


def _by_subfolder(
    train: np.ndarray, test: np.ndarray, start: int
) -> dict[bytes, str]:
  """Returns {path: its subfolder}, if these folders can be classes."""
  named = {}
  for image in train.tolist():
    name, slash, _ = image[start:].partition(b'/')
    if not slash:
      return {}  # An image beside the subfolders.
    named[image] = os.fsdecode(name)
  names = set(named.values())
  if len(names) < 2:
    return {}
  # Test images outside of these classes stay without a label.
  for image in test.tolist():
    parts = os.fsdecode(image).split('/')
    if len(parts) > 2 and parts[1] in names:
      named[image] = parts[1]
  return named


def _read_csv(
    path: str, images: np.ndarray, labels: str
) -> dict[bytes, str]:
  """Returns {path: label} as the CSV file `labels` has them."""
  where = f'data.labels={labels!r}'
  try:
    text = absolute(labels, 'data.labels').read_text(encoding='utf-8-sig')
    rows = csv.DictReader(io.StringIO(text))
    columns = rows.fieldnames or ['none']
    rows = list(rows) if {'path', 'label'} <= set(columns) else None
  except (OSError, ValueError, csv.Error) as e:
    raise UserError(
        f'{where} cannot be read: {e}. Allowed: auto, none, or the path of a '
        'CSV file with the columns path and label.'
    ) from e
  if rows is None:
    raise UserError(
        f'{where} has the columns {", ".join(columns)}. Allowed: path and '
        'label, named in its first line.'
    )
  named = {}
  for number, row in enumerate(rows, start=1):
    if not row['path'] or not row['label']:
      raise UserError(
          f'{where}: row {number} lacks a path or a label. Allowed: both in '
          'every row.'
      )
    image = os.path.normpath(os.fsencode(row['path']))
    if image in named and named[image] != row['label']:
      raise UserError(
          f'{where}: row {number} gives {row["path"]} the label '
          f'{row["label"]!r}, an earlier one {named[image]!r}. Allowed: one.'
      )
    named[image] = row['label']
  absent = named.keys() - set(images.tolist())
  if absent:
    raise UserError(
        f'{where} names {len(absent)} files that are no images in '
        f"'folder:{path}', such as {os.fsdecode(min(absent))}. Allowed: paths "
        'relative to that folder.'
    )
  if len(set(named.values())) < 2:
    raise UserError(
        f'{where} has {len(set(named.values()))} different labels in '
        f'{len(named)} rows. Allowed: two or more.'
    )
  return named
