"""A folder of images: flat, nested, or with a subfolder a class."""

import collections
import csv
import dataclasses
import io
import os

from etils import epath
import numpy as np

from mocov3_jax.data.decode import Unreadable
from mocov3_jax.data.listing import SUFFIXES, cached_walk
from mocov3_jax.data.sources import Source, Splits, hold_out
from mocov3_jax.errors import UserError
from mocov3_jax.workdir import absolute

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
    """The file's bytes.

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
    """The path of the file, relative to the root."""
    return os.fsdecode(self.paths[index])


def load(path: str, labels: str, cache: epath.Path | None) -> Splits:
  """Opens a folder of images.

  If it holds nothing but train/ and folders such as val/, those are the
  splits. Else all of it is trained on, less every tenth labelled image.

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
    names = _by_subfolder(path, train, test, start)
  else:
    names = _read_csv(path, listing.paths, labels)
  number = {name: i for i, name in enumerate(sorted(set(names.values())))}
  sources = [
      FolderSource(
          root, paths,
          np.array([number[names[p]] if p in names else -1
                    for p in paths.tolist()], np.int32),
          len(number),
      )
      for paths in (train, test)
  ]
  skipped = (
      f'; skipped {listing.symlinks} symlinks, {listing.others} other files'
  )
  return _splits(path, *sources, skipped)


def _root(path: str) -> bytes:
  if not path:
    raise UserError(
        "data.source='folder:' names no folder. Allowed: folder:PATH."
    )
  folder = absolute(path)
  if not folder.is_dir():
    raise UserError(
        f"data.source='folder:{path}': there is no folder {folder}."
    )
  return os.fsencode(folder)


def _splits(
    path: str, train: FolderSource, test: FolderSource, skipped: str
) -> Splits:
  note = f'folder:{path}: {len(train)} images'
  if not train.num_classes:
    return Splits(train, None, note + ' without labels' + skipped)
  source: Source = train
  held: Source = test
  if not len(test):
    source, held = hold_out(train, np.flatnonzero(train.all_labels >= 0))
    note = f'folder:{path}: {len(source)} images'
  return Splits(
      source, held,
      f'{note} in {train.num_classes} classes, {len(held)} to test on'
      + ('' if len(test) else ' (every tenth labelled one, held out)')
      + skipped,
  )


def _split(paths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """Paths to train on, to test on, and where classes begin in them, bytes."""
  tops = [
      os.fsdecode(path.partition(b'/')[0]) if b'/' in path else ''
      for path in paths.tolist()
  ]
  if TRAIN not in tops or not set(tops) <= {TRAIN, *TESTS}:
    return paths, paths[:0], 0
  tests = [name for name in TESTS if name in tops] or ['']
  tops = np.array(tops)
  return paths[tops == TRAIN], paths[tops == tests[0]], len(TRAIN) + 1


def _by_subfolder(
    path: str, train: np.ndarray, test: np.ndarray, start: int
) -> dict[bytes, str]:
  """{path: the folder it is in}, if these folders can be classes."""
  named = {}
  for image in train.tolist():
    name, slash, _ = image[start:].partition(b'/')
    if not slash:
      return {}  # An image beside the subfolders.
    named[image] = os.fsdecode(name)
  names = set(named.values())
  if len(names) < 2:
    return {}
  for image in test.tolist():
    parts = os.fsdecode(image).split('/')
    if len(parts) < 3 or parts[1] not in names:
      raise UserError(
          f"data.source='folder:{path}': {'/'.join(parts)} is in none of the "
          f'{len(names)} classes of {TRAIN}/. Allowed: the subfolders that '
          'are there; or data.labels=none.'
      )
    named[image] = parts[1]
  return named


def _read_csv(
    path: str, images: np.ndarray, labels: str
) -> dict[bytes, str]:
  """{path: label} as the CSV file `labels` has them."""
  where = f'data.labels={labels!r}'
  try:
    text = absolute(labels).read_text(encoding='utf-8-sig')
  except (OSError, ValueError) as e:
    raise UserError(
        f'{where} cannot be read: {e}. Allowed: auto, none, or the path of a '
        'CSV file with the columns path and label.'
    ) from e
  rows = csv.DictReader(io.StringIO(text))
  if not {'path', 'label'} <= set(rows.fieldnames or ()):
    raise UserError(
        f'{where} has the columns {", ".join(rows.fieldnames or ["none"])}. '
        'Allowed: path and label, named in its first line.'
    )
  named = {
      os.path.normpath(os.fsencode(row['path'])): row['label'] for row in rows
  }
  absent = named.keys() - set(images.tolist())
  if absent:
    raise UserError(
        f'{where} names {len(absent)} files that are no images in '
        f"'folder:{path}', such as {os.fsdecode(min(absent))}. Allowed: paths "
        'relative to that folder.'
    )
  counts = collections.Counter(named.values())
  if len(counts) < 2 or None in counts:
    raise UserError(
        f'{where} has {len(counts)} different labels in {len(named)} rows. '
        'Allowed: two or more, and one in every row.'
    )
  return named
