"""Finds events in curves: gradient spikes, kNN dips, which layer spikes first.

See the paper's section 4. Sizes are relative to the curve's own noise. Medians
measure that noise, so that the event itself does not count as noise.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

# How many logged values before a spike define what is normal. The window is
# short compared with the schedule, and long compared with a spike (tens of
# steps in paper Fig. 4).
WINDOW = 100
# Fewer values than this do not define what is normal. The same number is
# skipped at the start of a run, where gradients shrink fast.
MIN_HISTORY = 20
# A spike reaches SPIKE_RATIO times the median before it. (In paper Fig. 4,
# that of the first layer reaches 8, read off the figure.) Real spikes flicker,
# so one may also begin with two smaller values within SPIKE_GAP. Values of the
# window count as at most PAIR_RATIO times the median.
SPIKE_RATIO, PAIR_RATIO = 5.0, 3.0
# The first value of a spike is also SPIKE_SIGMAS standard deviations of the log
# above the median, which one normal value in a thousand is; each of two smaller
# values, PAIR_SIGMAS. The tails of the noise differ from layer to layer, so
# these values must also exceed the whole window; a single one by a factor of
# ABOVE_ALL.
SPIKE_SIGMAS, PAIR_SIGMAS = 3.1, 3.0
ABOVE_ALL = 1.5
# A spike ends after SPIKE_GAP consecutive values below LASTING_RATIO times the
# median or below LASTING_SIGMAS standard deviations.
LASTING_RATIO, LASTING_SIGMAS = 2.0, 2.0
SPIKE_GAP = 5
# After this many values, a stretch is a new level and no spike, unless its log
# height has fallen by half.
LONGEST = 50
# Most steps between the spikes of two layers in one event: twice the 20 to 25
# of the paper's Fig. 4.
MAX_LAG = 50

# The binomial standard error of kNN accuracy on some hundreds of images is 0.01
# to 0.02. The dips in the paper's Figs. 1 to 6 are 0.03 to 0.25 deep.
DIP_DEPTH = 0.03
# Of a hundred noisy values, the highest is 2.5 standard deviations above the
# mean and the lowest 2.5 below. So 5 can be noise; the other 2 are a margin.
DIP_SIGMAS = 7.0
# A dip is over once the curve has recovered this share of the fall. All of it
# would be too much, since the level before is the highest of many noisy values.
# Most of the next LASTING evaluations must have recovered, too, since a curve
# that has crashed may come near that level for a moment.
RECOVERED, LASTING = 0.75, 5


class Spike(NamedTuple):
  """A stretch of steps in which a gradient is far above what it was before.

  Attributes:
    onset: the first step.
    peak: the step of the highest value.
    end: the last step.
    ratio: the highest value divided by the median before the onset.
  """

  onset: int
  peak: int
  end: int
  ratio: float


@dataclasses.dataclass(frozen=True)
class Dip:
  """A fall of a curve from its best level, and its recovery if there is one.

  Attributes:
    start: the last step near the level before the fall.
    low: the step of the lowest value.
    end: the first step back near that level; None if it never recovers.
    depth: the depth of the fall, in the unit of the curve.
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
  """The layer in which spikes begin (paper Fig. 4).

  Attributes:
    first: the layer that spikes first in more than half of the events; None if
      there is none.
    lags: median number of steps from the spike of `first` to that of each other
      layer. If `first` is None, from the start of the event to each layer.
    events: number of events, which are groups of spikes of at least two layers.
    led: number of events in which `first` was first.
  """

  first: str | None
  lags: dict[str, float]
  events: int
  led: int


def noise_bound(deviations: np.ndarray) -> float:
  """Returns an upper bound on the standard deviation of [n] numbers around 0.

  For normal numbers, 1.4826 times the median absolute value estimates it. The
  relative standard error of that estimate is 1.16 / sqrt(n); two of them are
  added.
  """
  sigma = 1.4826 * float(np.median(np.abs(deviations)))
  return sigma * (1 + 2 * 1.16 / math.sqrt(len(deviations)))


class SpikeFinder:
  """Finds the spikes of one curve, value by value.

  Each value is compared only with earlier ones. Later values are not known
  while a run goes on, and may be at another level after a real spike.
  """

  def __init__(self):
    self._past = np.zeros(WINDOW)  # A ring of logs, without spikes.
    self._places = self._count = 0  # Values added to the ring, and now in it.
    self._high = collections.deque(maxlen=2)  # Candidates: place, step, height.
    self._place = -1  # Index of the last value; zeros (frozen) do not count.
    self._begun: _Begun | None = None
    # Values up to `_usual` are accepted as normal until `_places` is `_until`.
    self._usual, self._until = -math.inf, 0
    self.ended: list[Spike] = []

  @property
  def current(self) -> Spike | None:
    """The spike that has not ended, as far as it is known; else None."""
    return self._begun.spike() if self._begun and self._begun.sure else None

  def update(self, step: int, value: float) -> Spike | None:
    """Takes in the next value of the curve.

    Args:
      step: the step of the value.
      value: at least 0; 0 for a frozen layer.

    Returns:
      The spike, if this value makes it certain that there is one; else None.
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
    # Earlier high values must not raise the bar for later ones.
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
      self._remember(min(log, highest))
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
    spike.update(self._place, step, log)
    over = self._place - spike.last >= SPIKE_GAP
    long = self._place - spike.first >= LONGEST
    if not over and not long:
      return self.current if not before else None
    if spike.sure and (over or spike.came_down()):
      self.ended.append(spike.spike())
    # The values of a spike do not count as normal; those of a new level do.
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

  def update(self, place: int, step: int, log: float) -> None:
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
  """Finds the stretches in which a gradient is far above what it was before.

  The first 2 * MIN_HISTORY values never belong to one.

  Args:
    steps: int [n], the steps of the values; need not be evenly spaced.
    values: [n], at least 0.
  """
  finder = SpikeFinder()
  for step, value in zip(steps.tolist(), values.tolist(), strict=True):
    finder.update(step, value)
  # A run that diverges may end within a spike.
  return finder.ended + ([finder.current] if finder.current else [])


def dips(
    steps: np.ndarray, values: np.ndarray, min_depth: float = DIP_DEPTH,
    sigmas: float = DIP_SIGMAS,
) -> list[Dip]:
  """Finds falls from the best level so far, each up to its recovery.

  A curve that falls and never recovers, however slowly it falls, has one dip
  without an end.

  Args:
    steps: int [n], the steps of the values; need not be evenly spaced.
    values: [n]; higher is better.
    min_depth: smaller falls are ignored.
    sigmas: falls of fewer standard deviations of the curve's noise are ignored.
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
  """Returns whether a curve has reached a level for more than a moment."""
  return values[0] >= level and np.median(values[:LASTING]) >= level


def _dip(
    steps: np.ndarray, values: np.ndarray, best: int, low: int, end: int | None
) -> Dip:
  depth = float(values[best] - values[low])
  # The best value may be long before the fall, on a noisy plateau. During the
  # fall, the curve may come near it again for a moment.
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
  """Groups the spikes of all layers into events, in order.

  Args:
    by_layer: the spikes of each layer.
    max_lag: spikes that begin within this many steps of the earliest one belong
      to the same event.

  Returns:
    One dict per event: the step at which each layer in it begins to spike.
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
    if len(first) == 1:  # If several tie, none leads.
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
