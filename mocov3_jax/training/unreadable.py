"""Unreadable images of a run: lists them, counts them, and enforces a limit."""

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

  The list is bad_images.txt in the workdir, with the name and the reason of one
  image per line. The first ones are also printed to stderr. The count covers
  all processes and starts anew with each epoch.
  """

  def __init__(
      self, workdir: epath.Path, reader: BatchReader, config: ConfigDict,
      plan: Plan, rows: Sequence[dict[str, Any]], start: int,
  ):
    """Restores the list and the count from an earlier part of the run.

    Args:
      workdir: the run's workdir.
      reader: reads this process's batches.
      config: the run's config.
      plan: the run's schedule in steps.
      rows: the rows of metrics.jsonl before `start`.
      start: the number of updates done.
    """
    self._reader = reader
    self._share = config.data.max_unreadable
    self._steps_per_epoch = plan.steps_per_epoch
    self._images_per_epoch = plan.steps_per_epoch * config.batch_size
    number = jax.process_index()
    # Each process reads different images, and has its own list.
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
    # Steps without a row, because of log.every_steps, cannot be counted.
    self._counted_from = start - start % plan.steps_per_epoch
    self._count = sum(
        row[UNREADABLE] for row in rows
        if self._counted_from <= row['step'] < start and UNREADABLE in row
    )
    if self.too_many:
      # The limit ended the run. The files may have been repaired since, so the
      # count starts anew.
      self._counted_from, self._count = start, 0

  def list(self, batch: Batch) -> None:
    """Adds the unreadable images of this process's batch to the list."""
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
    """Adds images (name: reason) to the list unless they are on it."""
    for name, why in unreadable.items():
      name = _escaped(name)
      if name in self._listed:
        continue
      self._listed.add(name)
      if self._file is None:  # Without such images there is no file.
        self._file = files.AppendedFile(self._path)
      self._file.append(f'{name}\t{why}\n')

  def flush(self) -> None:
    """Writes the list to disk or to the bucket."""
    if self._file is not None:
      self._file.flush()

  def close(self) -> None:
    """Flushes and closes the list."""
    if self._file is not None:
      self._file.close()

  def count(self, step: int, number: int) -> None:
    """Adds the number of unreadable images of a step, in all processes."""
    # One more step may follow once the limit is exceeded; even if it begins an
    # epoch, it must not reset the count.
    if step % self._steps_per_epoch == 0 and not self.too_many:
      self._counted_from, self._count = step, 0
    self._count += number

  @property
  def too_many(self) -> bool:
    """Whether this epoch has exceeded the share `data.max_unreadable`."""
    return self._count > self._share * self._images_per_epoch

  def check(self, step: int) -> None:
    """Raises UserError if there are `too_many`; call it after a save."""
    if self.too_many:
      raise UserError(
          f'data.max_unreadable={self._share}, but {self._count} images could '
          f'not be read from step {self._counted_from} up to step {step}, more '
          f'than that share of the {self._images_per_epoch} of an epoch. They '
          f'are listed in {self._path}; more may follow. Step {step} is saved. '
          'Repair or replace the files, keeping their names, or raise '
          'data.max_unreadable, and run the same command again.'
      )


def _escaped(name: str) -> str:
  return json.dumps(name, ensure_ascii=False)[1:-1]
