"""Paths that users give, atomic writes, and other operations on files.

If a run is in a bucket, its files and folders are objects there; see `buckets`.
"""

from collections.abc import Iterator
import contextlib
import errno
import io
import itertools
import json
import os
import random
import secrets
import shutil
import stat
import time
from typing import Any, BinaryIO

from etils import epath

from mocov3_jax.base import buckets
from mocov3_jax.base.errors import UserError

# The most files and folders in the folder of a run, and the most bytes of its
# JSON files: far more than a run writes.
MOST_ENTRIES, MOST_JSON = 100_000, 2**24
# A growing file in a bucket is copied at most every FOLLOWED seconds, and at
# most every MOST_SHARE times as long as a copy takes.
FOLLOWED, MOST_SHARE = 60.0, 50
# How many bytes of an object are requested at a time.
READ_AT_ONCE = 2**20
# Seconds after which to check whether appended text is still in an object.
APPENDED_AGAIN = 0.5, 1.0, 2.0
# The characters with which a formula in a spreadsheet can begin.
FORMULA = '=', '+', '-', '@', '\t', '\r'


def absolute(path: str, field: str = 'the path') -> epath.Path:
  """Returns the absolute path, which Orbax requires.

  Args:
    path: as given.
    field: the flag or field that has the path, for error messages.

  Raises:
    UserError: if the path is empty or a URL.
  """
  if not path:
    raise UserError(f'{field} is empty. Allowed: a path.')
  if '://' in path:
    raise UserError(
        f'{field}: {path!r} is a URL. Use a path on this machine, or a '
        'mounted one. (The workdir of a run may be gs://BUCKET/FOLDER, where '
        'it is written and where it is read.)'
    )
  return epath.Path(os.path.abspath(os.path.expanduser(path)))


def run_path(path: str, field: str = 'the path') -> epath.Path:
  """Returns the path of a run: absolute on this machine, or gs://...

  Args:
    path: as given.
    field: the flag or field that has the path, for error messages.

  Raises:
    UserError: if it is empty, another URL, or a bucket that cannot be used.
  """
  if buckets.is_in_bucket(path):
    return buckets.path_of(path, field)
  return absolute(path, field)


def fuse_devices() -> set[int]:
  """Returns the devices (st_dev) of FUSE file systems, such as mounted buckets.

  These may not keep the times of folders, may not show a file before it is
  closed, and do not rename a folder atomically.
  """
  try:
    with open('/proc/self/mountinfo', encoding='utf-8') as file:
      mounts = [line.split(' - ') for line in file]
  except (OSError, ValueError):  # Not Linux.
    return set()
  return {
      os.makedev(*map(int, mount.split()[2].split(':')))
      for mount, kind in mounts
      if kind == 'fuse' or kind.startswith(('fuse.', 'fuse '))
  }


def is_on_disk(folder: epath.Path) -> bool:
  """Returns whether readers see files grow, and folders can be renamed.

  This holds everywhere except in buckets, including mounted ones.
  """
  if buckets.is_in_bucket(folder):
    return False
  return os.stat(folder).st_dev not in fuse_devices()


def entries(folder: epath.Path) -> list[epath.Path]:
  """Returns the sorted content of a folder of a run; [] if there is none."""
  try:
    return sorted(folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []


def make_folder(folder: epath.Path) -> None:
  """Makes a folder of a run and its parents.

  In a bucket it does nothing, since there are only names with slashes.
  """
  if not buckets.is_in_bucket(folder):
    folder.mkdir(parents=True, exist_ok=True)


def user_cache(name: str) -> epath.Path | None:
  """Returns a cache folder; None if the user has none.

  It is in XDG_CACHE_HOME, or else in ~/.cache.
  """
  cache = os.getenv('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):
    home = os.path.expanduser('~')
    if not os.path.isabs(home):  # No HOME, and no entry in the passwd file.
      return None
    cache = os.path.join(home, '.cache')
  return epath.Path(cache) / 'mocov3_jax' / name


def new_output(path: str, suffix: str, field: str = '--out') -> epath.Path:
  """Returns the absolute path of a file that a command will create.

  Args:
    path: as given.
    suffix: the suffix that the name must have, such as '.png'.
    field: the flag or field that has the path, for error messages.

  Raises:
    UserError: if the name has another suffix, or the file exists.
  """
  found = absolute(path, field)
  if found.suffix != suffix or found.exists():
    what = 'exists' if found.exists() else f'does not end with {suffix}'
    raise UserError(
        f'{field}={path} {what}. Use a new file that ends with {suffix}.'
    )
  return found


def move_folder(folder: epath.Path, target: epath.Path) -> None:
  """Moves a folder of a run to a path that does not exist yet."""
  if buckets.is_in_bucket(folder):
    buckets.move(folder, target)
  elif is_on_disk(folder):
    folder.rename(target)
  else:
    shutil.copytree(folder, target)
    shutil.rmtree(folder)


def require_plain(folder: epath.Path) -> None:
  """Checks that a run's folder holds nothing but files and folders.

  Links could lead reads and writes to other places, and pipes and devices have
  no end. The folder itself may be reached by a link.

  Raises:
    UserError: if there is anything else, or if there are too many entries.
  """
  if buckets.is_in_bucket(folder):  # A bucket has only objects.
    return
  count = 0
  waiting = [os.fspath(folder)]
  while waiting:
    try:
      with os.scandir(waiting.pop()) as found:
        entries = list(itertools.islice(found, MOST_ENTRIES))
    except FileNotFoundError:  # A run has just removed an old checkpoint.
      continue
    count += len(entries)
    if count >= MOST_ENTRIES:
      raise UserError(
          f'{folder} holds {MOST_ENTRIES:,} files or more. Use the folder of '
          'one run.'
      )
    for entry in entries:
      if entry.is_dir(follow_symlinks=False):
        waiting.append(entry.path)
      elif not entry.is_file(follow_symlinks=False):
        what = 'a link' if entry.is_symlink() else 'a pipe or a device'
        raise UserError(
            f'{entry.path} is {what}, which is not allowed in the folder of a '
            'run. Replace it with a file or folder, or remove it.'
        )


def allocated(folder: epath.Path) -> int:
  """Returns the bytes that the files of a folder take on the disk.

  Of a sparse file, only the stored part counts.
  """
  if buckets.is_in_bucket(folder):
    return buckets.size(folder)
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        found = os.lstat(os.path.join(parent, name))
        # Small files can be stored in the inode, and take no blocks.
        stored = 512 * found.st_blocks or found.st_size
        total += min(found.st_size, stored)
  return total


def open_own(path: epath.Path, mode: str, **options: Any) -> Any:
  """Opens a file of a run like `open`, but only if it is a regular file.

  Args:
    path: the file.
    mode: as in `open`; for an object in a bucket, only 'r' and 'rb'.
    **options: as in `open`.

  Raises:
    UserError: if it is a link or not a regular file.
    OSError: as `open`.
  """
  if buckets.is_in_bucket(path):
    if mode not in ('r', 'rb'):
      raise ValueError(f'{path} cannot be opened to be changed')
    file = io.BufferedReader(path.open('rb'), READ_AT_ONCE)
    return file if mode == 'rb' else io.TextIOWrapper(file, **options)

  def opener(name, flags):
    return os.open(
        name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
    )

  try:
    file = open(path, mode, opener=opener, **options)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      return file
    file.close()
  except OSError as e:
    if e.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
      raise
  raise UserError(
      f'{path} is not a regular file but a link, a pipe or the like. Replace '
      'it with a file, or remove it.'
  )


def read_own(path: epath.Path, most: int) -> bytes | None:
  """Reads a file of a run; None if there is none.

  Args:
    path: the file.
    most: the most bytes that it may have.

  Raises:
    UserError: if it is larger, or not a regular file.
  """
  try:
    with open_own(path, 'rb') as file:
      size = file.seek(0, os.SEEK_END)
      if size <= most:
        file.seek(0)
        return file.read()
  except FileNotFoundError:
    return None
  raise UserError(
      f'{path} has {size:,} bytes, more than the {most:,} that a run writes '
      'there.'
  )


@contextlib.contextmanager
def open_whole(
    path: epath.Path, field: str = '', parents: bool = False
) -> Iterator[BinaryIO]:
  """Opens a file for an atomic write: it appears once everything is written.

  An existing file is replaced only then, and kept if something fails before.

  Args:
    path: the file.
    field: the flag that named the file; if given, file system errors become
      UserError.
    parents: whether to create the parent folders.

  Yields:
    A binary file.

  Raises:
    UserError: if the file that `field` names cannot be written.
  """
  if buckets.is_in_bucket(path):
    # An object appears only once it is completely written.
    buffer = io.BytesIO()
    yield buffer
    path.write_bytes(buffer.getvalue())
    return
  # A random name, which cannot exist yet: several processes may write the same
  # file, and other users may write to the folder.
  part = path.with_name(f'.{path.name[:60]}.{secrets.token_hex(8)}.part')
  try:
    if parents:
      path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, 'xb') as file:
      yield file
      # Without this, a crash of the machine could leave an empty file.
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  except OSError as e:
    if not field:
      raise
    raise UserError(
        f'{field}={path} cannot be written: {e.strerror or e}. Use a '
        'place this user may write to.'
    ) from e
  finally:
    with contextlib.suppress(OSError):  # If something failed before.
      os.unlink(part)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON value, indented, atomically."""
  with open_whole(path) as file:
    file.write((json.dumps(value, indent=2) + '\n').encode())


class AppendedFile:
  """A text file of a run that grows.

  On a disk, appended text is in the file at once, even if the process dies.
  In a bucket, it is there only after a flush: an object cannot grow and is
  rewritten, and a mounted bucket shows a file only after it is closed.
  """

  def __init__(self, path: epath.Path, begin: bytes | None = None):
    """Opens the file.

    Args:
      path: the file.
      begin: replaces the file's content; None = the content is kept.

    Raises:
      UserError: if it is not a regular file.
    """
    self._path = path
    self._file = self._held = None
    if begin is not None:
      with open_whole(path) as file:
        file.write(begin)
    if buckets.is_in_bucket(path):
      if begin is None and path.exists():
        begin = path.read_bytes()
      self._held = io.BytesIO()
      self._held.write(begin or b'')
      self._changed = False
      self._next = 0.0
    else:
      self._file = open_own(path, 'ab')

  def append(self, text: str) -> None:
    """Appends a text; surrogates are written as the bytes they stand for."""
    data = text.encode(errors='surrogateescape')
    if self._held is None:
      self._file.write(data)
      self._file.flush()
      return
    self._held.write(data)
    self._changed = True
    # For those who follow a run. The longer a write takes, the less often it is
    # repeated.
    if time.monotonic() > self._next:
      self._write_object()

  def flush(self) -> None:
    """Writes the appended text to disk or to the bucket."""
    if self._held is None:
      os.fsync(self._file.fileno())
      self._file.close()
      self._file = open_own(self._path, 'ab')
    else:
      self._write_object()

  def close(self) -> None:
    """Flushes and closes the file."""
    if self._held is None:
      self._file.close()
    else:
      self._write_object()

  def _write_object(self) -> None:
    if self._changed:
      began = time.monotonic()
      self._path.write_bytes(self._held.getvalue())
      self._changed = False
      now = time.monotonic()
      self._next = now + max(FOLLOWED, MOST_SHARE * (now - began))


def append(path: epath.Path, text: str) -> None:
  """Appends lines to a text file of a run, which need not exist yet.

  If the file's last line is incomplete, a line end is added first. In a bucket,
  another process that appends at the same time may overwrite these lines. So
  they are checked a few times, and appended again if they are gone.

  Raises:
    UserError: if it is not a regular file.
    OSError: if it cannot be written.
  """
  _append(path, text)
  if buckets.is_in_bucket(path):
    for wait in APPENDED_AGAIN:
      time.sleep(wait * (0.5 + random.random()))
      if text.encode(errors='surrogateescape') not in path.read_bytes():
        _append(path, text)


def _append(path: epath.Path, text: str) -> None:
  try:
    with open_own(path, 'rb') as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - 1))
      cut_off = file.read(1) not in (b'', b'\n')
  except FileNotFoundError:
    cut_off = False
  file = AppendedFile(path)
  with contextlib.closing(file):
    file.append('\n' * cut_off + text)


def csv_text(value: Any) -> Any:
  """Returns a cell that a spreadsheet does not take for a formula.

  A text that begins like a formula gets an apostrophe in front.
  """
  if isinstance(value, str) and value.startswith(FORMULA):
    return f"'{value}"
  return value


def parse(text: str | bytes) -> Any:
  """Parses JSON from outside.

  Raises:
    ValueError: if it is not valid JSON, or too deeply nested.
  """
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError('it is nested too deeply') from e


def read_object(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object that a run wrote; empty if there is no file.

  Raises:
    UserError: if the file holds no JSON object, is too large, or is not a
      regular file.
  """
  data = read_own(path, MOST_JSON)
  if data is None:
    return {}
  try:
    found = parse(data)
    if not isinstance(found, dict):
      raise ValueError(f'it holds {type(found).__name__}, no object')
  except ValueError as e:
    raise UserError(
        f'{path} is damaged: {str(e)[:200]}. Use the file that the run wrote, '
        'or delete it if that is lost.'
    ) from e
  return found
