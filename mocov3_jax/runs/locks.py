"""Lets only one process at a time write into a folder, on disks and in buckets.

On a disk, this is a lock on a file, which the kernel releases when the process
ends. A bucket has no locks, but if several processes create an object of the
same name, exactly one succeeds. There, claims are numbered objects, and the
highest number counts. Its owner rewrites it every few seconds. Once that stops,
the process that creates the next number gets the folder.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import threading
import time
from typing import IO

from etils import epath

from mocov3_jax.base import buckets, console, files
from mocov3_jax.base.errors import UserError

# Errors of file systems without locks: Lustre without -o flock, some FUSE
# mounts, NFS without its lock daemon.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# All in seconds: the interval between signs of life of a claim in a bucket; how
# long a claim is watched without one before it counts as abandoned; and the age
# of the last sign at which it counts as abandoned at once, which is longer than
# clocks differ.
SIGN, PATIENCE, OLD = 10.0, 60.0, 900.0
# The subfolder of the claims, and the pattern of their names.
CLAIMS, NUMBER = '.claims', r'\d{6}\.json'
# Exit code of a process whose claim another process has taken over.
LOST_CLAIM = 1


@contextlib.contextmanager
def held(
    folder: epath.Path, path: str, wait: bool = False
) -> Iterator[None]:
  """Holds a folder, so that no other process can hold it.

  Args:
    folder: the folder of a run or a sweep.
    path: the same folder as the user gave it, for messages.
    wait: whether to wait if another process holds the folder.

  Raises:
    UserError: if another process holds the folder, and `wait` is False.
  """
  hold = _claim if buckets.is_in_bucket(folder) else _lock_file
  with hold(folder, path, wait):
    yield


def is_held(folder: epath.Path) -> bool:
  """Returns whether a process holds a folder."""
  if buckets.is_in_bucket(folder):
    claim = _last_claim(folder)
    return (
        claim is not None and not claim.has_ended and claim.age < 2 * PATIENCE
    )
  try:
    with files.open_own(folder / '.lock', 'r') as file:
      # Shared, so that two processes that ask do not mistake each other for
      # the run.
      _lock(file, shared=True)
  except FileNotFoundError:
    pass
  except BlockingIOError:
    return True
  return False


def _in_use(path: str, by: str = 'another process') -> UserError:
  return UserError(
      f'--workdir={path} is in use by {by}. Allowed: to wait until it ends, or '
      'another workdir.'
  )


@contextlib.contextmanager
def _lock_file(folder: epath.Path, path: str, wait: bool) -> Iterator[None]:
  with files.open_own(folder / '.lock', 'w') as file:
    for attempt in range(20):
      try:
        if not _lock(file, wait=wait):
          console.say(
              f'note: the file system of {folder} has no locks; see to it '
              'that no other process writes there'
          )
        break
      except BlockingIOError as e:
        if attempt == 19:
          raise _in_use(path) from e
        # `is_held` in another process may hold the lock for a moment.
        time.sleep(0.05)
    yield


def _lock(file: IO[str], shared: bool = False, wait: bool = False) -> bool:
  """Locks an open file until it is closed.

  The kernel releases the lock when the process ends, for whatever reason.

  Args:
    file: the open file.
    shared: whether other processes may hold a shared lock at the same time.
    wait: whether to wait if another process holds the lock.

  Returns:
    Whether the file is locked; False if the file system has no locks.

  Raises:
    BlockingIOError: if another process holds the lock, and `wait` is False.
  """
  kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno not in NO_LOCKS:
      raise
    return False
  return True


@dataclasses.dataclass(frozen=True)
class _Claim:
  """The content of one object in CLAIMS.

  Attributes:
    file: the object.
    number: the number of the claim.
    owner: host and process, for messages.
    time: the time of the last sign of life in seconds, by the owner's clock.
    has_ended: whether the owner has released the folder.
  """

  file: epath.Path
  number: int
  owner: str
  time: float
  has_ended: bool

  @property
  def age(self) -> float:
    """Seconds since the last sign of life, if the clocks agree."""
    return time.time() - self.time


def _last_claim(folder: epath.Path) -> _Claim | None:
  """Returns the claim with the highest number; None if there is none.

  Raises:
    UserError: if the claim is damaged.
  """
  found = [
      path for path in files.entries(folder / CLAIMS)
      if re.fullmatch(NUMBER, path.name)
  ]
  if not found:
    return None
  file = found[-1]
  data = buckets.read(file)
  if data is None:  # It was removed, so there is a later one.
    return _last_claim(folder)
  try:
    value = files.parse(data)
    return _Claim(
        file, int(file.stem), str(value['owner']), float(value['time']),
        bool(value['ended']),
    )
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(
        f'{file} is damaged: {e}. Remove it, if no process writes into '
        f'{folder}.'
    ) from e


@contextlib.contextmanager
def _claim(folder: epath.Path, path: str, wait: bool) -> Iterator[None]:
  owner = f'process {os.getpid()} on {socket.gethostname()}'
  own = secrets.token_hex(8)

  def value(ended: bool) -> bytes:
    return json.dumps({
        'owner': owner, 'token': own, 'time': time.time(), 'ended': ended,
    }).encode()

  while True:
    last = _last_claim(folder)
    if last is not None and not _is_left(folder, last):
      if not wait:
        raise _in_use(path, console.shown(last.owner)[:100])
      continue
    number = last.number + 1 if last else 1
    file = folder / CLAIMS / f'{number:06d}.json'
    if buckets.create(file, value(ended=False)):
      break
    # The request may have succeeded although its answer was lost.
    if own.encode() in (buckets.read(file) or b''):
      break
    if not wait:
      raise _in_use(path)
  for earlier in files.entries(folder / CLAIMS):
    if earlier.name < file.name:
      with contextlib.suppress(OSError):
        earlier.unlink()

  ended = threading.Event()

  def show_life() -> None:
    while not ended.wait(SIGN):
      # A failure here is retried. If the bucket is out of reach for long,
      # another process may take over.
      with contextlib.suppress(Exception):
        last = _last_claim(folder)
        if last is not None and last.number > number:
          console.say(
              f'error: {console.shown(last.owner)[:100]} has taken over '
              f'{folder}, because this process had not renewed its claim for '
              f'{PATIENCE:.0f} s. It ends here.'
          )
          os._exit(LOST_CLAIM)
        file.write_bytes(value(ended=False))

  thread = threading.Thread(target=show_life, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    file.write_bytes(value(ended=True))


def _is_left(folder: epath.Path, claim: _Claim) -> bool:
  """Returns whether a claim is abandoned; this may take PATIENCE seconds."""
  if claim.has_ended or claim.age > OLD:
    return True
  console.say(
      f'{folder} is held by {console.shown(claim.owner)[:100]}; '
      f'checking for up to {PATIENCE:.0f} s whether it is still alive'
  )
  until = time.monotonic() + PATIENCE
  while time.monotonic() < until:
    time.sleep(SIGN / 5)
    now = _last_claim(folder)
    if now is None or now != claim:
      return now is None or now.has_ended
  return True
