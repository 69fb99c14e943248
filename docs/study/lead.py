"""Measures what comes before the loss rises, in kept runs.

  python docs/study/lead.py docs/study/rates

prints a line for each setting, that is for all runs that differ in their seed
alone. A rise is told by the losses before it. Its loss is that of the network
after the update of the step before. For each layer the line says how high the
gradient of that step is, over its median from 140 to 40 steps before the rise:
the median over all rises, and how high it is for 97.5 in 100 sets of steps
drawn by chance. It says the same of RMS_t, the update before the learning rate
(Wortsman et al. 2023, arXiv 2304.13013). Nothing here depends on what counts as
a spike. Of a run that falls below the random network for good, what comes after
that is left out.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import sys

import numpy as np
import tables

from mocov3_jax.runs import history
from mocov3_jax.training import events, stability

# A loss this many standard deviations above the median of the WINDOW before is
# a rise; within APART steps of another, it is the same one.
SIGMAS, APART = 4.0, 10
PAST = np.arange(-140, -40)  # Steps from a rise.
LEVELS = tables.GRADIENTS, 'update_rms/'
HEAD = (
    'setting', 'runs', 'rises', 'gradient before', 'by chance', 'highest in',
    'RMS_t before', 'by chance', 'highest in',
)

Curves = Mapping[str, np.ndarray]


def rises(loss: np.ndarray) -> list[int]:
  """Returns the steps at which the loss begins to leave its own past.

  Args:
    loss: [n], of each step.
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


def lived(run: history.Run) -> history.Run:
  """Returns a run up to its last kNN not below that of the random network."""
  steps, knn = stability.series(run.rows, 'knn/top1')
  last = steps[knn >= knn[0]][-1]
  return dataclasses.replace(
      run, rows=[row for row in run.rows if row['step'] <= last]
  )


def risen(run: history.Run) -> list[int]:
  """Returns the steps of a run at which its loss rises, if they have a past."""
  _, loss = stability.series(run.rows, 'train/loss')
  return [step for step in rises(loss) if step >= -PAST[0]]


def curves(run: history.Run) -> dict[str, np.ndarray]:
  """Returns the logs of what may lead a rise, of each step, by metric.

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
  """Returns how high a curve is around some steps, over its past.

  Args:
    curve: [n], logs.
    at: [m] steps, at least 140.
    lags: [k] steps from them; beyond the end of the curve, its last value.

  Returns:
    [m, k], logs of a ratio.
  """
  at = np.asarray(at, int)[:, None]
  last = len(curve) - 1
  past = np.median(curve[at + PAST], 1, keepdims=True)
  return curve[np.minimum(at + lags, last)] - past


def heights(curve: np.ndarray, at: Sequence[int]) -> np.ndarray:
  """Returns how high a curve is one step before some steps: logs, [m]."""
  return aligned(curve, at, np.array([-1]))[:, 0]


def by_chance(
    of_runs: Sequence[np.ndarray], counts: Sequence[int]
) -> float:
  """Returns the bound of the median height before steps drawn by chance.

  Args:
    of_runs: the curve of each run, logs.
    counts: how many steps are drawn in each run.
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


def line(name: str, runs: Sequence[history.Run]) -> list[str]:
  """Returns the cells of HEAD for the runs of a setting."""
  runs = [lived(run) for run in runs]
  rising = [risen(run) for run in runs]
  of_runs = [curves(run) for run in runs]
  return [
      name, str(len(runs)), str(sum(map(len, rising))),
      *(cell for x in LEVELS for cell in level(of_runs, rising, x)),
  ]


def main(*folders: str) -> None:
  """Prints the table of all runs in some folders."""
  tables.show(folders, HEAD, line)


if __name__ == '__main__':
  main(*sys.argv[1:])
