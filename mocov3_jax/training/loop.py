"""The training loop. It knows nothing about self-supervision.

Pre-training, probes and fine-tuning share it. They differ in the step function,
the batches and the hooks.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any, NamedTuple

import jax

State = Any
Values = dict[str, float]


class Hook(NamedTuple):
  """Something to do between steps, such as evaluate or save.

  Attributes:
    due: (updates done) -> whether to run the hook now.
    run: (updates done, state) -> None. It must not keep the state, which the
      next step donates.
  """

  due: Callable[[int], bool]
  run: Callable[[int, State], None]


class NonFinite(Exception):
  """A metric, or what an evaluation computed, became NaN or infinite.

  Attributes:
    step: the step at which it did.
    values: all metrics of that step.
    reason: what an evaluation found; '' = it was a metric.
  """

  def __init__(self, step: int, values: Values, reason: str = ''):
    super().__init__(f'non-finite metrics at step {step}: {values}')
    self.step = step
    self.values = values
    self.reason = reason


def run(
    state: State,
    step_fn: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batches: Iterator[Any],
    *,
    start: int,
    stop: int,
    log: Callable[[int, Values], None],
    hooks: Sequence[Hook] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[State, int]:
  """Runs steps start .. stop - 1.

  The metrics of step n - 1 are fetched after step n is dispatched, so that the
  device never waits for the log. Before a hook, all metrics are fetched first,
  so that no state is evaluated or saved after a step with non-finite metrics.

  Args:
    state: donated to the first step.
    step_fn: (state, batch) -> (state, scalar metrics), jitted.
    batches: one on-device batch per step. The loop ends early if they run out.
    start, stop: the number of updates done before and after the loop.
    log: called with the metrics of every step, in order.
    hooks: run in this order when due.
    should_stop: called after each step; True ends the loop early.

  Returns:
    The state and the number of updates done.

  Raises:
    NonFinite: for the first step with a non-finite metric.
  """
  pending = None  # (step, metrics) of the step that was not fetched yet.
  done = start
  while done < stop:
    with jax.transfer_guard('disallow'):
      batch = next(batches, None)
      if batch is None:
        break
      state, metrics = step_fn(state, batch)
      if pending is not None:
        log(*_fetch(*pending))
    pending = (done, metrics)
    done += 1
    due = [hook for hook in hooks if hook.due(done)]
    ending = should_stop()
    if due or ending or done == stop:
      log(*_fetch(*pending))
      pending = None
    for hook in due:
      hook.run(done, state)
    if ending:
      break
  if pending is not None:
    log(*_fetch(*pending))
  return state, done


def _fetch(
    step: int, metrics: dict[str, jax.Array]
) -> tuple[int, Values]:
  values = {k: v.item() for k, v in jax.device_get(metrics).items()}
  if not all(math.isfinite(v) for v in values.values()):
    raise NonFinite(step, values)
  return step, values
