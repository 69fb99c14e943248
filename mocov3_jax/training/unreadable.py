"""Images of a run that could not be read: their list, number and limit."""

from collections.abc import Mapping, Sequence
import contextlib
import json
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict

from mocov3_jax.base import console, files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config.training import Plan
from mocov3_jax.data import pipeline
from mocov3_jax.data.pipeline import Batch, BatchReader
from mocov3_jax.evals.features import NAMED
from mocov3_jax.training.host_flags import UNREADABLE


class UnreadableImages:
  """Lists unreadable images, and counts them against `data.max_unreadable`.

  The first ones are named on stderr as they are met, as well.

  The list is bad_images.txt in the workdir: name and reason, a line per image.
  The count is that of all processes, and starts anew with each epoch.
  """

  def __init__(
      self, workdir: epath.Path, reader: BatchReader, config: ConfigDict,
      plan: Plan, rows: Sequence[dict[str, Any]], start: int,
  ):
    """Takes up list and count where an earlier part of the run left them.

    Args:
      workdir: of the run.
      reader: of this process's batches.
      config: of the run.
      plan: its steps.
      rows: of metrics.jsonl, before `start`.
      start: updates done.
    """
    self._reader = reader
    self._share = config.data.max_unreadable
    self._steps_per_epoch = plan.steps_per_epoch
    self._images_per_epoch = plan.steps_per_epoch * config.batch_size
    number = jax.process_index()
    # Each process reads other images.
    self._path = workdir / (
        f'bad_images.{number}.txt' if number else 'bad_images.txt'
    )
    self._said = 0
    self._file: files.AppendedFile | None = None
    self._listed = set()
    with contextlib.suppress(FileNotFoundError), files.open_own(
        self._path, 'r', errors='surrogateescape'
    ) as file:
      self._listed = {line.split('\t')[0] for line in file}
    # What rows left out by log.every_steps had is not counted again.
    self._counted_from = start - start % plan.steps_per_epoch
    self._count = sum(
        row[UNREADABLE] for row in rows
        if self._counted_from <= row['step'] < start and UNREADABLE in row
    )
    if self.too_many:
      # That ended the run. The files may have been mended: count anew.
      self._counted_from, self._count = start, 0

  def list(self, batch: Batch) -> None:
    """Adds what could not be read for this process's batch to the list."""
    source = self._reader.source
    for index in batch.unreadable[batch.unreadable >= 0].tolist():
      name = source.name(index)
      if _escaped(name) not in self._listed:
        why = pipeline.why_unreadable(source, index)
        self.add({name: why})
        self._say(f'unreadable: {_escaped(name)}: {why}')

  def _say(self, text: str) -> None:
    self._said += 1
    if self._said <= NAMED:
      console.say(text)
    elif self._said == NAMED + 1:
      console.say(f'unreadable: more are listed in {self._path}')

  def add(self, unreadable: Mapping[str, str]) -> None:
    """Adds images, names and reasons, to the list if they are not there."""
    for name, why in unreadable.items():
      name = _escaped(name)
      if name in self._listed:
        continue
      self._listed.add(name)
      if self._file is None:  # A run without such images has no such file.
        self._file = files.AppendedFile(self._path)
      self._file.append(f'{name}\t{why}\n')

  def flush(self) -> None:
    """Puts the list on disk, or in the bucket."""
    if self._file is not None:
      self._file.flush()

  def close(self) -> None:
    """Flushes and closes the list."""
    if self._file is not None:
      self._file.close()

  def count(self, step: int, number: int) -> None:
    """Counts the unreadable images of a step over all processes."""
    # One more step is counted after too many, perhaps in a new epoch.
    if step % self._steps_per_epoch == 0 and not self.too_many:
      self._counted_from, self._count = step, 0
    self._count += number

  @property
  def too_many(self) -> bool:
    """Whether more than `data.max_unreadable` of an epoch could not be read."""
    return self._count > self._share * self._images_per_epoch

  def check(self, step: int) -> None:
    """Raises UserError if there are `too_many`, after a save at `step`."""
    if self.too_many:
      raise UserError(
          f'data.max_unreadable={self._share}, but {self._count} images could '
          f'not be read from step {self._counted_from} up to step {step}, more '
          f'than that share of the {self._images_per_epoch} of an epoch. They '
          f'are listed in {self._path}; more may follow. Step {step} is saved. '
          'Mend the files, under the same names, or raise '
          'data.max_unreadable, and run the same line again.'
      )


def _escaped(name: str) -> str:
  return json.dumps(name, ensure_ascii=False)[1:-1]
