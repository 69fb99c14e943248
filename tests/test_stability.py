"""Planted spikes, dips and collapses are found, and nothing else."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import pathlib
from typing import NamedTuple

from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tiny

from mocov3_jax.config import training as config_lib
from mocov3_jax.evals.evaluator import Evaluator
from mocov3_jax.training import events as events_lib
from mocov3_jax.training import stability, step_log
from mocov3_jax.training.events import Dip, Spike

LAYERS = 'patch_embed', 'block_0', 'last_block'
# Real runs; see the README.md there.
RUNS = pathlib.Path(__file__).parent / 'spikes'


class Planted(NamedTuple):
  """A spike: its highest step, and how far above the median that is."""

  step: int
  ratio: float


EVERY = 20  # Steps between two evaluations.
SEEDS = range(200)
FLANKS = {0: 1.0, 1: 0.4, 2: 0.2}  # Of a spike's log height, by distance.


def gradient(rng, steps, sigma):
  """Shrinks fast in the first steps, then by up to two orders of magnitude."""
  time = np.arange(steps)
  log = rng.uniform(-3, 0) - rng.uniform(0, 4.6) * time / steps
  log += rng.uniform(1, 4) * np.exp(-time / 5)
  return np.exp(log + rng.normal(0, sigma, steps))


def knn_level(rng, count):
  """A steep rise that saturates; without noise."""
  start, rise = rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.6)
  rate = rng.uniform(6, 12) / count
  return start + rise * (1 - np.exp(-rate * np.arange(count)))


def noisy(rng, level, sigma):
  """With the noise of held-out images, and rounded as a share of them is."""
  return np.round((level + rng.normal(0, sigma, len(level))) * 500) / 500


def as_rows(gradients, knn, every=EVERY, **more):
  """The rows of a metrics.jsonl, in its order."""
  rows = []
  for step in range(len(next(iter(gradients.values())))):
    if step % every == 0 and step // every < len(knn):
      rows.append({'step': step, 'knn/top1': float(knn[step // every])})
    rows.append({'step': step, **more} | {
        f'grad_max/{layer}': values[step]
        for layer, values in gradients.items()
    })
  return rows


def smooth_run(seed, steps=800):
  rng = np.random.default_rng(seed)
  gradients = {
      layer: gradient(rng, steps, rng.uniform(0.05, 0.3)) for layer in LAYERS
  }
  level = knn_level(rng, int(rng.integers(40, 150)))
  return as_rows(
      gradients, noisy(rng, level, rng.uniform(0.002, 0.015)), every=5
  )


def plant_spikes(rng, gradients, sigma, places, order, lags):
  """Multiplies the gradients; returns the ratio of each, by layer."""
  planted = {layer: [] for layer in order}
  for place in places:
    for layer in order:
      highest = 20 if layer == order[0] else 12
      # Out of the noise, and 5 times the median whatever the noise of the top.
      ratio = rng.uniform(5 * np.exp(4 * sigma), highest)
      width = rng.integers(1, 6)
      for offset in range(-((width - 1) // 2), width // 2 + 1):
        gradients[layer][place + lags[layer] + offset] *= (
            ratio ** FLANKS[abs(offset)]
        )
      planted[layer].append(Planted(int(place + lags[layer]), ratio))
  return planted


def plant_dips(rng, level, sigma, places):
  """Lowers the level; returns the dips, in evaluations."""
  planted = []
  for place in places:
    depth = rng.uniform(max(0.06, 12 * sigma), 0.3)
    fall, climb = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    low = place + fall
    amount = depth + level[low] - level[place]
    for i in range(1, fall + 1):
      level[place + i] -= amount * i / fall
    for i in range(1, climb):
      level[low + i] -= amount * (1 - i / climb)
    planted.append(Dip(place, low, low + climb, depth))
  return planted


def planted_run(seed, steps=2000, calm=1.0):
  """Returns rows, spikes by layer, lags, dips, and the noise of both."""
  rng = np.random.default_rng(seed)
  sigma, knn_sigma = rng.uniform(0.03, 0.15), calm * rng.uniform(0.002, 0.006)
  order = tuple(rng.permutation(LAYERS))
  first, *others = order
  lags = {first: 0} | {layer: int(rng.integers(1, 31)) for layer in others}
  gradients = {layer: gradient(rng, steps, sigma) for layer in LAYERS}
  places = [start + rng.integers(0, 20) for start in range(150, 1901, 220)]
  spikes = plant_spikes(rng, gradients, sigma, places, order, lags)
  level = knn_level(rng, steps // EVERY)
  dips = plant_dips(
      rng, level, knn_sigma,
      [int(start + rng.integers(0, 5)) for start in (25, 55, 80)],
  )
  rows = as_rows(gradients, noisy(rng, level, knn_sigma))
  return rows, spikes, lags, dips, sigma, knn_sigma


def watched(rows, watch=None):
  watch = watch or stability.Watch()
  return [line for row in rows for line in watch.update(row['step'], row)]


@pytest.mark.slow
def test_every_planted_spike_is_found_in_its_layer_with_its_lag():
  for seed in SEEDS:
    rows, planted, lags, _, sigma, _ = planted_run(seed)
    found = stability.analyse(rows)
    first = min(lags, key=lambda layer: lags[layer])
    for layer in LAYERS:
      assert [s.peak for s in found.spikes[layer]] == [
          s.step for s in planted[layer]
      ], (seed, layer)
      for ours, true in zip(found.spikes[layer], planted[layer], strict=True):
        assert true.step - 2 <= ours.onset <= true.step <= ours.end, seed
        assert ours.end <= true.step + 2, seed
        assert abs(np.log(ours.ratio / true.ratio)) < 5 * sigma + 0.2, seed
    del lags[first]
    events = len(planted[first])
    assert found.lead.first == first, seed
    assert found.lead.events == events, seed
    # Of a layer that follows one step later, a flank may begin with the first.
    if min(lags.values()) > 1:
      assert found.lead.led == events, seed
    for layer, lag in lags.items():  # A flank may be high enough to begin one.
      assert abs(found.lead.lags[layer] - lag) <= 2, seed


def test_every_planted_dip_is_found_with_its_depth():
  for seed in SEEDS:
    rows, _, _, planted, _, sigma = planted_run(seed)
    found = events_lib.dips(*stability.series(rows, 'knn/top1'))
    assert len(found) == len(planted), (seed, found, planted)
    for ours, true in zip(found, planted, strict=True):
      assert abs(ours.start / EVERY - true.start) <= 3, seed
      assert abs(ours.low / EVERY - true.low) <= 2, seed
      assert true.low < ours.end / EVERY <= true.end + 2, seed
      # The best and the lowest of several noisy values.
      assert abs(ours.depth - true.depth) < 6 * sigma + 0.004, seed


@pytest.mark.slow
def test_a_smooth_noisy_run_gives_no_alarm():
  for seed in SEEDS:
    rows = smooth_run(seed)
    found = stability.analyse(rows)
    assert not found.dips and not any(found.spikes.values()), seed
    assert found.lead.first is None
    assert found.collapsed is found.stuck is found.diverged is None
    assert watched(rows) == [], seed


def test_a_long_noisy_gradient_gives_no_alarm():
  for seed in range(5):
    values = gradient(np.random.default_rng(seed), 10_000, 0.3)
    assert events_lib.spikes(np.arange(10_000), values) == []


def real_run(name):
  """The rows of one of RUNS."""
  with gzip.open(RUNS / f'{name}.csv.gz', 'rt') as file:
    rows = [
        {key: float(value) for key, value in row.items() if value}
        for row in csv.DictReader(file)
    ]
  return [row | {'step': int(row['step'])} for row in rows]


# What a person sees: layer, steps between which it begins, and ends, and
# between which its highest ratio is.
SEEN = {
    'l03': [
        ('patch_embed', (1308, 1314), (1318, 1332), (15, 22)),
        ('block_0', (1312, 1316), (1320, 1332), (4, 10)),
        ('last_block', (1314, 1320), (1318, 1336), (5, 8)),
        ('patch_embed', (1618, 1622), (1620, 1626), (5, 9)),
    ],
    'l10': [
        ('block_0', (676, 684), (682, 732), (6, 12)),
        ('patch_embed', (858, 866), (864, 875), (10, 25)),
        ('block_0', (866, 870), (869, 900), (12, 35)),
        ('last_block', (864, 872), (869, 910), (8, 20)),
        ('patch_embed', (914, 918), (916, 935), (12, 30)),
        ('block_0', (914, 918), (916, 935), (30, 90)),
    ],
    'f10': [
        ('last_block', (1340, 1352), (1348, 1356), (50, 200)),
        ('block_0', (1330, 1352), (1348, 1356), (30, 90)),
        ('block_2', (1340, 1352), (1348, 1356), (15, 60)),
    ],
}


@pytest.mark.parametrize('name', SEEN)
def test_what_a_person_sees_in_a_real_run_is_found(name):
  found = stability.analyse(real_run(name)).spikes
  for layer, onset, end, ratio in SEEN[name]:
    assert any(
        onset[0] <= s.onset <= onset[1] and end[0] <= s.end <= end[1]
        and ratio[0] <= s.ratio <= ratio[1] for s in found[layer]
    ), (layer, onset, found[layer])


def test_a_crash_is_no_dip_and_a_dip_is_no_crash():
  crashed = stability.analyse(real_run('l10'))
  assert not crashed.dips and crashed.fall.depth > 0.5
  assert 800 <= crashed.fall.start <= 860
  recovered = stability.analyse(real_run('f10'))
  assert recovered.fall is None
  [dip] = recovered.dips
  assert (dip.low, dip.end) == (1360, 1440) and dip.depth > 0.85


def test_real_runs_without_events_give_few_alarms():
  # 8,000 steps of four layers. Those of f03 reach 5 to 6 times the median.
  alarms = {'l01': 0, 'f03': 4}
  for name, most in alarms.items():
    found = stability.analyse(real_run(name))
    begins = sorted(s.onset for those in found.spikes.values() for s in those)
    apart = [
        b for a, b in itertools.pairwise([-100, *begins])
        if b - a > events_lib.MAX_LAG
    ]
    assert len(apart) <= most, (name, apart)
    assert not found.dips and found.fall is None


@pytest.mark.parametrize('name', SEEN)
def test_a_watch_warns_of_a_real_event_within_five_steps(name):
  said = [
      int(line.split()[2].rstrip(':')) for line in watched(real_run(name))
      if 'gradient of' in line
  ]
  found = stability.analyse(real_run(name)).spikes
  begins = [s.onset for those in found.values() for s in those]
  _, onset, _, _ = SEEN[name][0]
  # The layer in which it begins may be another one.
  first = min(b for b in begins if onset[0] - 20 <= b <= onset[1])
  assert any(first <= step <= first + 5 for step in said), said


def test_a_watch_warns_of_every_planted_event_once():
  for seed in range(40):
    rows, planted, lags, dips, _, _ = planted_run(seed, calm=0.5)
    first = min(lags, key=lambda layer: lags[layer])
    lines = watched(rows)
    spoken = [line for line in lines if 'gradient of' in line]
    assert len(spoken) == len(planted[first]), (seed, spoken)
    for line, true in zip(spoken, planted[first], strict=True):
      step = int(line.split()[2].rstrip(':'))
      assert true.step - 2 <= step <= true.step, seed
      assert f'gradient of {first} ' in line
    # Those that follow are counted, but for layers that spike at one step.
    follow = len({lag for lag in lags.values() if lag})
    for line in spoken[1:]:
      assert f'({follow} more like this since step' in line, seed
    steps = [int(x.split()[2].rstrip(':')) for x in lines if 'kNN fell' in x]
    assert len(steps) == len(dips), (seed, lines)
    for step, dip in zip(steps, dips, strict=True):
      assert dip.start < step / EVERY <= dip.end, seed


@given(power=st.integers(-20, 20), seed=st.integers(0, 199))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_a_gradient_does_not_matter(power, seed):
  values = gradient(np.random.default_rng(seed), 1000, 0.15)[:300]
  values[[100, 200]] *= 12
  steps = np.arange(300)
  before = events_lib.spikes(steps, values)
  after = events_lib.spikes(steps, values * 2.0**power)
  assert [s.peak for s in before] == [s.peak for s in after] == [100, 200]
  np.testing.assert_allclose(
      [s.ratio for s in before], [s.ratio for s in after]
  )


@given(shift=st.floats(-0.5, 0.5), seed=st.integers(0, 199))
@settings(max_examples=20, deadline=None)
def test_a_dip_does_not_depend_on_the_level(shift, seed):
  rng = np.random.default_rng(seed)
  level = knn_level(rng, 80)
  plant_dips(rng, level, 0.004, [30, 55])
  values = noisy(rng, level, 0.004)
  steps = np.arange(80)
  before, after = (events_lib.dips(steps, v) for v in (values, values + shift))
  assert [d.low for d in before] == [d.low for d in after]
  assert len(before) == 2
  np.testing.assert_allclose(
      [d.depth for d in before], [d.depth for d in after], atol=1e-12
  )


@given(st.lists(st.floats(0, 1), max_size=60))
@settings(max_examples=100, deadline=None)
def test_dips_are_ordered_and_deep_enough_on_any_curve(values):
  found = events_lib.dips(np.arange(len(values)) * 25, np.asarray(values))
  for dip in found:
    assert dip.depth > events_lib.DIP_DEPTH
    assert dip.start < dip.low
    assert dip.end is None or dip.low < dip.end == dip.start + dip.width
  for one, two in zip(found[:-1], found[1:], strict=True):
    assert one.end <= two.start


@given(st.lists(st.floats(0, allow_infinity=False), max_size=150))
@settings(max_examples=50, deadline=None)
def test_spikes_of_any_curve_are_high_and_apart(values):
  found = events_lib.spikes(np.arange(len(values)), np.asarray(values))
  for spike in found:
    assert spike.ratio > events_lib.SPIKE_RATIO * 0.999
    assert spike.onset <= spike.peak <= spike.end
    assert spike.end - spike.onset <= events_lib.LONGEST
  for one, two in zip(found[:-1], found[1:], strict=True):
    assert one.end < two.onset


def test_a_slow_decline_is_one_dip_without_an_end():
  rng = np.random.default_rng(0)
  level = np.concatenate([np.linspace(0.2, 0.6, 30), np.linspace(0.6, 0.2, 90)])
  found = events_lib.dips(np.arange(120) * 25, noisy(rng, level, 0.005))
  assert len(found) == 1
  assert found[0].end is None and found[0].width is None
  assert found[0].low > 115 * 25 and abs(found[0].depth - 0.4) < 0.03


def test_a_fall_at_the_last_evaluation_is_a_dip():
  values = np.append(np.full(20, 0.5), 0.3)
  found = events_lib.dips(np.arange(21), values)
  assert found == [Dip(19, 20, None, pytest.approx(0.2))]


def test_a_dip_starts_at_the_end_of_a_plateau():
  values = np.full(40, 0.5)
  values[3] = 0.51
  values[30] = 0.3
  assert events_lib.dips(np.arange(40), values) == [
      Dip(29, 30, 31, pytest.approx(0.21))
  ]


def test_a_dip_ends_when_most_of_the_fall_is_made_good():
  for back, end in (0.5, None), (0.54, 13):
    values = np.full(40, back)
    values[:10] = 0.6
    values[10:13] = 0.3
    found = events_lib.dips(np.arange(40), values)
    assert found == [Dip(9, 10, end, pytest.approx(0.3))]


def test_the_first_values_are_too_few_to_call_one_a_spike():
  values = np.ones(100)
  values[39] = 9
  assert events_lib.spikes(np.arange(100), values) == []
  values[40] = 99
  assert events_lib.spikes(np.arange(100), values) == [
      Spike(40, 40, 40, pytest.approx(99))
  ]


def test_a_gradient_that_grows_for_good_is_no_spike_afterwards():
  rng = np.random.default_rng(0)
  log = np.where(np.arange(600) < 300, 0.0, np.log(8)) + rng.normal(0, 0.1, 600)
  assert events_lib.spikes(np.arange(600), np.exp(log)) == []


def test_a_spike_in_the_last_steps_of_a_run_is_found():
  values = gradient(np.random.default_rng(0), 200, 0.1)
  values[198] *= 10
  assert [s.peak for s in events_lib.spikes(np.arange(200), values)] == [198]


@pytest.mark.parametrize('what, places', [
    ('an outlier before', [100, 150, 200]),
    ('a fall of the level', [220, 300]),
    ('a slow start', [200, 290]),
    ('another level for a while', [200, 250, 300]),
])
def test_what_was_high_before_hides_nothing(what, places):
  rng = np.random.default_rng(0)
  level = np.ones(400)
  if what == 'an outlier before':
    level[25] = 100
  if what == 'a fall of the level':
    level[100:] = 0.1
  if what == 'a slow start':
    level += 30 * np.exp(-np.arange(400) / 30)
  if what == 'another level for a while':
    level[60:120] = 10
  level[places] *= 10
  values = level * np.exp(rng.normal(0, 0.1, 400))
  found = [s.peak for s in events_lib.spikes(np.arange(400), values)]
  assert [p for p in found if p >= 100] == places


def test_a_crash_is_dated_to_its_beginning_whatever_comes_after():
  values = np.full(60, 0.8) + np.random.default_rng(0).normal(0, 0.003, 60)
  values[30:] -= 0.5
  values[40] = 0.9  # For a moment.
  [fall] = events_lib.dips(np.arange(60) * 20, values)
  assert fall.end is None and fall.start <= 30 * 20


def test_a_frozen_layer_has_no_spikes():
  assert events_lib.spikes(np.arange(200), np.zeros(200)) == []


def test_steps_need_not_be_even():
  rng = np.random.default_rng(0)
  values = gradient(rng, 300, 0.1)
  values[150] *= 9
  steps = np.cumsum(rng.integers(1, 20, 300))
  assert [s.peak for s in events_lib.spikes(steps, values)] == [steps[150]]


def spikes_at(*steps):
  return [Spike(step, step, step, 5.0) for step in steps]


def test_spikes_at_the_same_step_have_no_leader():
  found = events_lib.lead({'a': spikes_at(10, 500), 'b': spikes_at(10, 500)})
  assert found == events_lib.Lead(None, {'a': 0, 'b': 0}, 2, 0)


def test_the_leader_is_first_in_most_events_and_the_lag_is_the_median():
  found = events_lib.lead({
      'a': spikes_at(100, 300, 507, 900), 'b': spikes_at(110, 320, 500, 940),
      'c': spikes_at(2000),
  })
  assert found == events_lib.Lead('a', {'b': 15}, 4, 3)


def test_spikes_too_far_apart_are_not_one_event():
  apart = events_lib.MAX_LAG
  for lag, events in (apart, 1), (apart + 1, 0):
    found = events_lib.lead({'a': spikes_at(100), 'b': spikes_at(100 + lag)})
    assert found.events == events
  assert events_lib.lead({}) == events_lib.Lead(None, {}, 0, 0)


def loss_rows(losses, spread=0.3, chance=4.0, **more):
  return [
      {'step': step, 'train/loss': loss, 'train/loss_chance': chance,
       'train/feature_std': spread, **more}
      for step, loss in enumerate(losses)
  ]


def test_features_that_lose_their_spread_are_collapsed():
  alive, dead = loss_rows(np.full(100, 3.0)), loss_rows(np.full(30, 3.0), 1e-3)
  for i, row in enumerate(dead):
    row['step'] = 100 + i
  assert stability.collapsed(alive + dead) == 100
  assert stability.collapsed(alive + dead[:10]) is None
  assert stability.collapsed(dead + alive) is None
  # Features of images that look alike; such a network has learned.
  assert stability.collapsed(loss_rows(np.full(100, 3.0), 0.02)) is None
  lines = watched(alive + dead)
  assert len(lines) == 1 and lines[0].startswith('warning: step 119: ')


def test_equal_embeddings_of_features_that_differ_are_a_collapse():
  collapse = {'train/loss_collapsed': 0.0}
  losses = np.append(np.linspace(4.0, 0.0, 100), np.full(50, 1e-4))
  byol = loss_rows(losses, **collapse)
  assert stability.collapsed(byol) == 99
  assert any('same features or embeddings' in x for x in watched(byol))
  assert stability.collapsed(loss_rows([0.7] * 150, **collapse)) is None
  # A contrastive loss is at its chance then, which says no more than that.
  same = {'train/loss_collapsed': 4.0 - 1e-6}
  contrastive = loss_rows([4.0] * 150, **same)
  assert stability.collapsed(contrastive) is None
  assert stability.stuck(contrastive) == 0
  assert stability.collapsed(loss_rows([2.0] * 150, **same)) is None


def test_a_loss_that_stays_at_chance_is_stuck():
  rng = np.random.default_rng(0)
  flat = 4.0 + rng.normal(0, 0.01, 1500)
  assert stability.stuck(loss_rows(flat)) == 0
  assert stability.stuck(loss_rows(np.append(flat, 3.9))) is None
  fallen = np.concatenate([np.linspace(4, 2, 200), np.full(1100, 4.1)])
  assert stability.stuck(loss_rows(fallen)) == 200
  slow = np.concatenate([np.full(900, 4.0), np.linspace(4, 2, 600)])
  assert stability.stuck(loss_rows(slow)) is None
  lines = watched(loss_rows(np.full(5000, 4.0)))
  assert len(lines) == 1 and lines[0].startswith('warning: step 1000: ')
  assert watched(loss_rows(slow)) == []
  # Said once, as what it is.
  line, = watched(loss_rows(np.full(1500, 4.0), spread=0.0))
  assert 'same features' in line


def test_a_run_that_diverged_says_so_whatever_else_it_holds():
  rows = loss_rows(np.linspace(4, 2, 100))
  rows[-1]['train/loss'] = rows[-1]['grad_max/patch_embed'] = float('nan')
  rows.append({'step': 100, 'train/diverged': 1.0})
  found = stability.analyse(rows)
  assert found.diverged == 100
  assert found.stuck is None and found.collapsed is None


@pytest.mark.parametrize('rows', [
    [], [{'step': 0, 'knn/top1': 0.5}], loss_rows([3.0]),
    as_rows({'patch_embed': np.zeros(100)}, np.zeros(10)),
], ids=['none', 'one of kNN', 'one of the loss', 'zeros'])
def test_runs_with_next_to_nothing_are_stable(rows):
  found = stability.analyse(rows)
  assert not found.dips and not any(found.spikes.values())
  assert found.collapsed is found.stuck is found.diverged is None
  assert watched(rows) == []


def test_a_series_has_the_rows_that_have_the_metric():
  rows = [{'step': 3, 'a': 1.0}, {'step': 4}, {'step': 9, 'a': float('nan')},
          {'step': 10, 'a': 2}]
  steps, values = stability.series(rows, 'a')
  assert steps.tolist() == [3, 10] and values.tolist() == [1.0, 2.0]
  assert steps.dtype == np.int64 and values.dtype == np.float64


def test_rows_far_apart_do_not_tell_who_was_first():
  rows, *_ = planted_run(0)
  assert stability.analyse(rows).lead.first is not None
  apart = [row | {'step': 10 * row['step']} for row in rows]
  found = stability.analyse(apart)
  assert found.lead.first is None and any(found.spikes.values())


@pytest.mark.parametrize('cut', [1, 160, 500, 901])
def test_a_watch_that_read_the_log_goes_on_as_if_never_stopped(cut):
  rows, *_ = planted_run(3)
  straight, continued = stability.Watch(), stability.Watch()
  watched(rows[:cut], straight)
  watched(json.loads(json.dumps(rows[:cut])), continued)
  assert watched(rows[cut:], continued) == watched(rows[cut:], straight) != []


def test_a_watch_keeps_no_more_than_its_windows():
  rng = np.random.default_rng(0)
  watch = stability.Watch()
  sizes = []
  for step in range(1000):
    watch.update(step, {'grad_max/a': rng.uniform(1, 2), 'knn/top1': 0.5})
    sizes.append(sum(
        len(part) for part in vars(watch).values() if hasattr(part, '__len__')
    ))
  assert max(sizes) == sizes[200]


def test_warnings_do_not_flood():
  rng = np.random.default_rng(0)
  values = gradient(rng, 1000, 0.1)
  values[100::15] *= 10
  lines = watched(as_rows({'a': values}, []))
  steps = [int(line.split()[2].rstrip(':')) for line in lines]
  assert 2 <= len(lines) <= 5
  assert min(np.diff(steps)) >= stability.SILENCE
  assert all('more like this' in line for line in lines[1:])


def test_a_fall_for_good_is_warned_of_once():
  rng = np.random.default_rng(0)
  level = np.append(np.full(30, 0.6), np.full(60, 0.35))
  knn = noisy(rng, level + rng.normal(0, 0.01, 90), 0.01)
  line, = watched([
      {'step': 25 * i, 'knn/top1': value} for i, value in enumerate(knn)
  ])
  assert line.startswith('warning: step 750: kNN fell by 0.2')


def test_a_short_run_below_the_random_network_is_warned_of_early():
  # 11 evaluations are too few to tell a fall from noise before the end.
  knn = [0.83, 0.7, 0.4, 0.35, 0.38, 0.3, 0.33, 0.31, 0.35, 0.3, 0.32]
  rows = [{'step': 10 * i, 'knn/top1': v} for i, v in enumerate(knn)]
  line, = watched(rows)
  assert line.startswith(
      'warning: step 30: kNN is 0.350, less than the 0.830 of the random'
  )
  line, = watched(rows, stability.Watch(has_weights=True))
  assert '0.830 of the weights it began with' in line
  assert 'init.freeze_backbone_epochs' in line and 'patch_embed' not in line


def test_a_fall_without_return_is_no_dip():
  rng = np.random.default_rng(0)
  level = np.concatenate([
      np.linspace(0.5, 0.9, 30), [0.8, 0.85], np.linspace(0.9, 0.93, 20),
      np.linspace(0.93, 0.4, 40),
  ])
  rows = [
      {'step': 10 * i, 'knn/top1': v}
      for i, v in enumerate(noisy(rng, level, 0.002))
  ]
  found = stability.analyse(rows)
  assert [dip.low for dip in found.dips] == [300]
  assert found.fall.depth == pytest.approx(0.53, abs=0.02)
  assert found.fall.end is None and 500 < found.fall.start < 640


def test_a_short_visit_below_the_random_network_is_not_warned_of():
  knn = [0.83, 0.7, 0.79, 0.85, 0.9, 0.93, 0.94, 0.94, 0.95, 0.96, 0.96]
  assert watched([
      {'step': 10 * i, 'knn/top1': v} for i, v in enumerate(knn)
  ]) == []


def test_a_dip_that_shows_only_afterwards_is_not_warned_of():
  # Among so few values it may be noise; once the curve is known, it is none.
  values = np.append([0.5, 0.55, 0.45, 0.5, 0.3, 0.5], np.full(40, 0.5))
  values[6:] += np.tile([0, 0.01], 20)
  assert len(events_lib.dips(np.arange(46), values)) == 1
  assert watched([
      {'step': 25 * i, 'knn/top1': value} for i, value in enumerate(values)
  ]) == []


@pytest.mark.parametrize('learned', [True, False])
def test_freezing_the_projection_is_advised_where_it_learns(learned):
  gradients = {layer: np.ones(100) for layer in LAYERS}
  gradients['last_block'][60] = 9
  if not learned:
    gradients['patch_embed'][:] = 0
  line, = watched(as_rows(gradients, []))
  assert line.startswith('warning: step 60: gradient of last_block 9.0x its')
  assert ('model.patch_embed=frozen' in line) == learned
  assert 'optimizer.lr_per_256' in line and '\n' not in line


def recorded(workdir, rows, start, **changes):
  """The warnings of a StepLog that is fed the rows of a run from `start`."""
  workdir.mkdir(exist_ok=True)
  c = tiny.config(**{'schedule.epochs': 30.0} | changes)
  knn = Evaluator(None, 0, 'knn/top1', lambda values: '')
  with contextlib.redirect_stderr(io.StringIO()) as shown:
    log = step_log.StepLog(
        epath.Path(workdir), c, config_lib.plan(c, 1437), [knn], start
    )
    for row in rows:
      values = {k: v for k, v in row.items() if k != 'step'}
      if 'knn/top1' in row:
        log.evaluation(row['step'], values)
      else:
        log.step(row['step'], values)
    log.close()
  lines = shown.getvalue().splitlines()
  return [line for line in lines if line.startswith('warning')]


@pytest.mark.parametrize('change, advised', [
    ({}, True), ({'optimizer.update_clip': 1.0}, False),
    ({'optimizer.name': 'lamb'}, False),
])
def test_a_bound_is_advised_where_adamw_has_none(tmp_path, change, advised):
  gradients = {layer: np.ones(100) for layer in LAYERS}
  gradients['patch_embed'][60] = 9
  rows = as_rows(gradients, [], **{
      'train/loss': 2.0, 'train/loss_chance': 4.0,
  })
  line, = recorded(tmp_path / 'run', rows, 0, **change)
  assert ('optimizer.update_clip=1' in line) == advised


def test_a_run_prints_its_warnings_and_so_does_its_continuation(tmp_path):
  rng = np.random.default_rng(0)
  gradients = {layer: gradient(rng, 400, 0.1) for layer in LAYERS}
  gradients['patch_embed'][[155, 200, 310]] *= 10
  level = np.full(20, 0.6)
  level[13:15] = 0.4
  rows = as_rows(gradients, noisy(rng, level, 0.003), **{
      'train/loss': 2.0, 'train/loss_chance': 4.0,
  })
  straight = recorded(tmp_path / 'straight', rows, 0)
  steps = [int(line.split()[2].rstrip(':')) for line in straight]
  assert steps == [155, 260] and 'gradient of patch_embed' in straight[0]
  # Saved after 200 updates and evaluated there; killed at step 206.
  saved = 200 + 200 // EVERY + 1
  assert rows[saved - 1].keys() == {'step', 'knn/top1'}
  before = recorded(tmp_path / 'two', rows[:saved + 6], 0)
  assert before + recorded(tmp_path / 'two', rows[saved:], 200) == straight
