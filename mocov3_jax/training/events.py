"""Events of a curve: spikes of gradients, dips of kNN, who spiked first.

See the paper's section 4. Sizes are relative to the curve's own noise, which
is measured with medians, so that the event itself does not count as noise.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

# Logged values before a spike that say what is normal. Short against the
# schedule, long against a spike (tens of steps in paper Fig. 4).
WINDOW = 100
# With fewer values than this there is no saying what is normal. As many are
# left out at the start of a run, where gradients shrink fast.
MIN_HISTORY = 20
# A spike reaches so many times the median before it: that of the first layer in
# the paper's Fig. 4 reaches 8 (read off the figure). Real ones flicker, so that
# one may begin with two lesser values within SPIKE_GAP.
SPIKE_RATIO, PAIR_RATIO = 5.0, 3.0
# And so many standard deviations of the log; noise has tails, and these differ
# from layer to layer, so that a value must also be above all of the window, one
# that stands alone by so much.
SPIKE_SIGMAS, PAIR_SIGMAS = 4.0, 3.0
ABOVE_ALL = 1.5
# It lasts as long as values are so many times the median, with gaps of so many
# values at most.
LASTING_RATIO, LASTING_SIGMAS = 2.0, 2.0
SPIKE_GAP = 5
# What lasts longer is another level, unless it has come down by half.
LONGEST = 50
# Steps from layer to layer: twice the 20 to 25 of the paper's Fig. 4.
MAX_LAG = 50

# kNN of some hundreds of images has a binomial standard error of 0.01 to 0.02,
# and the dips of the paper's Figs. 1 to 6 are of 0.03 to 0.25.
DIP_DEPTH = 0.03
# The highest of a hundred values is 2.5 deviations up, the lowest 2.5 down:
# 5 are no fall at all, and the other 2 make it sure.
DIP_SIGMAS = 7.0
# A dip is over once this share of the fall is made good. Not all: the level
# before is the luckiest of many noisy values. And in most of so many
# evaluations from there on: a crash may come near that level for a moment.
RECOVERED, LASTING = 0.75, 5


class Spike(NamedTuple):
  """A stretch in which a gradient is far above what it was before.

  Attributes:
    onset: the first step of it.
    peak: the step of the highest value.
    end: the last step of it.
    ratio: the highest value over the median before the onset.
  """

  onset: int
  peak: int
  end: int
  ratio: float


@dataclasses.dataclass(frozen=True)
class Dip:
  """A fall of a curve from its best level; a dip proper if it comes back.

  Attributes:
    start: the last step near the level before.
    low: the step of the lowest value.
    end: the first step back near that level; None if there is none.
    depth: of the fall, in the curve's own unit.
  """

  start: int
  low: int
  end: int | None
  depth: float

  @property
  def width(self) -> int | None:
    """Steps from start to end."""
    return None if self.end is None else self.end - self.start


@dataclasses.dataclass(frozen=True)
class Lead:
  """In which layer the spikes begin (paper Fig. 4).

  Attributes:
    first: the layer that is first in most events; None if none is.
    lags: median steps from it to each other layer; if there is none, from the
      beginning of the event to each layer.
    events: groups of spikes of at least two layers.
    led: of these, how many `first` began.
  """

  first: str | None
  lags: dict[str, float]
  events: int
  led: int


def noise_bound(deviations: np.ndarray) -> float:
  """Returns a bound of the standard deviation of [n] numbers around 0.

  1.4826 medians of the absolute value are one, of normal numbers; that is off
  by 1.16 / sqrt(n) of itself (one standard error), so two of these are added.
  """
  sigma = 1.4826 * float(np.median(np.abs(deviations)))
  return sigma * (1 + 2 * 1.16 / math.sqrt(len(deviations)))


class SpikeFinder:
  """Finds the spikes of one curve, value by value.

  Against the values before alone: what follows a real spike may have another
  level, and while a run goes on it is not known.
  """

  def __init__(self):
    self._past = np.zeros(WINDOW)  # Logs; a ring, without those of spikes.
    self._places = self._count = 0  # Values that went into it, and are in it.
    self._high = collections.deque(maxlen=2)  # (place, step, height), perhaps.
    self._place = -1  # Of the last value; a frozen layer has none.
    self._begun: _Begun | None = None
    self._usual, self._until = -math.inf, 0  # Not looked at below, until then.
    self.ended: list[Spike] = []

  @property
  def current(self) -> Spike | None:
    """The spike that has not ended, as far as it is known."""
    return self._begun.spike() if self._begun and self._begun.sure else None

  def see(self, step: int, value: float) -> Spike | None:
    """Takes in the next value of the curve.

    Args:
      step: of the value.
      value: at least 0; of a layer that is frozen, 0.

    Returns:
      The spike, if it has just become certain that this is one.
    """
    if not 0 < value < math.inf:
      return None
    self._place += 1
    log = math.log(value)
    if self._place < MIN_HISTORY:
      return None
    if self._begun:
      return self._go_on(step, log)
    if self._count < MIN_HISTORY or (
        log <= self._usual and self._places < self._until
    ):  # Most values.
      self._remember(log)
      return None
    past = self._past[:self._count]
    middle = float(np.median(past))
    sigma = noise_bound(past - middle)
    # What was higher is no measure of what is to come.
    highest = middle + math.log(PAIR_RATIO)
    np.minimum(past, highest, out=past)
    self._usual = middle + math.log(LASTING_RATIO)
    self._until = self._places + MIN_HISTORY
    top, height = float(past.max()), log - middle
    if log <= top or height < PAIR_SIGMAS * sigma:
      self._remember(min(log, highest))
      return None
    self._high.append((self._place, step, height))
    alone = (
        height >= max(math.log(SPIKE_RATIO), SPIKE_SIGMAS * sigma)
        and log >= top + math.log(ABOVE_ALL)
    )
    near = [x for x in self._high if self._place - x[0] < SPIKE_GAP]
    if not alone and len(near) < 2:
      self._remember(highest)
      return None
    self._high.clear()
    self._begun = _Begun(middle, sigma, near)
    return self.current

  def _remember(self, log: float) -> None:
    # The ring fills up before it turns.
    self._past[self._places % WINDOW] = log
    self._places += 1
    self._count = min(self._places, WINDOW)

  def _go_on(self, step: int, log: float) -> Spike | None:
    spike, before = self._begun, self._begun.sure
    spike.see(self._place, step, log)
    over = self._place - spike.last >= SPIKE_GAP
    long = self._place - spike.first >= LONGEST
    if not over and not long:
      return self.current if not before else None
    if spike.sure and (over or spike.came_down()):
      self.ended.append(spike.spike())
    # What a spike was made of is no part of what is normal.
    for value in spike.logs[-SPIKE_GAP:] if over else spike.logs:
      self._remember(value)
    self._begun = None
    return None


class _Begun:
  """A spike that has begun."""

  def __init__(
      self, middle: float, sigma: float, high: list[tuple[int, int, float]]
  ):
    self._middle = middle
    self._least = max(math.log(LASTING_RATIO), LASTING_SIGMAS * sigma)
    self.first, self._onset, _ = high[0]
    self.last, self._end, _ = high[-1]
    _, self._peak, self._height = max(high, key=lambda x: x[2])
    self.logs = []

  @property
  def sure(self) -> bool:
    return self._height >= math.log(SPIKE_RATIO)

  def see(self, place: int, step: int, log: float) -> None:
    self.logs.append(log)
    height = log - self._middle
    if height >= self._least:
      self.last, self._end = place, step
    if height > self._height:
      self._peak, self._height = step, height

  def came_down(self) -> bool:
    lately = float(np.median(self.logs[-2 * SPIKE_GAP:])) - self._middle
    return lately < self._height / 2

  def spike(self) -> Spike:
    return Spike(
        self._onset, self._peak, self._end, math.exp(self._height)
    )


def spikes(steps: np.ndarray, values: np.ndarray) -> list[Spike]:
  """Finds stretches of a gradient that are far above what was before.

  The first 2 MIN_HISTORY values are never in one.

  Args:
    steps: int [n], of the values; need not be even.
    values: [n], at least 0.
  """
  finder = SpikeFinder()
  for step, value in zip(steps.tolist(), values.tolist(), strict=True):
    finder.see(step, value)
  # A run may end in a spike because it diverged.
  return finder.ended + ([finder.current] if finder.current else [])


def dips(
    steps: np.ndarray, values: np.ndarray, min_depth: float = DIP_DEPTH,
    sigmas: float = DIP_SIGMAS,
) -> list[Dip]:
  """Finds falls from the best level so far, each up to its recovery.

  A curve that never comes back, however slowly it falls, has one dip without
  an end.

  Args:
    steps: int [n], of the values; need not be even.
    values: [n]; the higher the better.
    min_depth: smaller ones are noise, whatever the curve looks like.
    sigmas: smaller ones, in standard deviations of the curve's noise, are too.
  """
  if len(values) < 3:
    return []
  # Second differences are 0 on any slope, up or down; sqrt(6) is the length
  # of (1, -2, 1).
  bends = np.diff(values, 2) / math.sqrt(6)
  least = max(min_depth, sigmas * noise_bound(bends))
  found = []
  best = low = 0
  for i, value in enumerate(values):
    low = i if value < values[low] else low
    depth = values[best] - values[low]
    if depth > least and _is_back(
        values[i:], values[best] - (1 - RECOVERED) * depth
    ):
      found.append(_dip(steps, values, best, low, i))
      best = low = i
    elif value >= values[best] and depth <= least:
      best = low = i
  if values[best] - values[low] > least:
    found.append(_dip(steps, values, best, low, None))
  return found


def _is_back(values: np.ndarray, level: float) -> bool:
  """Returns whether a curve is at a level, and not for a moment alone."""
  return values[0] >= level and np.median(values[:LASTING]) >= level


def _dip(
    steps: np.ndarray, values: np.ndarray, best: int, low: int, end: int | None
) -> Dip:
  depth = float(values[best] - values[low])
  # The best value may be long before the fall, on a noisy plateau; after the
  # fall the curve may come near it for a moment.
  level = values[best] - (1 - RECOVERED) * depth
  start = max(
      i for i in range(best, low) if i == best or values[i] >= level
      and np.median(values[max(best, i + 1 - LASTING):i + 1]) >= level
  )
  return Dip(
      int(steps[start]), int(steps[low]),
      None if end is None else int(steps[end]), depth,
  )


def together(
    by_layer: Mapping[str, Sequence[Spike]], max_lag: int = MAX_LAG
) -> list[dict[str, int]]:
  """Groups the spikes of all layers that are one event, in order.

  Args:
    by_layer: the spikes of each layer.
    max_lag: spikes that begin within so many steps of the earliest are one
      event.

  Returns:
    Of each event, where each layer that takes part begins to spike.
  """
  events, start = [], -math.inf
  for step, layer in sorted(
      (spike.onset, layer) for layer, those in by_layer.items()
      for spike in those
  ):
    if step - start > max_lag:
      events.append({})
      start = step
    events[-1].setdefault(layer, step)
  return events


def lead(
    by_layer: Mapping[str, Sequence[Spike]], max_lag: int = MAX_LAG
) -> Lead:
  """Returns which layer spikes first, and how long the others take.

  Args:
    by_layer, max_lag: see `together`.
  """
  events = [
      (min(event.values()), event) for event in together(by_layer, max_lag)
      if len(event) > 1
  ]
  led = {layer: 0 for layer in by_layer}
  for start, event in events:
    first = [layer for layer, step in event.items() if step == start]
    if len(first) == 1:  # Several at the same step: nobody leads.
      led[first[0]] += 1
  leader = max(led, key=lambda layer: led[layer], default=None)
  if leader is None or 2 * led[leader] <= len(events):
    leader = None
  lags = {}
  for start, event in events:
    if leader is None or leader in event:
      origin = start if leader is None else event[leader]
      for layer, step in event.items():
        if layer != leader:
          lags.setdefault(layer, []).append(step - origin)
  return Lead(
      leader, {layer: float(np.median(those)) for layer, those in lags.items()},
      len(events), 0 if leader is None else led[leader],
  )
