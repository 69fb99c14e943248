"""A folder of images: flat, nested, or with one subfolder per class."""

import csv
import dataclasses
import io
import os
import stat

from etils import epath
import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.base.files import absolute
from mocov3_jax.sources import Splits, Unreadable, labelled_splits, layout
from mocov3_jax.sources.listing import (
  MORE_SUFFIXES,
  SUFFIXES,
  Listing,
  cached_walk,
)

# Maximum bytes of an image file.
MOST_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class FolderSource:
  """Image files below a folder, as a `sources.Source`.

  Attributes:
    root: path of the folder.
    paths: bytes objects [N], paths of the images relative to `root`.
    all_labels: int32 [N], -1 for images without a label.
    classes: names of the labels; empty if there are no labels.
    channels: number of channels that the images are read with.
  """

  root: bytes
  paths: np.ndarray
  all_labels: np.ndarray
  classes: tuple[str, ...]
  channels: int = 3
  shape = None
  labels_at_hand = True

  def __len__(self) -> int:
    return len(self.paths)

  def read(self, index: int) -> bytes:
    """Returns the file's bytes.

    Raises:
      Unreadable: if it cannot be read.
    """
    try:
      path = os.path.join(self.root, self.paths[index])
      with open(path, 'rb', opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
          raise Unreadable('no regular file')
        if status.st_size > MOST_BYTES:
          raise Unreadable(
              f'{status.st_size:,} bytes are more than {MOST_BYTES:,}'
          )
        return file.read(MOST_BYTES)
    except OSError as e:
      raise Unreadable(e.strerror or str(e)) from e

  def labels(self, indices: np.ndarray) -> np.ndarray:
    """Returns the labels of these images."""
    return self.all_labels[indices]

  def name(self, index: int) -> str:
    """Returns the path of the file, relative to the root."""
    return os.fsdecode(self.paths[index])


def _without_waiting(path: bytes, flags: int) -> int:
  # Opening a named pipe in the place of an image must not block.
  return os.open(path, flags | os.O_NONBLOCK)


def load(
    path: str, labels: str, cache: epath.Path | None, channels: int = 3
) -> Splits:
  """Opens a folder of images.

  If its only subfolders are train/ and test folders such as val/
  (`layout.TESTS`), these are the splits. Otherwise all images are trained on
  except every tenth labelled one (never the last of a class), which is held
  out.

  Args:
    path: path of the folder.
    labels: 'auto': the names of the subfolders, if at least two have images and
      no images lie beside them. 'folders': the names of the subfolders, even if
      images lie beside them or they are named like splits. 'none': no labels.
      Otherwise the path of a CSV file with the columns path (relative to the
      folder) and label; images that it does not name have no label.
    cache: folder in which the listing is cached; None = no cache.
    channels: number of channels that the images are read with; see
      `data/channels.py`.

  Raises:
    UserError: if there is no such folder, or no image in it; if folders look
      like splits, but not in that layout; or if the CSV file is wrong.
  """
  root, where = _root(path), f'folder:{path}'
  listing = _list(where, root, cache)
  found = layout.find_splits(where, listing.paths, labels == 'folders')
  names, remarks = {}, ()
  if labels in ('auto', 'folders'):
    names, remarks = layout.classes_by_folder(found, labels == 'folders')
  elif labels != 'none':
    names = _read_csv(path, listing.paths, labels)
  classes = tuple(sorted(set(names.values())))
  number = {name: i for i, name in enumerate(classes)}
  train, test = (
      FolderSource(
          root, paths,
          np.array([number[names[p]] if p in names else -1
                    for p in paths.tolist()], np.int32),
          classes, channels,
      )
      for paths in (found.train, found.test)
  )
  remarks = (*remarks, *found.remarks)
  if listing.others or listing.broken_links:
    remarks += (
        f'skipped {listing.others} other files and {listing.broken_links} '
        'broken or circular links',
    )
  if listing.passed_over:
    remarks += (
        f'{listing.passed_over} of these are TIFF, PPM or PGM files, which are '
        'used only if there are no other images: move them to their own folder',
    )
  return labelled_splits(where, train, test, remarks)


def _list(where: str, root: bytes, cache: epath.Path | None) -> Listing:
  try:
    found = cached_walk(root, cache)
  except OSError as e:
    raise UserError(
        f'data.source={where!r} cannot be listed: {e.strerror} '
        f'({os.fsdecode(e.filename)}).'
    ) from e
  if not len(found.paths):
    raise UserError(
        f'data.source={where!r} holds no image ({found.others} other files, '
        f'{found.broken_links} broken or circular links). Allowed: '
        f'files named '
        f'{" ".join(s.decode() for s in (*SUFFIXES, *MORE_SUFFIXES))}, at any '
        'depth.'
    )
  return found


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


def _read_csv(
    path: str, images: np.ndarray, labels: str
) -> dict[bytes, str]:
  """Returns {path: label} from the CSV file `labels`."""
  where = f'data.labels={labels!r}'
  try:
    # Not opened by epath, which ignores the encoding. Excel begins a CSV file
    # with a byte order mark.
    file = open(
        absolute(labels, 'data.labels'), encoding='utf-8-sig', newline=''
    )
    with file:
      text = file.read()
    rows = csv.DictReader(io.StringIO(text, newline=''))
    columns = rows.fieldnames or ['none']
    rows = list(rows) if {'path', 'label'} <= set(columns) else None
  except (OSError, ValueError, csv.Error) as e:
    raise UserError(
        f'{where} cannot be read: {e}. Allowed: auto, folders, none, or the '
        'path of a CSV file with the columns path and label.'
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
          f'{row["label"]!r}, but an earlier row gives it {named[image]!r}. '
          'Allowed: one label per image.'
      )
    named[image] = row['label']
  absent = named.keys() - set(images.tolist())
  if absent:
    raise UserError(
        f'{where} names {len(absent)} files that are not images in '
        f"'folder:{path}', such as {os.fsdecode(min(absent))}. Use paths "
        'relative to that folder.'
    )
  if len(set(named.values())) < 2:
    raise UserError(
        f'{where} has {len(set(named.values()))} different labels in '
        f'{len(named)} rows. Allowed: two or more.'
    )
  return named
