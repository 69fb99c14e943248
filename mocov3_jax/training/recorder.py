"""What a training run records, and when it evaluates and saves."""

import collections
from collections.abc import Callable, Iterator
import json
import os
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.data.decode import Unreadable
from mocov3_jax.data.pipeline import Batch, BatchReader, train_batches
from mocov3_jax.parallel import chips
from mocov3_jax.parallel.processes import is_primary
from mocov3_jax.runs import checkpoints as checkpoints_lib
from mocov3_jax.runs import metrics
from mocov3_jax.training import progress, stability
from mocov3_jax.training.job import Job


class Recorder:
  """A run in its workdir: what happens at each step, and between steps.

  Attributes:
    writer, progress: of the metrics; silent in all processes but the first.
    stopping: whether a process of the run has been asked to end.
  """

  def __init__(
      self, job: Job, workdir: epath.Path,
      checkpoints: checkpoints_lib.Checkpoints, start: int,
  ):
    """Opens the files.

    Args:
      job: the training.
      workdir: of the run; exists.
      checkpoints: of the run.
      start: updates done before.
    """
    self._job = job
    self._config = config = job.config
    self._plan = plan = job.plan
    self._checkpoints = checkpoints
    self._last_step = {}
    self._waits = collections.deque()  # Of batches not yet logged, seconds.
    self._unreadable = UnreadableImages(workdir)
    self.writer = metrics.MetricWriter(workdir, start, is_primary())
    # Read after the writer has dropped what comes again.
    before = metrics.read_metrics(workdir / 'metrics.jsonl')
    self._stability = stability.Watch()
    for row in before:
      self._stability.see(row['step'], row)
    # Images of this epoch, from this step on, that could not be read. Rows that
    # log.every_steps left out are not counted again.
    self._images_of_epoch = plan.steps_per_epoch * config.batch_size
    self._counted_from = start - start % plan.steps_per_epoch
    self._unreadable_in_epoch = sum(
        row['data/unreadable']
        for row in before
        if self._counted_from <= row['step'] < start
        and 'data/unreadable' in row
    )
    if self.too_many_unreadable:
      # That ended the run. By now they may have been mended: counted anew.
      self._counted_from, self._unreadable_in_epoch = start, 0
    self._throughput = progress.Throughput(config.batch_size)
    self._mfu_of_rate = None  # MFU of one image per second, where known.
    self.progress = progress.Progress(
        plan.total_steps, active=is_primary()
    )
    self.stopping = False

  def announce(self, start: int) -> None:
    """Says what is about to happen."""
    job, plan, mesh = self._job, self._plan, self._job.mesh
    for note in job.notes:
      self.progress.note(note)
    peak = chips.peak_flops(mesh.devices.flat[0].device_kind)
    if peak is not None and job.flops_per_image is not None:
      self._mfu_of_rate = job.flops_per_image() / (peak * mesh.size)
    where = f'continuing at step {start}' if start else 'from a fresh start'
    if start == plan.total_steps:
      where = 'already complete'
    self.progress.note(
        f'{mesh.size} {jax.default_backend()} device(s); {plan.total_steps} '
        f'steps, {plan.steps_per_epoch} an epoch, {plan.warmup_steps} of '
        f'warm-up to lr {plan.peak_lr:.3g}; {where}'
    )

  def watch(
      self, start: int, stop: Callable[[], bool]
  ) -> Iterator[Batch]:
    """The batches from step `start` on; notes the waiting, and bad images.

    Args:
      start: updates done.
      stop: whether this process has been asked to end.
    """
    reader = self._job.reader
    batches = train_batches(
        reader, start, self._plan.total_steps, self._config.data.prefetch
    )
    while True:
      before = time.perf_counter()
      batch = next(batches, None)
      if batch is None:
        return
      self._waits.append(time.perf_counter() - before)
      self._unreadable.add(batch, reader)
      asked = np.full(len(batch.unreadable), stop(), np.int32)
      yield batch._replace(stop=asked)

  def log(self, step: int, values: dict[str, float]) -> None:
    """Records the metrics of one step."""
    # One more step is logged after too many were found, perhaps in a new epoch.
    if step % self._plan.steps_per_epoch == 0 and not self.too_many_unreadable:
      self._counted_from, self._unreadable_in_epoch = step, 0
    self._unreadable_in_epoch += int(values['data/unreadable'])
    self.stopping |= values.pop('train/stop') > 0
    values['data/wait_seconds'] = self._waits.popleft()
    rate = self._throughput.tick()
    values['train/images_per_second'] = rate
    if self._mfu_of_rate is not None:
      values['train/mfu'] = rate * self._mfu_of_rate
    if step % self._config.log.every_steps == 0:
      self.writer.write(step, values)
      self._warn(step, values)  # What is written, so that it can be read again.
    self._last_step = values
    known = self.writer.latest | values
    self.progress.update(step, known, self._config.batch_size)

  @property
  def too_many_unreadable(self) -> bool:
    """Whether more than `data.max_unreadable` of this epoch's images are."""
    share = self._config.data.max_unreadable
    return self._unreadable_in_epoch > share * self._images_of_epoch

  def check_readable(self, step: int) -> None:
    """Raises UserError if `too_many_unreadable`, after a save at `step`."""
    if self.too_many_unreadable:
      raise UserError(
          f'data.max_unreadable={self._config.data.max_unreadable}, but '
          f'{self._unreadable_in_epoch} images could not be read from step '
          f'{self._counted_from} up to step {step}, more than that share of '
          f'the {self._images_of_epoch} of an epoch. They are listed in '
          f'{self._unreadable.path}; more may follow. Step {step} is saved. '
          'Allowed: the same line again, with the files mended (under the same '
          'names) or a higher data.max_unreadable.'
      )

  def is_saving(self, step: int) -> bool:
    """Whether a checkpoint is due after `step` updates."""
    every = self._config.save.every_steps
    return step % every == 0 or step == self._plan.total_steps

  def is_due(self, step: int) -> bool:
    """Whether to evaluate (and perhaps save) after `step` updates."""
    every = self._job.evaluate_every
    return self.is_saving(step) or bool(every and step % every == 0)

  def between_steps(self, step: int, state: Any) -> None:
    """Evaluates, and saves where that is due."""
    with self._throughput.paused():
      values = self._job.evaluate(state)
      self.writer.write(step, values)
      self.progress.note(
          f'step {step}/{self._plan.total_steps}  {describe(values)}'
      )
      self._warn(step, values)
      if step and self.is_saving(step):
        self.writer.flush()
        self._checkpoints.save(step, state, values)

  def _warn(self, step: int, values: dict[str, float]) -> None:
    """Says what looks unstable."""
    for warning in self._stability.see(step, values):
      self.progress.note(warning)

  def results(self) -> dict[str, Any]:
    """The last value of everything, and what the random network had."""
    last = self.writer.latest | self._last_step
    for name in 'knn/top1', 'features/effective_rank', 'test/top1':
      if name in self.writer.first:
        last[f'{name}_init'] = self.writer.first[name]
    if self._throughput.average:
      rate = self._throughput.average
      last['train/images_per_second'] = rate
      if self._mfu_of_rate is not None:
        last['train/mfu'] = rate * self._mfu_of_rate
    return last


def describe(values: dict[str, float]) -> str:
  """What an evaluator said, in words."""
  if 'knn/top1' in values:
    return f'kNN {values["knn/top1"]:.1%}'
  if 'test/top1' in values:
    return f'test {values["test/top1"]:.1%}'
  return (
      f'alignment {values["features/alignment"]:.3f}  uniformity '
      f'{values["features/uniformity"]:.2f}  effective rank '
      f'{values["features/effective_rank"]:.1f}'
  )


class UnreadableImages:
  """bad_images.txt of a workdir: name and reason, a line an image."""

  def __init__(self, workdir: epath.Path):
    """Reads what an earlier part of the run has listed."""
    number = jax.process_index()
    # Each process reads other images.
    self.path = workdir / (
        f'bad_images.{number}.txt' if number else 'bad_images.txt'
    )
    self._known = set()
    if self.path.exists():
      with open(self.path, errors='surrogateescape') as file:
        self._known = {line.split('\t')[0] for line in file}

  def add(self, batch: Batch, reader: BatchReader) -> None:
    """Lists what could not be read for this batch."""
    for index in batch.unreadable[batch.unreadable >= 0].tolist():
      name = json.dumps(reader.source.name(index), ensure_ascii=False)[1:-1]
      if name in self._known:
        continue
      self._known.add(name)
      try:
        reader.read_into(np.empty(reader.shape, np.uint8), index, 0)
        why = 'could not be read then, can be now'
      except Unreadable as e:
        why = ' '.join(str(e).split())
      with open(self.path, 'a', errors='surrogateescape') as file:
        file.write(f'{name}\t{why}\n')
        file.flush()
        os.fsync(file.fileno())
