"""Counts what comes before the loss rises, in kept runs.

  python docs/study/lead.py docs/study/rates

prints a line for each setting, that is for all runs that differ in their seed
alone. A rise is told by the losses before it. What may come before is, in the
lowest layer that learns, a gradient spike (mocov3_jax/training/events.py), or
RMS_t, the update before the learning rate, above a limit (Wortsman et al.
2023, arXiv 2304.13013; the limit is ours). What shuffling gives is how many
rises would have it before them by chance: as a mean over shifts of the one
against the other. Of a run that falls below the random network for good, what
comes after that is left out.
"""

from collections.abc import Sequence
import dataclasses
import statistics
import sys

import numpy as np
import tables

from mocov3_jax.runs import history
from mocov3_jax.training import events, stability

# A loss this many standard deviations above the median of the WINDOW before is
# a rise; within APART steps of another, it is the same one.
SIGMAS, APART = 4.0, 10
# RMS_t is 1 if the second moment is that of the gradients now.
HIGH = 2.0
# Most steps from what comes before to the rise.
MOST = 20
HEAD = (
    'setting', 'runs', 'rises', 'lowest layer', 'after its spike',
    'by shuffling', 'steps from it', f'after RMS_t > {HIGH:g}',
    'by shuffling', 'steps from it', 'RMS_t: median, 99.9 %',
)


def rises(steps: np.ndarray, loss: np.ndarray) -> list[int]:
  """Returns the steps at which the loss begins to leave its own past.

  Args:
    steps: int [n].
    loss: [n].
  """
  found, last = [], -np.inf
  for place in range(events.WINDOW, len(loss)):
    past = loss[place - events.WINDOW:place]
    middle = np.median(past)
    if loss[place] > middle + SIGMAS * events.noise_bound(past - middle):
      if steps[place] - last > APART:
        found.append(int(steps[place]))
      last = steps[place]
  return found


def lived(run: history.Run) -> history.Run:
  """Returns a run up to its last kNN not below that of the random network."""
  steps, knn = stability.series(run.rows, 'knn/top1')
  last = steps[knn >= knn[0]][-1]
  return dataclasses.replace(
      run, rows=[row for row in run.rows if row['step'] <= last]
  )


def lags(causes: Sequence[int], effects: Sequence[int]) -> list[int]:
  """Returns the steps to each effect from the first cause shortly before it.

  Effects without one are left out.
  """
  causes = np.asarray(causes, int)
  found = []
  for effect in effects:
    near = causes[(causes <= effect) & (causes >= effect - MOST)]
    if near.size:
      found.append(effect - int(near.min()))
  return found


def shuffled(
    causes: Sequence[Sequence[int]], effects: Sequence[Sequence[int]],
    lengths: Sequence[int],
) -> float:
  """Returns how many effects have a cause before them by chance: a mean.

  Args:
    causes, effects: steps, for each run.
    lengths: steps of each run.
  """
  rng = np.random.default_rng(0)
  return np.mean([
      sum(
          len(lags((np.asarray(those, int) + rng.integers(n)) % n, its))
          for those, its, n in zip(causes, effects, lengths, strict=True)
      ) for _ in range(tables.SHUFFLES)
  ])


def line(name: str, runs: Sequence[history.Run]) -> list[str]:
  """Returns the cells of HEAD for the runs of a setting."""
  runs = [lived(run) for run in runs]
  bottom = tables.lowest(runs[0])
  rising = [rises(*stability.series(run.rows, 'train/loss')) for run in runs]
  gradients = [
      stability.series(run.rows, f'grad_max/{bottom}') for run in runs
  ]
  spiking = [[x.onset for x in events.spikes(*of_run)] for of_run in gradients]
  updates = [
      stability.series(run.rows, f'update_rms/{bottom}') for run in runs
  ]
  high = [steps[values > HIGH] for steps, values in updates]
  lengths = [run.rows[-1]['step'] + 1 for run in runs]
  cells = [name, str(len(runs)), str(sum(map(len, rising))), bottom]
  for causes in spiking, high:
    found = [lag for pair in zip(causes, rising, strict=True)
             for lag in lags(*pair)]
    cells += [
        str(len(found)), f'{shuffled(causes, rising, lengths):.1f}',
        f'{statistics.median(found):g}' if found else '',
    ]
  values = np.concatenate([values for _, values in updates])
  usual = np.quantile(values, (0.5, 0.999)) if values.size else ()
  return [*cells, ', '.join(f'{x:.2f}' for x in usual)]


def main(*folders: str) -> None:
  """Prints the table of all runs in some folders."""
  tables.show(folders, HEAD, line)


if __name__ == '__main__':
  main(*sys.argv[1:])
