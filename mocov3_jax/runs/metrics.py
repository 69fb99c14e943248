"""Numbers out of a run: metrics.jsonl, TensorBoard, progress, throughput."""

import json
import os
from typing import Any

from etils import epath

from mocov3_jax.base import files

Values = dict[str, float]
# Bytes of a row of metrics.jsonl, at most.
LONGEST_ROW = 2**16


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """Reads the rows of a metrics.jsonl as `read_lines`; each has its 'step'."""
  return [
      row for row in read_lines(path)
      if 'step' in row and isinstance(row['step'], int)
  ]


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl or results.jsonl, without lines a kill cut off.

  Returns:
    One dict a line; empty if there is no file.
  """
  if not path.exists():
    return []
  rows = []
  # A crash of the machine may leave anything at the end.
  for line in path.read_bytes().decode(errors='replace').splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(row, dict):
      rows.append(row)
  return rows


def read_last(path: epath.Path) -> dict[str, Any]:
  """Reads the last row of a metrics.jsonl alone; empty if there is none."""
  if not path.exists():
    return {}
  with open(path, 'rb') as file:
    file.seek(max(0, os.fstat(file.fileno()).st_size - LONGEST_ROW))
    lines = file.read().decode(errors='replace').splitlines()
  for line in reversed(lines):
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue  # Cut off by a kill, or by the place where reading began.
    if isinstance(row, dict):
      return row
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
    with files.open_whole(self._path) as file:
      file.write(text.encode())
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
      # A checkpoint is on the disk after a crash of the machine; so are these.
      os.fsync(self._file.fileno())
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._file.close()
      self._board.close()
