"""Lists the images in a tree of folders, cached until the tree changes."""

import collections
import hashlib
import os
import time
from typing import NamedTuple

from etils import epath
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import index_cache

SUFFIXES = (
    b'.jpg', b'.jpeg', b'.jpe', b'.jfif', b'.png', b'.webp', b'.bmp', b'.gif'
)
# These count as images only if there are none of the others. (Earlier versions
# ignored them beside others, and a continued run must find the same images.)
MORE_SUFFIXES = b'.tif', b'.tiff', b'.ppm', b'.pgm', b'.pnm'
# A folder that changed less than this many seconds ago may change again within
# the resolution of its time stamp, so its listing is not cached.
SETTLED = 2.0
# Version of the cache files; others are not read.
FORMAT = b'4'
# Maximum number of ways in which links may lead to one folder. Without a limit,
# folders full of links to each other would be listed forever.
MOST_WAYS = 100
# What no path of a listing contains: a leading slash, and steps to a parent.
OUTSIDE = b'\0/', b'\0../', b'/../', b'/..\0', b'\0..\0'


class Listing(NamedTuple):
  """The contents of a tree of folders.

  Attributes:
    paths: bytes objects [N], sorted paths of the images relative to the root.
      (A fixed-width array would give each the length of the longest.)
    folders: bytes objects [F], paths of the folders likewise; the root is b''.
    stamps: int64 [F, 2], time of the last change of each folder's contents
      (mtime) and of its metadata (ctime), ns.
    reliable: whether every change of the tree changes the stamps.
    broken_links: number of links that lead nowhere, or to a folder they lie in.
    others: number of files that are not images.
    passed_over: number of these that have one of MORE_SUFFIXES.
  """

  paths: np.ndarray
  folders: np.ndarray
  stamps: np.ndarray
  reliable: bool
  broken_links: int
  others: int
  passed_over: int


def cache_folder(chosen: str) -> epath.Path | None:
  """Returns the folder in which listings are cached; None = no cache.

  Args:
    chosen: `data.listing_cache`: a folder; '' = the user's cache folder
      (XDG_CACHE_HOME, or else ~/.cache), if there is one.

  Raises:
    UserError: if `chosen` is not a path on this machine.
  """
  if chosen:
    return files.absolute(chosen, 'data.listing_cache')
  return files.user_cache('listings')


def walk(root: bytes) -> Listing:
  """Lists the images below `root`, which are recognised by their suffix.

  Links are followed, but not to a folder that the link lies in.

  Raises:
    OSError: if a folder cannot be read.
    UserError: if links lead to one folder in more than MOST_WAYS ways.
  """
  paths, more, folders, stamps, devices = [], [], [], [], set()
  broken_links = others = 0
  ways = collections.Counter()
  pending = [(b'', ())]  # A folder, and the folders that it lies in.
  while pending:
    folder, above = pending.pop()
    # Read before listing: any later change alters the stamp once more.
    status = os.stat(os.path.join(root, folder))
    identity = status.st_dev, status.st_ino
    if identity in above:
      broken_links += 1
      continue
    ways[identity] += 1
    if ways[identity] > MOST_WAYS:
      raise UserError(
          f'links lead to the folder {os.fsdecode(os.path.join(root, folder))} '
          f'in more than {MOST_WAYS} ways. Allowed: at most {MOST_WAYS}.'
      )
    stamps.append((status.st_mtime_ns, status.st_ctime_ns))
    devices.add(status.st_dev)
    folders.append(folder)
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(b'.'):
          others += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
          broken_links += 1
        elif entry.is_dir():
          pending.append((path, (*above, identity)))
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
          paths.append(path)
        elif entry.is_file() and entry.name.lower().endswith(MORE_SUFFIXES):
          more.append(path)
        else:
          others += 1
  if not paths:
    paths, more = more, []
  stamps = np.array(stamps, np.int64)
  reliable = stamps[:, 0].all() and not devices & files.fuse_devices()
  return Listing(
      np.array(sorted(paths), object), np.array(folders, object), stamps,
      bool(reliable), broken_links, others + len(more), len(more),
  )


def cached_walk(root: bytes, cache: epath.Path | None) -> Listing:
  """Does the same as `walk`, cached in `cache` until the tree changes.

  Adding, removing or renaming a file changes the time stamps of its folder. So
  checking a thousand folders shows whether a million files are the same. If
  folders have no such time stamps, the tree is listed every time.
  """
  if cache is None:
    return walk(root)
  # Versions that know other suffixes or follow other links find other files, so
  # they need another key.
  key = b'\0'.join((root, FORMAT, *SUFFIXES, *MORE_SUFFIXES))
  digest = hashlib.sha256(key).hexdigest()[:16]
  file = cache / f'{digest}.npz'
  try:
    listing = _load(file)
    if listing is not None and _is_current(root, listing):
      return listing
  except (OSError, UserError, *index_cache.DAMAGED):
    pass  # Not cached yet, or no longer usable.
  listing = walk(root)
  settled = time.time() - listing.stamps.max() / 1e9 > SETTLED
  if listing.reliable and settled:
    _store(file, listing)
  return listing


def _load(file: epath.Path) -> Listing | None:
  """Returns the listing that `_store` has cached; None if there is none.

  Raises:
    UserError, OSError, or one of index_cache.DAMAGED: if the file cannot be
      used.
  """
  saved = index_cache.load(file)
  if saved is None:
    return None
  found = {name: saved[name] for name in Listing._fields}
  for name in 'paths', 'folders':
    text = found[name].tobytes()
    if any(part in b'\0%b\0' % text for part in OUTSIDE):
      raise ValueError('it leads out of the folder')
    found[name] = np.array(text.split(b'\0'), object)
  return Listing(**found)


def _is_current(root: bytes, listing: Listing) -> bool:
  for folder, then in zip(
      listing.folders.tolist(), listing.stamps.tolist(), strict=True
  ):
    status = os.stat(os.path.join(root, folder))
    if [status.st_mtime_ns, status.st_ctime_ns] != then:
      return False
  return True


def _store(file: epath.Path, listing: Listing) -> None:
  joined = {
      name: np.frombuffer(b'\0'.join(paths.tolist()), np.uint8)
      for name, paths in (
          ('paths', listing.paths), ('folders', listing.folders)
      )
  }
  index_cache.store(file, **(listing._asdict() | joined))
