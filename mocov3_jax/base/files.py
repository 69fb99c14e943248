"""Paths that users give, and files that are there whole or not at all.

What is said here of the files and folders of a run goes for objects of a bucket
as well, where the run is in one; see `buckets`.
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

# Files and folders in the folder of a run, and bytes of its JSON files, at
# most: far more than a run writes.
MOST_ENTRIES, MOST_JSON = 100_000, 2**24
# Seconds between two copies of a growing file in a bucket, at least, and how
# many times longer than a copy takes that is.
FOLLOWED, MOST_SHARE = 60.0, 50
# Bytes of an object that are asked for at once, when it is read.
READ_AT_ONCE = 2**20
# Seconds after which to look whether what was appended to an object has stayed.
APPENDED_AGAIN = 0.5, 1.0, 2.0
# With what a formula begins in a spreadsheet.
FORMULA = '=', '+', '-', '@', '\t', '\r'


def absolute(path: str, field: str = 'the path') -> epath.Path:
  """Returns the absolute path, which Orbax wants.

  Args:
    path: as given.
    field: what it is, for the message.

  Raises:
    UserError: for a URL.
  """
  if not path:
    raise UserError(f'{field} is empty. Allowed: a path.')
  if '://' in path:
    raise UserError(
        f'{field}: {path!r} is a URL. Use a path of this machine, or a '
        'mounted one. (The workdir of a run, and what is read of runs, may be '
        'gs://BUCKET/FOLDER.)'
    )
  return epath.Path(os.path.abspath(os.path.expanduser(path)))


def run_path(path: str, field: str = 'the path') -> epath.Path:
  """Returns the path of a run: absolute on this machine, or gs://...

  Args:
    path: as given.
    field: what it is, for the message.

  Raises:
    UserError: for another URL, or a bucket that cannot be used here.
  """
  if buckets.is_in_bucket(path):
    return buckets.path_of(path, field)
  return absolute(path, field)


def fuse_devices() -> set[int]:
  """Returns the devices (st_dev) of file systems that programs provide.

  Mounted buckets are such. They may keep no times of folders, may show nothing
  of a file before it is closed, and rename no folder in one piece.
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
  """Returns whether files there grow in sight, and folders can be renamed.

  That is so but in buckets, mounted ones included.
  """
  if buckets.is_in_bucket(folder):
    return False
  return os.stat(folder).st_dev not in fuse_devices()


def entries(folder: epath.Path) -> list[epath.Path]:
  """Returns what a folder of a run holds, sorted; nothing if there is none."""
  try:
    return sorted(folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []


def make_folder(folder: epath.Path) -> None:
  """Makes a folder of a run and those above it, where there are such things.

  A bucket has none, but names with slashes.
  """
  if not buckets.is_in_bucket(folder):
    folder.mkdir(parents=True, exist_ok=True)


def user_cache(name: str) -> epath.Path | None:
  """Returns a folder for what can be made again; None for a user without one.

  It lies below XDG_CACHE_HOME, or else ~/.cache.
  """
  cache = os.getenv('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):
    home = os.path.expanduser('~')
    if not os.path.isabs(home):  # No HOME, and no entry in the passwd file.
      return None
    cache = os.path.join(home, '.cache')
  return epath.Path(cache) / 'mocov3_jax' / name


def new_output(path: str, suffix: str, field: str = '--out') -> epath.Path:
  """Returns the absolute path of a file that a command is to make.

  Args:
    path: as given.
    suffix: that the name must have, such as '.png'.
    field: what it is, for the message.

  Raises:
    UserError: if the name ends otherwise, or the file is there.
  """
  found = absolute(path, field)
  if found.suffix != suffix or found.exists():
    what = 'exists' if found.exists() else f'does not end with {suffix}'
    raise UserError(
        f'{field}={path} {what}. Use a new file that ends with {suffix}.'
    )
  return found


def move_folder(folder: epath.Path, target: epath.Path) -> None:
  """Moves a folder of a run to a place where there is none yet."""
  if buckets.is_in_bucket(folder):
    buckets.move(folder, target)
  elif is_on_disk(folder):
    folder.rename(target)
  else:
    shutil.copytree(folder, target)
    shutil.rmtree(folder)


def require_plain(folder: epath.Path) -> None:
  """Checks that a run's folder holds nothing but files and folders.

  Links in it could lead whatever reads or writes there to other places, and
  pipes and devices have no end. The folder itself may be reached by a link.

  Raises:
    UserError: with the first that is neither, or if there are too many.
  """
  if buckets.is_in_bucket(folder):  # It has objects alone.
    return
  count = 0
  waiting = [os.fspath(folder)]
  while waiting:
    try:
      with os.scandir(waiting.pop()) as found:
        entries = list(itertools.islice(found, MOST_ENTRIES))
    except FileNotFoundError:  # The run goes on, and removes old checkpoints.
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
            f'{entry.path} is {what}, which has no place in the folder of a '
            'run. Replace it by what it stands for, or remove it.'
        )


def allocated(folder: epath.Path) -> int:
  """Returns the bytes that the files of a folder take on the disk, in all.

  A file with holes counts for what is stored of it.
  """
  if buckets.is_in_bucket(folder):
    return buckets.size(folder)
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        found = os.lstat(os.path.join(parent, name))
        # Small files can lie beside their names, and take no blocks.
        stored = 512 * found.st_blocks or found.st_size
        total += min(found.st_size, stored)
  return total


def open_own(path: epath.Path, mode: str, **options: Any) -> Any:
  """Opens a file of a run, as `open` does, if it is a file and no link.

  Args:
    path: of the file.
    mode: as that of `open`; of an object in a bucket, for reading.
    **options: as those of `open`.

  Raises:
    UserError: if it is anything else.
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
      f'{path} is no regular file, but a link, a pipe or the like. Replace it '
      'by a file, or remove it.'
  )


def read_own(path: epath.Path, most: int) -> bytes | None:
  """Reads a file of a run; None if there is none.

  Args:
    path: of the file.
    most: bytes that it may have.

  Raises:
    UserError: if it is larger, or no regular file.
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
  """Opens a file to be written whole: it appears once all is written.

  A file that was there is replaced then, and kept if something fails before.

  Args:
    path: of the file.
    field: the flag that named the file; with it, errors of the file system
      become UserError.
    parents: whether to make the folders that it lies in.

  Yields:
    A binary file.

  Raises:
    UserError: if the file that `field` names cannot be written.
  """
  if buckets.is_in_bucket(path):
    # An object is there once it is written, whole.
    buffer = io.BytesIO()
    yield buffer
    path.write_bytes(buffer.getvalue())
    return
  # A name that nobody can have put there before: several processes may write
  # one file, and others may have a say in the folder.
  part = path.with_name(f'.{path.name[:60]}.{secrets.token_hex(8)}.part')
  try:
    if parents:
      path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, 'xb') as file:
      yield file
      # Or a crash of the machine could leave an empty file by that name.
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
  """Writes a JSON value, indented, whole or not at all."""
  with open_whole(path) as file:
    file.write((json.dumps(value, indent=2) + '\n').encode())


class AppendedFile:
  """A text file of a run that grows.

  On a disk, what is appended is there at once, also if the process is killed.
  In a bucket it is there once it is flushed: an object cannot grow and is
  written anew, and a mounted bucket shows a file once it is closed.
  """

  def __init__(self, path: epath.Path, begin: bytes | None = None):
    """Opens the file.

    Args:
      path: of the file.
      begin: what it is to hold, in place of what it holds.

    Raises:
      UserError: if it is no regular file.
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
    # Now and then, for who follows a run; the longer it takes, the rarer.
    if time.monotonic() > self._next:
      self._write_object()

  def flush(self) -> None:
    """Puts on disk, or in the bucket, what was appended."""
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
  """Appends lines to a text file of a run, which need not be there yet.

  If a kill cut off its last line, that line ends before them. In a bucket the
  lines of others who append at the same time may replace these; they are
  appended until they stay.

  Raises:
    UserError: if it is no regular file.
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
  """Returns a cell that a spreadsheet takes for text, if it is a text.

  One that begins as a formula does gets an apostrophe before it.
  """
  if isinstance(value, str) and value.startswith(FORMULA):
    return f"'{value}"
  return value


def parse(text: str | bytes) -> Any:
  """Parses JSON from outside.

  Raises:
    ValueError: if it is none, or nested without end.
  """
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError('it is nested too deeply') from e


def read_object(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object that a run wrote; empty if there is no file.

  Raises:
    UserError: if the file holds none, is too large, or is no regular file.
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
        f'{path} is damaged: {str(e)[:200]}. Use the JSON object that a '
        'run wrote; or no such file, if it cannot be had.'
    ) from e
  return found
