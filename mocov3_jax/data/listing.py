"""Which images a tree of folders holds, remembered until it changes."""

import hashlib
import io
import os
import time
from typing import NamedTuple
import zipfile
import zlib

from etils import epath
import numpy as np

from mocov3_jax.base import files

SUFFIXES = (
    b'.jpg', b'.jpeg', b'.jpe', b'.jfif', b'.png', b'.webp', b'.bmp', b'.gif'
)
# A folder changed so many seconds ago may change again within the resolution
# of its time stamp; its listing is not kept.
SETTLED = 2.0
# What numpy raises for a damaged archive.
DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Listing(NamedTuple):
  """What a tree holds.

  Attributes:
    paths: bytes [N], of the images, relative to the root, sorted.
    folders: bytes [F], likewise, the root as b''.
    times: int64 [F], modification times of the folders, ns.
    symlinks, others: how many of each were skipped.
  """

  paths: np.ndarray
  folders: np.ndarray
  times: np.ndarray
  symlinks: int
  others: int


def walk(root: bytes) -> Listing:
  """Lists the images below `root`; a kind is told by the file's suffix."""
  paths, folders, times = [], [], []
  symlinks = others = 0
  pending = [b'']
  while pending:
    folder = pending.pop()
    # Taken first: what changes from here on changes it once more.
    times.append(os.stat(os.path.join(root, folder)).st_mtime_ns)
    folders.append(folder)
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.is_symlink():
          symlinks += 1
        elif entry.name.startswith(b'.'):
          others += 1
        elif entry.is_dir():
          pending.append(path)
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
          paths.append(path)
        else:
          others += 1
  listing = np.sort(np.array(paths, np.bytes_))
  return Listing(
      listing, np.array(folders, np.bytes_), np.array(times, np.int64),
      symlinks, others,
  )


def cached_walk(root: bytes, cache: epath.Path | None) -> Listing:
  """As `walk`, kept in the folder `cache` until the tree changes.

  Adding, removing or renaming a file changes the time stamp of its folder, so
  that asking a thousand folders tells whether a million files are the same.
  """
  if cache is None:
    return walk(root)
  # A version that knows other suffixes finds other files.
  key = b'\0'.join((root, *SUFFIXES))
  digest = hashlib.sha256(key).hexdigest()[:16]
  file = cache / f'{digest}.npz'
  try:
    with np.load(io.BytesIO(file.read_bytes())) as saved:
      listing = Listing(*(saved[name] for name in Listing._fields))
    if _is_current(root, listing):
      return listing
  except (OSError, *DAMAGED):
    pass  # None yet, or no longer any use.
  listing = walk(root)
  if time.time() - listing.times.max() / 1e9 > SETTLED:
    _store(file, listing)
  return listing


def _is_current(root: bytes, listing: Listing) -> bool:
  return all(
      os.stat(os.path.join(root, folder)).st_mtime_ns == then
      for folder, then in zip(
          listing.folders.tolist(), listing.times.tolist(), strict=True
      )
  )


def _store(file: epath.Path, listing: Listing) -> None:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **listing._asdict())
  try:
    with files.open_whole(file, parents=True) as whole:
      whole.write(buffer.getvalue())
  except OSError:
    pass  # Only a convenience; the workdir itself tells what is wrong.
