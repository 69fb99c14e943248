"""Logging of a training run: metrics, warnings and the progress line."""

from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mocov3_jax import trackers
from mocov3_jax.config.training import Plan
from mocov3_jax.evals.evaluator import Evaluator
from mocov3_jax.parallel import processes
from mocov3_jax.parallel.processes import is_primary
from mocov3_jax.runs import metrics
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.training import progress, stability

Values = dict[str, float]


class StepLog:
  """Logs a run. Only the first process writes files and prints.

  Attributes:
    rows: rows of metrics.jsonl from an earlier part of the run.
    throughput: throughput of the logged steps.
    last_step: metrics of the last step; empty before the first.
  """

  def __init__(
      self, workdir: epath.Path, config: ConfigDict, plan: Plan,
      evaluators: Sequence[Evaluator], start: int,
      mfu_of_rate: float | None = None,
  ):
    """Opens the files and reads what an earlier part of the run logged.

    Args:
      workdir: the run's workdir; it exists.
      config: the run's config.
      plan: the run's schedule in steps.
      evaluators: the evaluators whose values are shown in words.
      start: the number of updates done.
      mfu_of_rate: MFU at one image per second; None if it is not known.
    """
    self._config, self._plan, self._workdir = config, plan, workdir
    self._evaluators = evaluators
    self._mfu_of_rate = mfu_of_rate
    self._progress = progress.Progress(plan.total_steps, active=is_primary())
    self._record = trackers.Record('', workdir, {}, self.note)
    if config.log.tracker:
      # If it fails, it fails in all processes.
      processes.from_primary(self._begin_record)
    self._writer = metrics.MetricWriter(workdir, start, is_primary())
    # The writer has dropped the rows that will be written again.
    self.rows = metrics.read_metrics(workdir / 'metrics.jsonl')
    pretraining = 'init' in config
    self._watch = stability.Watch(
        has_weights=pretraining and bool(config.init.checkpoint),
        can_bound=pretraining and config.optimizer.name == 'adamw'
        and not config.optimizer.update_clip,
    )
    for row in self.rows:
      self._watch.update(row['step'], row)
    self._record.catch_up(self.rows)
    self.throughput = progress.Throughput(config.batch_size)
    self.last_step: Values = {}

  def _begin_record(self) -> dict[str, Any]:
    self._record = trackers.Record(
        self._config.log.tracker, self._workdir,
        workdir_lib.to_json(self._config), self.note,
    )
    return {}

  def note(self, text: str) -> None:
    """Prints a line that stays on the screen."""
    self._progress.note(text)

  def step(self, step: int, values: Values) -> None:
    """Logs the metrics of one step."""
    rate = self.throughput.tick()
    values['train/images_per_second'] = rate
    if self._mfu_of_rate is not None:
      values['train/mfu'] = rate * self._mfu_of_rate
    if step % self._config.log.every_steps == 0:
      self._write(step, values)
      # Only written values count, so that a continued run warns alike.
      self._warn(step, values)
    self.last_step = values
    known = self._writer.latest | values
    self._progress.update(
        step, known, self._config.batch_size, self._words(known)
    )

  def evaluation(self, step: int, values: Values) -> None:
    """Logs the evaluators' values for the state after `step` updates."""
    self._write(step, values)
    self.note(f'step {step}/{self._plan.total_steps}{self._words(values)}')
    self._warn(step, values)

  def lacks_evaluation(self, step: int) -> bool:
    """Returns whether the evaluation at `step` is missing from the rows."""
    mains = {e.main for e in self._evaluators}
    return bool(mains) and not any(
        row['step'] == step and mains & row.keys() for row in self.rows
    )

  def diverged(self, step: int) -> None:
    """Logs that a metric became NaN or infinite at `step`."""
    self._write(step, {'train/diverged': 1.0})
    self._record.end()

  def _write(self, step: int, values: Values) -> None:
    self._writer.write(step, values)
    self._record.write(step, values)

  def _words(self, values: Values) -> str:
    return ''.join(
        f'  {e.words(values)}' for e in self._evaluators if e.main in values
    )

  def _warn(self, step: int, values: Values) -> None:
    for warning in self._watch.update(step, values):
      self.note(warning)

  def compare_with_start(self) -> None:
    """Warns of metrics that training has not improved."""
    for e in self._evaluators:
      if not e.best or e.main not in self._writer.first:
        continue
      first, last = (x[e.main] for x in (
          self._writer.first, self._writer.latest
      ))
      if last <= first:
        self.note(
            f'warning: {e.main} is {last:.3f}, no more than the {first:.3f} of '
            'the network before its first step'
        )

  def results(self) -> dict[str, Any]:
    """Returns the last value of each metric, and the evaluators' first values.

    NAME_init is the value of an evaluator's main metric before training. Rates
    are averages over the steps since this process started.
    """
    last = self._writer.latest | self.last_step
    for e in self._evaluators:
      if e.main in self._writer.first:
        last[f'{e.main}_init'] = self._writer.first[e.main]
    if self.throughput.average:
      rate = self.throughput.average
      last['train/images_per_second'] = rate
      if self._mfu_of_rate is not None:
        last['train/mfu'] = rate * self._mfu_of_rate
    return last

  def flush(self) -> None:
    """Writes to disk what a run continued from here will not log again."""
    self._writer.flush()
    self._record.flush()

  def finish(self, results: dict[str, Any]) -> None:
    """Passes the results of a finished run to its tracker."""
    self._record.finish(results)

  def close(self) -> None:
    """Flushes and closes the files and the tracker's record of the run."""
    self._writer.close()
    self._record.close()
