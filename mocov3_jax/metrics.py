"""Numbers out of a run: metrics.jsonl, TensorBoard, progress, throughput."""

from collections.abc import Iterator
import contextlib
import json
import os
import sys
import time
from typing import Any, TextIO

from etils import epath

from mocov3_jax import workdir as workdir_lib

Values = dict[str, float]
# Bytes of a row of metrics.jsonl, at most.
LONGEST_ROW = 2**16


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl or results.jsonl, without lines a kill cut off.

  Returns:
    One dict a line, in metrics.jsonl flat and 'step' first; empty if there is
    no file.
  """
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows


def read_last(path: epath.Path) -> dict[str, Any]:
  """The last row of a metrics.jsonl alone; empty if there is none."""
  if not path.exists():
    return {}
  with open(path, 'rb') as file:
    file.seek(max(0, os.fstat(file.fileno()).st_size - LONGEST_ROW))
    lines = file.read().decode(errors='replace').splitlines()
  for line in reversed(lines):
    try:
      return json.loads(line)
    except json.JSONDecodeError:
      continue  # Cut off by a kill, or by the place where reading began.
  return {}


class MetricWriter:
  """Appends to metrics.jsonl and to TensorBoard event files in a workdir.

  A row of step s tells of the state after s updates: its loss, before the
  next update, and what evaluators say of it.
  """

  def __init__(self, workdir: epath.Path, step: int, active: bool = True):
    """Opens the files, dropping what a continued run will write again.

    Args:
      workdir: of the run; exists.
      step: updates done in the state that training starts from.
      active: whether to write at all; only one process of a run does.
    """
    self._path = workdir / 'metrics.jsonl'
    rows = [
        row for row in read_metrics(self._path)
        if row['step'] < step
        # Training at `step` comes again; evaluation was done before saving.
        or (0 < row['step'] == step and 'train/loss' not in row)
    ]
    self.first: Values = {}
    self.latest: Values = {}
    for row in rows:
      self._remember(row)
    self._active = active
    if not active:
      return
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    workdir_lib.write_whole(self._path, text)
    self._file = self._path.open('a')
    # Imports PyTorch where that is installed: seconds, and 0.4 GiB.
    from tensorboardX import SummaryWriter

    # TensorBoard drops all it has of this step and later.
    self._board = SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=step
    )
    for row in rows:
      if row['step'] == step:
        self._draw(row)

  def _remember(self, row: Values) -> None:
    self.first = row | self.first
    self.latest = self.latest | row

  def write(self, step: int, values: Values) -> None:
    """Writes one row."""
    row = {'step': step, **values}
    self._remember(row)
    if not self._active:
      return
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()  # A killed run loses nothing it has logged.
    self._draw(row)

  def _draw(self, row: Values) -> None:
    for name, value in row.items():
      if name != 'step':
        self._board.add_scalar(name, value, row['step'])

  def flush(self) -> None:
    """Puts on disk what a continuation from here will not write again."""
    if self._active:
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._file.close()
      self._board.close()


class Throughput:
  """Images a second, between steps and without the pauses."""

  def __init__(self, images_per_step: int):
    self._images = images_per_step
    self._last = None
    self._steps = 0
    self._seconds = 0.0

  def tick(self) -> float:
    """Marks the end of a step; returns the img/s of it, 0 for the first."""
    now = time.perf_counter()
    last, self._last = self._last, now
    if last is None:
      return 0.0
    self._steps += 1
    self._seconds += now - last
    return self._images / (now - last)

  @property
  def average(self) -> float:
    """Of all steps but the first, which compiles; 0 before the second."""
    return self._steps * self._images / self._seconds if self._steps else 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves what happens inside (evaluation, saving) out of the count."""
    start = time.perf_counter()
    yield
    if self._last is not None:
      self._last += time.perf_counter() - start


class Progress:
  """One line of status: rewritten on a terminal, every 10 s when piped."""

  def __init__(
      self, total_steps: int, stream: TextIO = sys.stderr, active: bool = True
  ):
    self._total = total_steps
    self._active = active
    self._stream = stream
    self._live = stream.isatty()
    self._next = 0.0

  def update(self, step: int, values: Values, images_per_step: int) -> None:
    """Shows the newest values, if it is time.

    Args:
      step: the step these values are of.
      values: with 'train/loss', 'train/loss_chance',
        'train/images_per_second'; 'knn/top1', 'test/top1', 'train/mfu' where
        known.
      images_per_step: to turn images a second into the time left.
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
    if 'knn/top1' in values:
      text += f'  kNN {values["knn/top1"]:.1%}'
    elif 'test/top1' in values:
      text += f'  test {values["test/top1"]:.1%}'
    elif 'features/effective_rank' in values:
      text += f'  rank {values["features/effective_rank"]:.1f}'
    if rate:
      left = round((self._total - step) * images_per_step / rate)
      text += f'  {rate:.0f} img/s'
      if 'train/mfu' in values:
        text += f'  MFU {values["train/mfu"]:.0%}'
      text += f'  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}'
    self._show(text, end='' if self._live else '\n')

  def note(self, text: str) -> None:
    """Prints a line that stays."""
    self._show(text, end='\n')

  def _show(self, text: str, end: str) -> None:
    if not self._active:
      return
    # Return to the start of the line and erase it, on a terminal.
    start = '\r\x1b[K' if self._live else ''
    print(start + text, end=end, file=self._stream, flush=True)
