"""Who may write into a folder: one process at a time, on disks and in buckets.

On a disk that is a lock on a file, which the kernel drops with the process. A
bucket has no locks, but of several who create an object of a name exactly one
succeeds. So claims are numbered objects there, and the highest one counts. Its
owner writes it anew every few seconds; where that has ended, whoever creates
the next number has the folder.
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

# What file systems without locks answer: Lustre without -o flock, some FUSE
# mounts, NFS without its lock daemon.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# Seconds between two signs of life of a claim in a bucket; without one, for how
# long it is watched before it counts as left; and the age of the last sign at
# which it is not even watched, longer than clocks differ.
SIGN, PATIENCE, OLD = 10.0, 60.0, 900.0
# Where claims lie in the folder, and how they are called.
CLAIMS, NUMBER = '.claims', r'\d{6}\.json'
# Exit code of a process whose claim another one has taken over.
LOST_CLAIM = 1


@contextlib.contextmanager
def held(
    folder: epath.Path, path: str, wait: bool = False
) -> Iterator[None]:
  """Holds a folder, so that no other process can.

  Args:
    folder: of a run or a sweep.
    path: the same, as it was given.
    wait: whether to wait for another process that holds it.

  Raises:
    UserError: if another process holds it, without `wait`.
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
      # Shared, so that two who ask do not take each other for the run.
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
        # Somebody may be looking whether a run is going on, for a moment.
        time.sleep(0.05)
    yield


def _lock(file: IO[str], shared: bool = False, wait: bool = False) -> bool:
  """Locks an open file until it is closed.

  The kernel drops the lock with the process, however that ends.

  Args:
    file: open.
    shared: whether others may hold such a lock as well.
    wait: whether to wait for those who hold it.

  Returns:
    Whether it is locked; False where the file system has no locks.

  Raises:
    BlockingIOError: if another process holds it, without `wait`.
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
  """What an object of CLAIMS says.

  Attributes:
    file: the object.
    number: of the claim.
    owner: host and process, for people.
    time: of the last sign of life, seconds, by the clock of the owner.
    has_ended: whether the owner has given the folder back.
  """

  file: epath.Path
  number: int
  owner: str
  time: float
  has_ended: bool

  @property
  def age(self) -> float:
    """Seconds since the last sign of life, by the clocks."""
    return time.time() - self.time


def _last_claim(folder: epath.Path) -> _Claim | None:
  """Returns the claim that counts; None if there has been none.

  Raises:
    UserError: if it is damaged.
  """
  found = [
      path for path in files.entries(folder / CLAIMS)
      if re.fullmatch(NUMBER, path.name)
  ]
  if not found:
    return None
  file = found[-1]
  data = buckets.read(file)
  if data is None:  # It has been tidied away: there is a later one.
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
    # The answer to a request that did succeed may have been lost.
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
      # What fails here is tried again; who cannot reach the bucket for long
      # may find that another process has taken over.
      with contextlib.suppress(Exception):
        last = _last_claim(folder)
        if last is not None and last.number > number:
          console.say(
              f'error: {console.shown(last.owner)[:100]} has taken over '
              f'{folder}, since no sign of life of this process had come for '
              f'{PATIENCE:.0f} s. This one ends here.'
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
  """Returns whether nobody holds a claim any more; may take PATIENCE."""
  if claim.has_ended or claim.age > OLD:
    return True
  console.say(
      f'{folder} is held by {console.shown(claim.owner)[:100]}; '
      f'looking for up to {PATIENCE:.0f} s whether that is alive'
  )
  until = time.monotonic() + PATIENCE
  while time.monotonic() < until:
    time.sleep(SIGN / 5)
    now = _last_claim(folder)
    if now is None or now != claim:
      return now is None or now.has_ended
  return True
