"""The sequence of events that all kinds of training share.

Pre-training, linear probes and fine-tuning give a `Trainer` different parts.
The sequence is the same for all: claim the workdir, restore or initialise the
state, run the loop, evaluate and save between steps, and save once more when
asked to stop.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import time
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax import trackers
from mocov3_jax.base import console, exits
from mocov3_jax.base.errors import Preempted, UserError
from mocov3_jax.config import knobs
from mocov3_jax.config.training import Plan
from mocov3_jax.data import pipeline
from mocov3_jax.data.workers import LostWorkers
from mocov3_jax.evals.evaluator import Evaluator, best_metric
from mocov3_jax.evals.features import NonFiniteFeatures
from mocov3_jax.parallel import chips, processes, sharding
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.runs.checkpoints import Checkpoints
from mocov3_jax.training import host_flags, loop
from mocov3_jax.training.step_log import StepLog
from mocov3_jax.training.unreadable import UnreadableImages

State = Any
Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainer:
  """All parts of a training run, ready to run.

  Attributes:
    config: the config to store in the workdir. The fields `log`, `save`,
      `batch_size`, `data.prefetch` and `data.max_unreadable` are used here.
    schema: the schema of the config.
    plan: the schedule in steps.
    mesh: the mesh to train on.
    init: (*constants) -> state.
    step: (state, Batch, *constants) -> (state, scalar metrics).
    reader: reads this process's part of the batches.
    fingerprint: identifies the data.
    evaluators: measure the state between steps.
    advice: what to try if training diverges; part of the error message.
    notes: lines to print at the start.
    constants: arrays passed to `init` and `step`, such as a frozen backbone.
    monitors: fields of the state that only a monitor uses. If a checkpoint
      lacks them, they start from their initial values.
    begin: changes a fresh state before its first step.
    environment: additional entries of environment.json.
    stop: returns whether this process has been asked to stop. The evaluators
      may check it, too.
    flops_per_image: () -> operations of a step per image; None = MFU is not
      logged.
  """

  config: ConfigDict
  schema: knobs.Schema
  plan: Plan
  mesh: Mesh
  init: Callable[..., State]
  step: Callable[..., tuple[State, dict[str, jax.Array]]]
  reader: pipeline.BatchReader
  fingerprint: dict[str, Any]
  evaluators: Sequence[Evaluator]
  advice: str
  notes: tuple[str, ...] = ()
  constants: tuple[Any, ...] = ()
  monitors: tuple[str, ...] = ()
  begin: Callable[[State], State] = lambda state: state
  environment: dict[str, str] = dataclasses.field(default_factory=dict)
  stop: exits.StopRequest = dataclasses.field(
      default_factory=exits.StopRequest
  )
  flops_per_image: Callable[[], float] | None = None

  @processes.exit_on_lost_peer()
  def run(
      self, path: str,
      finish: Callable[[Results, epath.Path, State], None] = lambda *_: None,
  ) -> Results:
    """Trains to the end, from the newest checkpoint in `path` if there is one.

    Args:
      path: the workdir.
      finish: called at the end with the results, the workdir and the final
        state, while the workdir is still claimed.

    Returns:
      The results, as a flat dictionary.

    Raises:
      UserError: if the workdir cannot be used, before anything is written; or
        if training diverges.
      Preempted: after SIGTERM or Ctrl-C, once the state is saved.
    """
    total, save = self.plan.total_steps, self.config.save
    trackers.check(self.config.log.tracker)
    with contextlib.ExitStack() as stack:
      # Signals are caught from before the first write until all is saved.
      stack.enter_context(self.stop.caught())
      workdir = stack.enter_context(workdir_lib.claimed(
          path, self.config, self.schema, self.fingerprint
      ))
      checkpoints = stack.enter_context(contextlib.closing(Checkpoints(
          workdir, save.keep_latest, save.keep_best, console.say,
          best_metric(self.evaluators), save.initial,
      )))
      step = sharding.jit_step(
          self.init, host_flags.reporting(self.step), self.mesh, self.constants
      )
      state, start = (
          checkpoints.restore(step.state, step.init, self.monitors)
          or (self.begin(step.init()), 0)
      )
      if start < total and processes.is_primary():
        workdir_lib.begin(workdir, self.mesh, self.environment)
      log = stack.enter_context(contextlib.closing(StepLog(
          workdir, self.config, self.plan, self.evaluators, start,
          self._mfu_of_rate(),
      )))
      unreadable = stack.enter_context(contextlib.closing(UnreadableImages(
          workdir, self.reader, self.config, self.plan, log.rows, start
      )))
      self._announce(log, start)
      waits = collections.deque()  # Seconds, for batches not yet logged.
      stopping = overdue = False
      saved_at = time.monotonic()

      def is_time_to_save() -> bool:
        minutes = (time.monotonic() - saved_at) / 60
        return 0 < save.every_minutes <= minutes

      def log_step(step: int, values: dict[str, float]) -> None:
        nonlocal stopping, overdue
        stopping |= values.pop(host_flags.STOP) > 0
        overdue |= values.pop(host_flags.SAVE) > 0
        unreadable.count(step, int(values[host_flags.UNREADABLE]))
        values['data/wait_seconds'] = waits.popleft()
        log.step(step, values)

      def saves(step: int) -> bool:
        return step % save.every_steps == 0 or step == total

      def is_due(step: int) -> bool:
        return saves(step) or any(e.is_due(step) for e in self.evaluators)

      def evaluate_and_save(step: int, state: State) -> None:
        with log.throughput.paused():
          values = {}
          for evaluator in self.evaluators:
            if saves(step) or evaluator.is_due(step):
              values |= measured(evaluator, step, state)
          log.evaluation(step, values)
        if saves(step) and (step or save.initial):
          save_now(step, state, values)

      def measured(
          evaluator: Evaluator, step: int, state: State
      ) -> dict[str, float]:
        try:
          return evaluator.measure(state)
        except NonFiniteFeatures as e:
          if not log.last_step:
            raise  # The state was already broken at the start.
          raise loop.NonFinite(step, log.last_step, str(e)) from e
        except Preempted as e:
          save_now(step, state)
          checkpoints.wait()
          raise Preempted(f'stopped: saved step {step} in {workdir}') from e
        except UserError as e:  # For example, a file can no longer be read.
          # Saving needs all processes. They all fail here together, unless
          # one of several has lost its workers.
          if step and not (
              isinstance(e, LostWorkers) and jax.process_count() > 1
          ):
            save_now(step, state)
            checkpoints.wait()
          raise
        finally:
          if processes.is_primary():
            unreadable.add(evaluator.unreadable)

      def save_now(
          step: int, state: State, values: dict[str, float] | None = None
      ) -> None:
        nonlocal overdue, saved_at
        with log.throughput.paused():
          log.flush()
          unreadable.flush()
          checkpoints.save(step, state, values or {})
        overdue, saved_at = False, time.monotonic()

      if start == 0:
        evaluate_and_save(0, state)
      elif is_due(start) and log.lacks_evaluation(start):
        log.note(
            f'metrics.jsonl lacks the evaluation of step {start}; evaluating '
            'now'
        )
        evaluate_and_save(start, state)
      with self._divergence_explained(log, checkpoints):
        state, done = loop.run(
            state, step, self._batches(
                start, unreadable, is_time_to_save, waits
            ),
            start=start, stop=total, log=log_step,
            hooks=[
                loop.Hook(is_due, evaluate_and_save),
                # `overdue` comes from the metrics of a step, so all processes
                # save at the same step.
                loop.Hook(lambda step: overdue and not saves(step), save_now),
            ],
            should_stop=lambda: stopping or unreadable.too_many,
        )
      if done < total:
        save_now(done, state)
        checkpoints.wait()
        unreadable.check(done)
        raise Preempted(f'stopped: saved step {done} in {workdir}')
      if done > start:
        log.compare_with_start()
      results = log.results() | {'step': done, 'workdir': str(workdir)}
      finish(results, workdir, state)
      log.finish(results)
      return results

  def _mfu_of_rate(self) -> float | None:
    """Returns the MFU at one image per second; None if it is not known."""
    peak = chips.peak_flops(self.mesh.devices.flat[0].device_kind)
    if peak is None or self.flops_per_image is None:
      return None
    return self.flops_per_image() / (peak * self.mesh.size)

  def _announce(self, log: StepLog, start: int) -> None:
    plan = self.plan
    for note in self.notes:
      log.note(note)
    where = f'continuing at step {start}' if start else 'from a fresh start'
    if start == plan.total_steps:
      where = 'already complete'
    log.note(
        f'{self.mesh.size} {jax.default_backend()} device(s); '
        f'{plan.total_steps} steps, {plan.steps_per_epoch} an epoch, '
        f'{plan.warmup_steps} of warm-up to lr {plan.peak_lr:.3g}; {where}'
    )

  def _batches(
      self, start: int, unreadable: UnreadableImages,
      is_time_to_save: Callable[[], bool], waits: collections.deque[float],
  ) -> Iterator[host_flags.FlaggedBatch]:
    """Yields the global batches from `start` on; appends to `waits`."""
    batches = pipeline.train_batches(
        self.reader, start, self.plan.total_steps, self.config.data.prefetch
    )
    # Several processes must stop at the same step: there, the loop ends when
    # the stop flag comes back in the metrics.
    if jax.process_count() == 1:
      batches = pipeline.until_asked(batches, self.stop)
    while True:
      before = time.perf_counter()
      batch = next(batches, None)
      if batch is None:
        return
      waits.append(time.perf_counter() - before)
      unreadable.list(batch)
      yield sharding.to_global(
          host_flags.flagged(batch, self.stop(), is_time_to_save()), self.mesh
      )

  @contextlib.contextmanager
  def _divergence_explained(
      self, log: StepLog, checkpoints: Checkpoints
  ) -> Iterator[None]:
    """Turns a non-finite metric into a UserError that says what to try."""
    try:
      yield
    except loop.NonFinite as e:
      # A checkpoint saved at this very step would hold the broken state.
      saved = checkpoints.newest_before(e.step)
      log.diverged(e.step)
      what = e.reason or (
          f'loss {e.values["train/loss"]}, gradient norm '
          f'{e.values["grad_norm/global"]}'
      )
      raise UserError(
          f'training diverged at step {e.step}: {what.rstrip(".")}; learning '
          f'rate {e.values["train/lr"]:.3g}. Last good checkpoint: '
          f'{"none" if saved is None else f"step {saved}"}. What helps: '
          f'{self.advice}, in a new workdir.'
      ) from e
