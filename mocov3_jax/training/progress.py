"""Throughput and the progress line."""

from collections.abc import Iterator
import contextlib
import sys
import time
from typing import TextIO

from mocov3_jax.runs.metrics import Values


class Throughput:
  """Measures images per second between steps, without pauses."""

  def __init__(self, images_per_step: int):
    self._images = images_per_step
    self._last = None
    self._steps = 0
    self._seconds = 0.0

  def tick(self) -> float:
    """Marks the end of a step; returns its images/s, 0 for the first step."""
    now = time.perf_counter()
    last, self._last = self._last, now
    if last is None:
      return 0.0
    self._steps += 1
    self._seconds += now - last
    return self._images / (now - last)

  @property
  def average(self) -> float:
    """Images per second without the first step, which compiles; 0 if none."""
    return self._steps * self._images / self._seconds if self._steps else 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time spent inside (evaluation, saving)."""
    start = time.perf_counter()
    yield
    if self._last is not None:
      self._last += time.perf_counter() - start


class Progress:
  """The status line: rewritten on a terminal, printed every 10 s otherwise."""

  def __init__(
      self, total_steps: int, stream: TextIO | None = None,
      active: bool = True,
  ):
    stream = stream or sys.stderr
    self._total = total_steps
    self._active = active
    self._stream = stream
    self._live = stream.isatty()
    self._next = 0.0

  def update(
      self, step: int, values: Values, images_per_step: int, words: str = ''
  ) -> None:
    """Shows the newest values, if enough time has passed since the last ones.

    Args:
      step: the step of the values.
      values: must have 'train/loss', 'train/loss_chance' and
        'train/images_per_second'; 'train/mfu' is optional.
      images_per_step: images per step, to estimate the time left.
      words: the evaluators' last results, in words.
    """
    now = time.monotonic()
    if now < self._next:
      return
    self._next = now + (0.2 if self._live else 10.0)
    rate = values['train/images_per_second']
    text = (
        f'step {step}/{self._total}  loss {values["train/loss"]:.4f} '
        f'(chance {values["train/loss_chance"]:.4f})'
    )
    text += words
    if rate:
      left = round((self._total - step) * images_per_step / rate)
      text += f'  {rate:.0f} img/s'
      if 'train/mfu' in values:
        text += f'  MFU {values["train/mfu"]:.0%}'
      text += f'  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}'
    self._show(text, end='' if self._live else '\n')

  def note(self, text: str) -> None:
    """Prints a line that stays on the screen."""
    self._show(text, end='\n')

  def _show(self, text: str, end: str) -> None:
    if not self._active:
      return
    # On a terminal, return to the start of the line and erase it.
    start = '\r\x1b[K' if self._live else ''
    print(start + text, end=end, file=self._stream, flush=True)
