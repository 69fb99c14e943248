"""Measures what happens just before the loss rises, in runs saved by keep.py.

  python docs/study/lead.py docs/study/rates

prints one line per setting, that is, for all runs that differ only in their
seed. A rise of the loss is detected from the losses before it. The loss of a
step is that of the network after the update of the previous step. For each
layer, the line shows the gradient of the previous step divided by its median
from 140 to 40 steps before the rise: the median of this ratio over all rises,
and the bound below which that median stays for 97.5 of 100 sets of random
steps. It shows the same for RMS_t, the update before the learning rate is
applied (Wortsman et al. 2023, arXiv 2304.13013). Nothing here depends on what
counts as a spike. If a run falls below the random network for good, its steps
after that are left out. The last column shows what follows a large rise: the
highest RMS_t of any layer from 20 to 300 steps after its start.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import sys

import numpy as np
import tables

from mocov3_jax.runs import history
from mocov3_jax.training import events, stability

# A loss this many standard deviations above the median of the WINDOW losses
# before it is a rise; one within APART steps of another belongs to it.
SIGMAS, APART = 4.0, 10
PAST = np.arange(-140, -40)  # Steps from a rise.
LEVELS = tables.GRADIENTS, tables.UPDATES
# A loss that rises by more than LARGE within RISING steps is a large rise. What
# follows is measured from AFTER[0] to AFTER[1] steps after its start.
LARGE, RISING, AFTER = 1.0, 50, (20, 300)
HEAD = (
    'setting', 'runs', 'rises', 'gradient before', 'by chance', 'highest in',
    'RMS_t before', 'by chance', 'highest in', 'large rises',
    'highest RMS_t after each',
)

Curves = Mapping[str, np.ndarray]


def rises(loss: np.ndarray) -> list[int]:
  """Returns the steps at which the loss begins to rise above its past values.

  Args:
    loss: [n], the loss of each step.
  """
  found, last = [], -np.inf
  for step in range(events.WINDOW, len(loss)):
    past = loss[step - events.WINDOW:step]
    middle = np.median(past)
    if loss[step] > middle + SIGMAS * events.noise_bound(past - middle):
      if step - last > APART:
        found.append(step)
      last = step
  return found


def between(run: history.Run, first: int, last: int) -> history.Run:
  """Returns a run with only the rows of the steps from `first` to `last`."""
  return dataclasses.replace(
      run, rows=[row for row in run.rows if first <= row['step'] <= last]
  )


def lived(run: history.Run) -> history.Run:
  """Returns a run, cut after its last kNN at or above the random network's."""
  steps, knn = stability.series(run.rows, 'knn/top1')
  return between(run, 0, steps[knn >= knn[0]][-1])


def risen(run: history.Run) -> list[int]:
  """Returns the rises of a run's loss that have enough steps before them."""
  _, loss = stability.series(run.rows, 'train/loss')
  return [step for step in rises(loss) if step >= -PAST[0]]


def curves(run: history.Run) -> dict[str, np.ndarray]:
  """Returns the logarithms of the gradients and RMS_t per step, by metric.

  Layers that do not learn are left out.
  """
  every = stability.all_series(run.rows)
  return {
      name: np.log(values) for name, (_, values) in every.items()
      if name.startswith(LEVELS) and values.min() > 0
  }


def aligned(
    curve: np.ndarray, at: Sequence[int], lags: np.ndarray
) -> np.ndarray:
  """Returns a curve around some steps, relative to its median before them.

  Args:
    curve: [n], logarithms.
    at: [m], steps; at least 140.
    lags: [k], offsets from these steps; past the end, the last value is used.

  Returns:
    [m, k], logarithms of the ratios.
  """
  at = np.asarray(at, int)[:, None]
  last = len(curve) - 1
  past = np.median(curve[at + PAST], 1, keepdims=True)
  return curve[np.minimum(at + lags, last)] - past


def heights(curve: np.ndarray, at: Sequence[int]) -> np.ndarray:
  """Returns `aligned` for the step before each of some steps, [m]."""
  return aligned(curve, at, np.array([-1]))[:, 0]


def by_chance(
    of_runs: Sequence[np.ndarray], counts: Sequence[int]
) -> float:
  """Returns the 97.5 % quantile of the median height before random steps.

  Args:
    of_runs: the curve of each run, logarithms.
    counts: how many random steps to draw in each run.
  """
  rng = np.random.default_rng(0)
  return np.quantile([
      np.median(np.concatenate([
          heights(curve, rng.integers(-PAST[0], len(curve), count))
          for curve, count in zip(of_runs, counts, strict=True)
      ])) for _ in range(tables.SHUFFLES)
  ], 0.975)


def level(
    of_runs: Sequence[Curves], rising: Sequence[Sequence[int]], prefix: str
) -> list[str]:
  """Returns the cells of HEAD for the gradients or for RMS_t."""
  metrics = [x for x in of_runs[0] if x.startswith(prefix)]
  found = {
      name.removeprefix(prefix): np.concatenate([
          heights(of_run[name], at)
          for of_run, at in zip(of_runs, rising, strict=True)
      ]) for name in metrics
  }
  if not found or not any(map(len, rising)):
    return [''] * 3
  chance = max(
      by_chance([of_run[x] for of_run in of_runs], [*map(len, rising)])
      for x in metrics
  )
  names = [*found]
  highest = collections.Counter(
      names[i] for i in np.argmax([*found.values()], 0)
  )
  return [
      ', '.join(f'{x} {np.exp(np.median(v)):.1f}' for x, v in found.items()),
      f'{np.exp(chance):.1f}',
      ', '.join(f'{x} {n}' for x, n in highest.most_common(3)),
  ]


def large(run: history.Run, at: Sequence[int]) -> list[int]:
  """Returns those rises of a run in which the loss rises by more than LARGE.

  Args:
    run: a run with a loss in every step.
    at: the steps at which the loss begins to rise.
  """
  _, loss = stability.series(run.rows, 'train/loss')
  return [
      step for step in at if loss[step:step + RISING].max() > LARGE + np.median(
          loss[step - events.WINDOW:step]
      )
  ]


def line(name: str, runs: Sequence[history.Run]) -> list[str]:
  """Returns the cells of HEAD for the runs of a setting."""
  whole, runs = runs, [lived(run) for run in runs]
  rising = [risen(run) for run in runs]
  of_runs = [curves(run) for run in runs]
  later = [
      tables.highest_update(between(run, step + AFTER[0], step + AFTER[1]))
      for run, at in zip(whole, rising, strict=True) for step in large(run, at)
  ]
  return [
      name, str(len(runs)), str(sum(map(len, rising))),
      *(cell for x in LEVELS for cell in level(of_runs, rising, x)),
      str(len(later)), ', '.join(f'{value:.1f}' for value in sorted(later)),
  ]


def main(*folders: str) -> None:
  """Prints the table of all runs in the given folders."""
  tables.show(folders, HEAD, line)


if __name__ == '__main__':
  main(*sys.argv[1:])
