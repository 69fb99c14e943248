"""Writes metrics to metrics.jsonl and TensorBoard, and reads metrics.jsonl."""

import json
import os
import tempfile
import time
from typing import Any, BinaryIO

from etils import epath

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError

Values = dict[str, float]
# The most bytes of a row of metrics.jsonl.
LONGEST_ROW = 2**20
# The most metric names in a file; a run with 40 blocks logs about 200.
MOST_NAMES = 4096
# Bytes of a TensorBoard file in a bucket, after which a new one is begun.
LARGE_EVENTS = 2**23


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl.

  Returns:
    Dicts of numbers. Each has 'step', an int.

  Raises:
    UserError: see `read_lines`; or if there are more than MOST_NAMES metrics.
  """
  names, rows = set(), []
  for row in read_lines(path):
    row = {name: value for name, value in row.items() if _is_number(value)}
    if 'step' in row and type(row['step']) is int and row['step'] >= 0:
      names.update(row)
      rows.append(row)
    if len(names) > MOST_NAMES:
      raise UserError(
          f'{path} has more than {MOST_NAMES:,} metrics, which no run logs.'
      )
  return rows


def _is_number(value: Any) -> bool:
  if type(value) is int:
    return abs(value) < 2**63
  return type(value) is float


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl or results.jsonl.

  Returns:
    One dict per line; an empty list if there is no file. Lines that are longer
    than LONGEST_ROW or incomplete, because the writer was killed, are left out.

  Raises:
    UserError: if it is not a regular file.
  """
  rows = []
  try:
    with files.open_own(path, 'rb') as file:
      # A crash of the machine may leave anything at the end.
      while line := file.readline(LONGEST_ROW):
        if len(line) == LONGEST_ROW and not line.endswith(b'\n'):
          _skip_line(file)
        elif row := _row(line):
          rows.append(row)
  except FileNotFoundError:
    pass
  return rows


def _skip_line(file: BinaryIO) -> None:
  while (line := file.readline(LONGEST_ROW)) and not line.endswith(b'\n'):
    pass


def _row(line: bytes) -> dict[str, Any]:
  """Returns the JSON object on a line; empty if there is none."""
  try:
    found = files.parse(line.decode(errors='replace'))
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def read_last(path: epath.Path) -> dict[str, Any]:
  """Reads only the last row of a metrics.jsonl; empty if there is none."""
  try:
    with files.open_own(path, 'rb') as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_ROW))
      lines = file.read(LONGEST_ROW).splitlines()
  except FileNotFoundError:
    return {}
  for line in reversed(lines):
    if row := _row(line):  # Else it is incomplete.
      return row
  return {}


class MetricWriter:
  """Appends to metrics.jsonl and to TensorBoard event files in a workdir.

  A row of step s describes the state after s updates: its loss, computed in the
  next step before the update, or the values of evaluators.
  """

  def __init__(self, workdir: epath.Path, step: int, active: bool = True):
    """Opens the files, and drops rows that a continued run will write again.

    Args:
      workdir: the run's workdir; it exists.
      step: the number of updates done in the state that training starts from.
      active: whether to write at all; only one process of a run does.
    """
    self._path = workdir / 'metrics.jsonl'
    rows = [
        row for row in read_metrics(self._path)
        if row['step'] < step
        # Training at `step` is logged again. Evaluation was done before saving.
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
    self._file = files.AppendedFile(self._path, text.encode())
    # TensorBoard discards its values from this step on.
    self._board = _Board(workdir / 'tensorboard', purge_step=step)
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
    self._file.append(json.dumps(row) + '\n')
    self._draw(row)

  def _draw(self, row: Values) -> None:
    for name, value in row.items():
      if name != 'step':
        self._board.draw(name, value, row['step'])

  def flush(self) -> None:
    """Writes to disk what a run continued from here will not write again."""
    if self._active:
      # Checkpoints survive a crash of the machine, so metrics must, too.
      self._file.flush()
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._file.close()
      self._board.close()


class _Board:
  """The TensorBoard event files of a run.

  Where readers do not see files grow, as in a bucket, the files are written to
  a temporary folder of this machine and copied as a whole at each flush.
  """

  def __init__(self, folder: epath.Path, purge_step: int):
    """Begins a file.

    Args:
      folder: the folder of the files.
      purge_step: TensorBoard discards its values from this step on.
    """
    self._folder = folder
    self._staging, self._ended, self._next = None, 0, 0.0
    if not files.is_on_disk(folder.parent):
      self._staging = tempfile.TemporaryDirectory(prefix='mocov3_jax')
    files.make_folder(folder)
    self._begin('')
    self._event(
        purge_step, session_log=self._proto.SessionLog(status='START')
    )

  def _begin(self, suffix: str) -> None:
    # Imported here, because it imports PyTorch if that is installed, which
    # takes seconds and 0.4 GiB.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._proto, self._scalar = event_pb2, summary.scalar
    where = self._staging.name if self._staging else str(self._folder)
    # Not SummaryWriter: its flush omits what its thread has not written yet.
    self._writer = event_file_writer.EventsWriter(
        os.path.join(where, 'events'), suffix
    )

  def _event(self, step: int, **content: Any) -> None:
    self._writer.write_event(
        self._proto.Event(wall_time=time.time(), step=step, **content)
    )

  def draw(self, name: str, value: float, step: int) -> None:
    """Adds a value."""
    self._event(step, summary=self._scalar(name, value))
    if time.monotonic() > self._next:  # For those who follow a run.
      self.flush()

  def flush(self) -> None:
    """Writes the added values to disk or to the bucket."""
    began = time.monotonic()
    self._writer.flush()
    if self._staging:
      large = self._copy() > LARGE_EVENTS
      if large:  # A finished file is not copied again.
        self._writer.close()
        for path in epath.Path(self._staging.name).iterdir():
          path.unlink()
        self._ended += 1
        # The suffix separates files that are begun in the same second.
        self._begin(f'.{self._ended}')
    now = time.monotonic()
    # The longer a flush takes, the less often it is repeated.
    self._next = now + max(files.FOLLOWED, files.MOST_SHARE * (now - began))

  def _copy(self) -> int:
    """Copies the files to the run's folder; returns their size in bytes."""
    total = 0
    files.make_folder(self._folder)
    for path in epath.Path(self._staging.name).iterdir():
      data = path.read_bytes()
      (self._folder / path.name).write_bytes(data)
      total += len(data)
    return total

  def close(self) -> None:
    """Flushes and closes the file."""
    self._writer.close()
    if self._staging:
      self._copy()
      self._staging.cleanup()
