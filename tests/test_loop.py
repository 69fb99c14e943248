"""The loop on a toy state: order of events, early ends, broken numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocov3_jax.training import loop


@jax.jit
def double(state, batch):
  return state + batch, {'train/loss': state * 2.0}


def ones():
  return (jax.device_put(np.float32(1)) for _ in itertools.count())


def run(stop=5, start=0, step_fn=double, **kwargs):
  logged = []
  state, done = loop.run(
      jnp.float32(start), step_fn, ones(), start=start, stop=stop,
      log=lambda step, values: logged.append((step, values['train/loss'])),
      **kwargs,
  )
  return float(state), done, logged


def test_every_step_is_logged_once_in_order():
  state, done, logged = run()
  assert (state, done) == (5.0, 5)
  assert logged == [(s, 2.0 * s) for s in range(5)]


def test_a_run_that_starts_in_the_middle_logs_the_rest():
  assert run(start=3)[2] == [(3, 6.0), (4, 8.0)]


def test_metrics_are_fetched_a_step_late():
  events = []

  def step_fn(state, batch):
    events.append(f'dispatch {int(jax.device_get(state))}')
    return double(state, batch)

  loop.run(
      jnp.float32(0), step_fn, ones(), start=0, stop=3,
      log=lambda step, values: events.append(f'log {step}'),
  )
  assert events == [
      'dispatch 0', 'dispatch 1', 'log 0', 'dispatch 2', 'log 1', 'log 2'
  ]


def test_hooks_see_the_state_after_the_step_with_its_metrics_logged():
  seen = []
  logged = []
  loop.run(
      jnp.float32(0), double, ones(), start=0, stop=5,
      log=lambda step, values: logged.append(step),
      hooks=[
          loop.Hook(
              lambda step: step % 2 == 0,
              lambda step, state: seen.append((step, float(state), len(logged)))
          )
      ],
  )
  assert seen == [(2, 2.0, 2), (4, 4.0, 4)]


def test_should_stop_ends_after_the_step():
  answers = iter([False, True])
  state, done, logged = run(should_stop=lambda: next(answers))
  assert (state, done, len(logged)) == (2.0, 2, 2)


def test_a_non_finite_metric_stops_before_any_hook_sees_the_state():
  @jax.jit
  def breaks(state, batch):
    return state + batch, {'train/loss': jnp.where(state == 3, jnp.nan, 0)}

  seen = []
  hook = loop.Hook(lambda step: True, lambda step, state: seen.append(step))
  with pytest.raises(loop.NonFinite) as info:
    run(stop=9, step_fn=breaks, hooks=[hook])
  assert info.value.step == 3 and seen == [1, 2, 3]


def test_implicit_transfers_are_refused():
  with pytest.raises(Exception, match='[Dd]isallowed'):
    loop.run(
        jnp.float32(0), lambda state, batch: double(state, 1.0), ones(),
        start=0, stop=1, log=lambda step, values: None,
    )
