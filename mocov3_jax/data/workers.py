"""Threads and processes that read and decode images.

OpenCV and file reads let go of Python's interpreter lock, so threads are enough
on some cores: two of them read 1.75 times as fast as one. What is left of
Python, about half a millisecond an image, one thread does at a time. That caps
a process at some 2,000 images a second, and a host with many cores needs
several processes.
"""

from collections.abc import Callable, Hashable
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import functools
import math
import mmap
import multiprocessing
from multiprocessing import forkserver, resource_tracker
import os
import pathlib
import pickle
import signal
import sys
import threading
from typing import Protocol
import weakref

import cv2
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import Source

# Cores that one process keeps busy, and processes at most, where the config
# leaves their number open.
CORES_A_PROCESS, MOST_PROCESSES = 8, 16
# Microseconds of all cores that a container may use in so many microseconds.
QUOTA = '/sys/fs/cgroup/cpu.max'
# By which a process is asked to end.
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT
# Parts of a batch for each process, so that none waits long for the last one,
# and images of a part, unless there are fewer than that for each process.
PARTS_A_PROCESS, ROWS_A_PART = 4, 8


class LostWorkers(UserError):
  """A process that reads has ended; others of the run do not know of it."""


class RowReader(Protocol):
  """What reads the images of a batch one by one; can be pickled.

  Attributes:
    shape: of an image, or of all its crops.
    key: the same for readers that read the same, as long as they live.
  """

  shape: tuple[int, ...]
  key: Hashable

  def read_row(self, out: np.ndarray, index: int, place: int) -> int:
    """Reads an image.

    Args:
      out: uint8 of `shape`; the pixels go there.
      index: of the image in its source.
      place: of the image in the sequence of all batches.

    Returns:
      The index of the image that is in `out`: that, another one in its place,
      or -1 where it is black.
    """


def cores() -> int:
  """Returns how many CPU cores this process may use."""
  count = os.cpu_count() or 1
  if hasattr(os, 'sched_getaffinity'):  # Not on macOS.
    count = len(os.sched_getaffinity(0))
  try:  # A container may have a share of their time.
    quota, period = pathlib.Path(QUOTA).read_text().split()
    return max(1, min(count, int(quota) // int(period)))
  except (OSError, ValueError, ZeroDivisionError):  # None, or no limit.
    return count


def processes_for(asked: int, source: Source) -> int:
  """Returns how many processes are to read.

  Args:
    asked: `config.data.processes`; 0 = by the cores of this host.
    source: of the images. Those of one size are not cropped here, and take one
      process.
  """
  if source.shape or not hasattr(os, 'memfd_create'):  # Not Linux.
    return 1
  return asked or max(1, min(MOST_PROCESSES, cores() // CORES_A_PROCESS))


def workers_for(data: ConfigDict, source: Source) -> 'Workers':
  """Returns what reads a source as `config.data` says."""
  return Workers(data.threads, processes_for(data.processes, source))


class Workers:
  """Reads images by threads, in this process or in several others."""

  def __init__(self, threads: int, processes: int = 1):
    """Starts them; processes start when they are first needed.

    Args:
      threads: over all processes; 0 = one a core that this one may use.
      processes: 1 = this process alone.
    """
    self._processes = processes
    self._threads = -(-(threads or cores()) // processes)
    if processes == 1:
      self._pool = ThreadPoolExecutor(self._threads)
    # OpenCV's own threads would compete with these.
    cv2.setNumThreads(0)

  def read(
      self, reader: RowReader, indices: np.ndarray, places: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images of a batch.

    Args:
      reader: reads one.
      indices: int64 [N], of the images in their source.
      places: int64 [N], see `RowReader`.

    Returns:
      Images, uint8 [N, *shape], and what `read_row` returned, int32 [N].
    """
    if self._processes > 1:
      return self._apart.read(reader, indices, places)
    images = np.empty((len(indices), *reader.shape), np.uint8)
    found = np.zeros(len(indices), np.int32)
    self.fill(
        functools.partial(_read_row, reader, indices, places, images, found),
        len(indices),
    )
    return images, found

  def fill(self, fill_row: Callable[[int], None], rows: int) -> None:
    """Calls fill_row(0), ..., fill_row(rows - 1) in threads."""
    def fill_part(part):
      for row in part.tolist():
        fill_row(row)

    # Small parts, so that no thread waits long for the last one.
    parts = np.array_split(np.arange(rows), 16 * self._threads)
    list(self._pool.map(fill_part, parts))  # Raises what a row raised.

  @functools.cached_property
  def _apart(self) -> '_Processes':
    return _Processes(self._processes, self._threads)


def _read_row(
    reader: RowReader, indices: np.ndarray, places: np.ndarray,
    images: np.ndarray, found: np.ndarray, row: int,
) -> None:
  found[row] = reader.read_row(
      images[row], int(indices[row]), int(places[row])
  )


class _Segment:
  """Memory that processes share, which has no name and ends with them."""

  def __init__(self, size: int):
    self.size = size
    self._file = os.memfd_create('mocov3_jax batch')
    os.ftruncate(self._file, size)
    self.memory = mmap.mmap(self._file, size)
    # How others find it.
    self.path = f'/proc/{os.getpid()}/fd/{self._file}'


class _Processes:
  """Processes that read rows of a batch into memory that they share."""

  def __init__(self, processes: int, threads: int):
    self._count = processes
    # Not forked off this process, which has threads and devices.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'mocov3_jax.sources.catalog'])
    # Where this process ends at once, what tidies up after it would say so.
    sys.warnoptions.append('ignore:resource_tracker')
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    # A batch system sends SIGTERM to all processes of a job. These end with
    # their parent, which may still want to save; what they are started with is
    # handed on to them.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
      forkserver.ensure_running()
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    self._pool = ProcessPoolExecutor(processes, context, _begin, (threads,))
    self._lock = threading.Lock()
    self._known: dict[Hashable, tuple[RowReader, _Segment]] = {}
    self._free: list[_Segment] = []

  def read(
      self, reader: RowReader, indices: np.ndarray, places: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images of a batch, as `Workers.read`."""
    path = self._path(reader)
    shape = len(indices), *reader.shape
    segment = self._segment(math.prod(shape))
    images = np.ndarray(shape, np.uint8, segment.memory)
    # Nothing is copied: the memory is used again once nobody has these images.
    weakref.finalize(images, self._free.append, segment).atexit = False
    rows = len(indices)
    count = min(PARTS_A_PROCESS * self._count, -(-rows // ROWS_A_PART))
    parts = np.array_split(np.arange(rows), max(count, min(rows, self._count)))
    try:
      tasks = [
          self._pool.submit(
              _read_part, path, segment.path, shape, int(part[0]),
              indices[part], places[part],
          ) for part in parts
      ]
      # Of all, before one raises: the others still write.
      futures.wait(tasks)
      found = np.concatenate([task.result() for task in tasks])
    except BrokenProcessPool as e:
      for child in multiprocessing.active_children():
        child.kill()  # They do not heed SIGTERM.
      raise LostWorkers(
          'a process that reads images has ended by itself, as happens where '
          'memory runs out. Use fewer of them (data.processes), or 1, and run '
          'the same line again.'
      ) from e
    return images, found

  def _segment(self, size: int) -> _Segment:
    with self._lock:
      for place, segment in enumerate(self._free):
        if segment.size == size:
          return self._free.pop(place)
    return _Segment(size)

  def _path(self, reader: RowReader) -> str:
    """Returns where the reader lies, for the processes to take it up."""
    if reader.key not in self._known:
      data = pickle.dumps(reader)
      segment = _Segment(len(data))
      segment.memory.write(data)
      # Kept, so that it lives and no other one gets its key.
      self._known[reader.key] = reader, segment
    return self._known[reader.key][1].path


# What follows runs in those processes. Each has threads of its own, which have
# no other place to be than the module.
_own: Workers | None = None


def _begin(threads: int) -> None:
  global _own
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _own = Workers(threads)


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


@functools.lru_cache(maxsize=2)
def _reader(path: str) -> RowReader:
  return pickle.loads(pathlib.Path(path).read_bytes())


@functools.lru_cache(maxsize=64)
def _mapped(path: str, size: int) -> mmap.mmap:
  file = os.open(path, os.O_RDWR)
  try:
    return mmap.mmap(file, size)
  finally:
    os.close(file)


def _read_part(
    path: str, memory: str, shape: tuple[int, ...], begin: int,
    indices: np.ndarray, places: np.ndarray,
) -> np.ndarray:
  """Reads some rows of a batch into shared memory, from row `begin` on."""
  reader = _reader(path)
  images = np.ndarray(shape, np.uint8, _mapped(memory, math.prod(shape)))
  images = images[begin:begin + len(indices)]
  found = np.zeros(len(indices), np.int32)
  _own.fill(
      functools.partial(_read_row, reader, indices, places, images, found),
      len(indices),
  )
  return found
