"""Events of a curve: spikes of gradients, dips of kNN, who spiked first.

See the paper's section 4. Sizes are relative to the curve's own noise, which
is measured with medians, so that the event itself does not count as noise.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

# A spike is this many times the median around it: those of the paper's Fig. 4
# are 8 in the first layer and 4.5 in the last, read off the figure.
SPIKE_RATIO = 3.0
# And this many standard deviations of the log. With the margin of `noise_bound`
# fewer than one in a million values of normal noise come so far.
SPIKE_SIGMAS = 5.0
# Logged values on one side of a spike that make its median. Short against the
# schedule, long against a spike (tens of steps in paper Fig. 4).
WINDOW = 100
# With fewer values than this there is no saying what is normal.
MIN_HISTORY = 20
# Crossings so near each other are one spike: noise on its flank cuts it.
SPIKE_GAP = 5
# Steps from layer to layer: twice the 20 to 25 of the paper's Fig. 4.
MAX_LAG = 50

# kNN of some hundreds of images has a binomial standard error of 0.01 to 0.02,
# and the dips of the paper's Figs. 1 to 6 are of 0.03 to 0.25.
DIP_DEPTH = 0.03
# The highest of a hundred values is 2.5 deviations up, the lowest 2.5 down:
# 5 are no fall at all, and the other 2 make it sure.
DIP_SIGMAS = 7.0
# A dip is over once this share of the fall is made good. Not all: the level
# before is the luckiest of many noisy values.
RECOVERED = 0.75


class Spike(NamedTuple):
  """A gradient far above those around it: its highest step, and how far."""

  step: int
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


def excess(value: float, others: np.ndarray) -> float:
  """Returns how many times the median of `others` [n] a spike is; else 0."""
  # Most steps end here: the median is not asked for if it cannot be exceeded.
  if 2 * np.count_nonzero(others < value / SPIKE_RATIO) <= len(others):
    return 0.0
  others = others[others > 0]  # A layer that was frozen has no level.
  if len(others) < MIN_HISTORY:
    return 0.0
  logs = np.log(others)
  middle = float(np.median(logs))
  height = math.log(value) - middle
  least = max(math.log(SPIKE_RATIO), SPIKE_SIGMAS * noise_bound(logs - middle))
  return math.exp(height) if height > least else 0.0


def spikes(
    steps: np.ndarray, values: np.ndarray, window: int = WINDOW
) -> list[Spike]:
  """Finds gradients that are far above those before and those after.

  Both, because gradients that shrink (the start of training) look high
  against what follows, growing ones against what was before. The first
  MIN_HISTORY values are never spikes; the last are, by what was before alone:
  a run may end there because it diverged.

  Args:
    steps: int [n], of the values; need not be even.
    values: [n], at least 0.
    window: values on each side that make the median.
  """
  found = []  # Lists of (place, ratio), of one spike each.
  for i, value in enumerate(values):
    ratio = excess(value, values[max(0, i - window):i])
    after = values[i + 1:i + 1 + window]
    if ratio and len(after) >= MIN_HISTORY:
      ratio = min(ratio, excess(value, after))
    if ratio and found and i - found[-1][-1][0] <= SPIKE_GAP:
      found[-1].append((i, ratio))
    elif ratio:
      found.append([(i, ratio)])
  tops = [max(spike, key=lambda at: values[at[0]]) for spike in found]
  return [Spike(int(steps[i]), ratio) for i, ratio in tops]


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
    if depth > least and value >= values[best] - (1 - RECOVERED) * depth:
      found.append(_dip(steps, values, best, low, i))
      best = low = i
    elif value >= values[best]:
      best = low = i
  if values[best] - values[low] > least:
    found.append(_dip(steps, values, best, low, None))
  return found


def _dip(
    steps: np.ndarray, values: np.ndarray, best: int, low: int, end: int | None
) -> Dip:
  depth = float(values[best] - values[low])
  # The best value may be long before the fall, on a noisy plateau.
  near = values[best:low] >= values[best] - (1 - RECOVERED) * depth
  start = best + int(np.flatnonzero(near)[-1])
  return Dip(
      int(steps[start]), int(steps[low]),
      None if end is None else int(steps[end]), depth,
  )


def lead(
    by_layer: Mapping[str, Sequence[Spike]], max_lag: int = MAX_LAG
) -> Lead:
  """Returns which layer spikes first, and how long the others take.

  Args:
    by_layer: the spikes of each layer.
    max_lag: spikes within so many steps of the earliest are one event.
  """
  events = []  # (beginning, {layer: its first step in the event})
  for step, layer in sorted(
      (spike.step, layer) for layer, those in by_layer.items()
      for spike in those
  ):
    if not events or step - events[-1][0] > max_lag:
      events.append((step, {}))
    events[-1][1].setdefault(layer, step)
  events = [(start, event) for start, event in events if len(event) > 1]
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
