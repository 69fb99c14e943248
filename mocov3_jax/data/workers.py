"""Threads and processes that read and decode images.

OpenCV and file reads release Python's interpreter lock (GIL), so threads are
enough on a few cores: two threads read 1.75 times as fast as one. The remaining
Python code, about half a millisecond per image, runs in one thread at a time.
This limits a process to some 2,000 images per second, so a host with many cores
needs several processes.
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

# Cores that one process keeps busy, and maximum number of processes, if the
# config leaves their number open.
CORES_A_PROCESS, MOST_PROCESSES = 8, 16
# File with the CPU time that a container may use in a period, and that period,
# both in microseconds.
QUOTA = '/sys/fs/cgroup/cpu.max'
# The signals that ask a process to stop.
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT
# Number of parts of a batch for each process, so that none waits long for the
# last one; and images per part, unless a process has fewer than that.
PARTS_A_PROCESS, ROWS_A_PART = 4, 8


class LostWorkers(UserError):
  """A reader process died; the run's other processes do not know about it."""


class RowReader(Protocol):
  """Reads the images of a batch one by one; can be pickled.

  Attributes:
    shape: shape of an image, or of all its crops.
    key: equal for readers that read the same, as long as they are alive.
  """

  shape: tuple[int, ...]
  key: Hashable

  def read_row(self, out: np.ndarray, index: int, place: int) -> int:
    """Reads an image.

    Args:
      out: uint8 of `shape`; receives the pixels.
      index: index of the image in its source.
      place: place of the image in the sequence of all batches.

    Returns:
      The index of the image in `out`: `index`, or that of a replacement; or -1
      if the image could not be read and `out` is black.
    """


def cores() -> int:
  """Returns how many CPU cores this process may use."""
  count = os.cpu_count() or 1
  if hasattr(os, 'sched_getaffinity'):  # Not on macOS.
    count = len(os.sched_getaffinity(0))
  try:  # A container may be limited to a share of their time.
    quota, period = pathlib.Path(QUOTA).read_text().split()
    return max(1, min(count, int(quota) // int(period)))
  except (OSError, ValueError, ZeroDivisionError):  # None, or no limit.
    return count


def processes_for(asked: int, source: Source) -> int:
  """Returns how many processes should read the images.

  Args:
    asked: `config.data.processes`; 0 = by the cores of this host.
    source: the images. Images of one size are not cropped on the host, so one
      process is enough for them.
  """
  if source.shape or not hasattr(os, 'memfd_create'):  # Not Linux.
    return 1
  return asked or max(1, min(MOST_PROCESSES, cores() // CORES_A_PROCESS))


def workers_for(data: ConfigDict, source: Source) -> 'Workers':
  """Returns the workers that read a source, as set in `config.data`."""
  return Workers(data.threads, processes_for(data.processes, source))


class Workers:
  """Reads images by threads, in this process or in several others."""

  def __init__(self, threads: int, processes: int = 1):
    """Starts the threads; processes are started when they are first needed.

    Args:
      threads: total over all processes; 0 = one per core that this process may
        use.
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
      reader: reads one image.
      indices: int64 [N], indices of the images in their source.
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
  """Memory that processes share; it has no name and is freed when they end."""

  def __init__(self, size: int):
    self.size = size
    self._file = os.memfd_create('mocov3_jax batch')
    os.ftruncate(self._file, size)
    self.memory = mmap.mmap(self._file, size)
    # The path by which other processes open it.
    self.path = f'/proc/{os.getpid()}/fd/{self._file}'


class _Processes:
  """Processes that read rows of a batch into shared memory."""

  def __init__(self, processes: int, threads: int):
    self._count = processes
    # Not forked from this process, which has threads and devices.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'mocov3_jax.sources.catalog'])
    # If this process is killed, the resource tracker that cleans up after it
    # would print a warning.
    sys.warnoptions.append('ignore:resource_tracker')
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    # A batch system sends SIGTERM to all processes of a job. The readers must
    # outlive it, since their parent may still want to save, and end with their
    # parent instead. They inherit the blocked signals from the fork server.
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
    # Nothing is copied: the memory is reused once nobody holds these images.
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
      # Waits for all tasks before one raises: the others still write.
      futures.wait(tasks)
      found = np.concatenate([task.result() for task in tasks])
    except BrokenProcessPool as e:
      for child in multiprocessing.active_children():
        child.kill()  # They block SIGTERM.
      raise LostWorkers(
          'a process that reads images has ended by itself, as happens when '
          'memory runs out. Use fewer of them (data.processes), or 1, and run '
          'the same command again.'
      ) from e
    return images, found

  def _segment(self, size: int) -> _Segment:
    with self._lock:
      for place, segment in enumerate(self._free):
        if segment.size == size:
          return self._free.pop(place)
    return _Segment(size)

  def _path(self, reader: RowReader) -> str:
    """Returns the path from which the processes can load the reader."""
    if reader.key not in self._known:
      data = pickle.dumps(reader)
      segment = _Segment(len(data))
      segment.memory.write(data)
      # Kept alive, so that no other reader gets its key.
      self._known[reader.key] = reader, segment
    return self._known[reader.key][1].path


# The code below runs in those processes. Each has its own threads, which have
# to be a variable of the module.
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
