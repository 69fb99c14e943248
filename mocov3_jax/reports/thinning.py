"""Thins, smooths and rescales the curves of a run."""

from collections.abc import Sequence

import numpy as np

from mocov3_jax.training import events

Curve = tuple[np.ndarray, np.ndarray]  # Steps [n] and values [n].

# Points of all curves of a page: 1.8 MB of text, so that the page stays below
# 5 MB.
POINTS = 100_000
CURVE_POINTS = 2000
FEWEST_POINTS = 40
# The throughput is smoothed by the median of this many logged values.
SMOOTH = 21


def at(curve: Curve, steps: Sequence[int]) -> list[float]:
  """Returns the values of a curve at some of its steps."""
  return curve[1][np.searchsorted(curve[0], np.asarray(steps, int))].tolist()


def points_per_curve(count: int) -> int:
  """Returns how many points each of `count` curves may have."""
  share = POINTS // max(1, count)
  return min(CURVE_POINTS, max(FEWEST_POINTS, share))


def thin(steps: np.ndarray, values: np.ndarray, limit: int) -> Curve:
  """Returns fewer points of a curve, without losing a spike or a dip.

  Args:
    steps: [n].
    values: [n], finite.
    limit: the most points to keep; at least 4.

  Returns:
    At most `limit` of the points, in order: the first, the last, and the
    lowest and highest of equal parts of the others.
  """
  count = len(values)
  if count <= limit:
    return steps, values
  parts = np.array_split(np.arange(1, count - 1), (limit - 2) // 2)
  kept = {0, count - 1}
  for part in parts:
    kept |= {part[np.argmin(values[part])], part[np.argmax(values[part])]}
  places = np.array(sorted(kept))
  return steps[places], values[places]


def relative(values: np.ndarray, window: int = events.WINDOW) -> np.ndarray:
  """Returns values as multiples of the median around them, as in paper Fig. 4.

  Args:
    values: [n], above 0.
    window: how many values on each side make the median.
  """
  # A running median is smooth, so four values per window are enough.
  places, medians = _medians(values, window, max(1, window // 4))
  return values / np.interp(np.arange(len(values)), places, medians)


def smoothed(steps: np.ndarray, values: np.ndarray) -> Curve:
  """Returns the running median of values [n], over SMOOTH of them.

  It is taken at about CURVE_POINTS places at most, since no peaks have to be
  kept here.
  """
  if len(values) < SMOOTH:
    return steps, values
  every = 1 + len(values) // CURVE_POINTS
  places, medians = _medians(values, SMOOTH // 2, every)
  return steps[places], medians


def _medians(
    values: np.ndarray, window: int, every: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns every `every`-th index, and the median of a window around it."""
  # Mirrored at the ends, so that the first and last windows are full.
  padded = np.pad(values, window, mode='symmetric')
  around = np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1)
  places = np.arange(0, len(values), every)
  return places, np.median(around[places], axis=1)
