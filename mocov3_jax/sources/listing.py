"""Which images a tree of folders holds, remembered until it changes."""

import collections
import hashlib
import os
import time
from typing import NamedTuple

from etils import epath
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import kept

SUFFIXES = (
    b'.jpg', b'.jpeg', b'.jpe', b'.jfif', b'.png', b'.webp', b'.bmp', b'.gif'
)
# These are images as well where there is none of the others. (Beside others,
# earlier versions passed them over, and a run must find the same images when it
# is continued.)
MORE_SUFFIXES = b'.tif', b'.tiff', b'.ppm', b'.pgm', b'.pnm'
# A folder changed so many seconds ago may change again within the resolution
# of its time stamp; its listing is not kept.
SETTLED = 2.0
# Of what is kept; another one is not read.
FORMAT = b'4'
# In how many ways links may lead to one folder: without a limit, folders full
# of links to each other would be listed for ever.
MOST_WAYS = 100
# What no path of a listing has: the beginning of an absolute one, and ways up.
OUTSIDE = b'\0/', b'\0../', b'/../', b'/..\0', b'\0..\0'


class Listing(NamedTuple):
  """What a tree holds.

  Attributes:
    paths: bytes objects [N], of the images, relative to the root, sorted. (An
      array of bytes would give each the length of the longest.)
    folders: bytes objects [F], likewise, the root as b''.
    stamps: int64 [F, 2], when each folder and its entry last changed, ns.
    reliable: whether a change of the tree will change these.
    broken_links: how many links lead nowhere, or to a folder they lie in.
    others: how many files are no images.
    passed_over: how many of these are of MORE_SUFFIXES.
  """

  paths: np.ndarray
  folders: np.ndarray
  stamps: np.ndarray
  reliable: bool
  broken_links: int
  others: int
  passed_over: int


def cache_folder(chosen: str) -> epath.Path | None:
  """Returns where listings are kept; None = nowhere.

  Args:
    chosen: `data.listing_cache`: a folder; '' = the user's cache folder
      (XDG_CACHE_HOME, or else ~/.cache), if there is one.

  Raises:
    UserError: for what is no path of this machine.
  """
  if chosen:
    return files.absolute(chosen, 'data.listing_cache')
  return files.user_cache('listings')


def walk(root: bytes) -> Listing:
  """Lists the images below `root`; a kind is told by the file's suffix.

  Links are followed, but not to a folder that the link lies in.

  Raises:
    OSError: if a folder cannot be read.
    UserError: if links lead to one folder in more than MOST_WAYS ways.
  """
  paths, more, folders, stamps, devices = [], [], [], [], set()
  broken_links = others = 0
  ways = collections.Counter()
  pending = [(b'', ())]  # A folder, and those that it lies in.
  while pending:
    folder, above = pending.pop()
    # Taken first: what changes from here on changes it once more.
    status = os.stat(os.path.join(root, folder))
    identity = status.st_dev, status.st_ino
    if identity in above:
      broken_links += 1
      continue
    ways[identity] += 1
    if ways[identity] > MOST_WAYS:
      raise UserError(
          f'links lead to the folder {os.fsdecode(os.path.join(root, folder))} '
          f'in more than {MOST_WAYS} ways. Allowed: so many.'
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
  """As `walk`, kept in the folder `cache` until the tree changes.

  Adding, removing or renaming a file changes the time stamps of its folder, so
  that asking a thousand folders tells whether a million files are the same.
  Where folders have no such time stamps, the tree is listed every time.
  """
  if cache is None:
    return walk(root)
  # A version that knows other suffixes, or follows other links, finds other
  # files.
  key = b'\0'.join((root, FORMAT, *SUFFIXES, *MORE_SUFFIXES))
  digest = hashlib.sha256(key).hexdigest()[:16]
  file = cache / f'{digest}.npz'
  try:
    listing = _load(file)
    if listing is not None and _is_current(root, listing):
      return listing
  except (OSError, UserError, *kept.DAMAGED):
    pass  # None yet, or no longer any use.
  listing = walk(root)
  settled = time.time() - listing.stamps.max() / 1e9 > SETTLED
  if listing.reliable and settled:
    _store(file, listing)
  return listing


def _load(file: epath.Path) -> Listing | None:
  """Returns what `_store` has kept; None if there is none.

  Raises:
    UserError, OSError, or one of kept.DAMAGED: for anything else.
  """
  saved = kept.load(file)
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
  kept.store(file, **(listing._asdict() | joined))
