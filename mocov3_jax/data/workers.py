"""Threads that read and decode images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import os

import cv2
import numpy as np


def cores() -> int:
  """Returns how many CPU cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # Not on macOS.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Workers:
  """Threads that fill the rows of an array.

  Threads, not processes: OpenCV and file reads let go of the interpreter (two
  threads on two cores read 1.75 times as fast as one, two processes 1.6).
  """

  def __init__(self, threads: int):
    """Starts them; 0 = one a core that this process may use."""
    self._threads = threads or cores()
    self._pool = ThreadPoolExecutor(self._threads)
    # OpenCV's own threads would compete with these.
    cv2.setNumThreads(0)

  def fill(self, fill_row: Callable[[int], None], rows: int) -> None:
    """Calls fill_row(0), ..., fill_row(rows - 1)."""
    def fill_part(part):
      for row in part.tolist():
        fill_row(row)

    # Small parts, so that no thread waits long for the last one.
    parts = np.array_split(np.arange(rows), 16 * self._threads)
    list(self._pool.map(fill_part, parts))  # Raises what a row raised.
