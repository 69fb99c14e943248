"""Measures what happens just before the loss rises, in runs saved by keep.py.

  python docs/study/lead.py docs/study/rates

prints two lines per setting, that is, for all runs that differ only in their
seed: for all rises of the loss, and for large ones. A rise is detected from the
losses before it. The loss of a step is that of the network after the update of
the previous step. For each layer, a line shows the gradient of the previous
step divided by its median from 140 to 40 steps before the rise: the median of
this ratio over all rises, and the bound below which that median stays for 97.5
of 100 sets of random steps. It shows the same for the gradient two steps before
and for RMS_t, which compares the gradient with AdamW's second moment (Wortsman
et al. 2023, arXiv 2304.13013). Nothing here depends on what counts as a spike.
If a run falls below the random network for good, its steps after that are left
out. The last columns show the highest RMS_t of any layer in the first 20 steps
of each large rise, and from there up to 300 steps after its start.
"""

import collections
from collections.abc import Mapping, Sequence
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
# Rises are counted by how far the loss rises within RISING steps; one of more
# than LARGE is large. DURING and AFTER count steps from its start.
SIZES, RISING, LARGE = (0.5, 1.0, 1.5), 50, 1.0
DURING, AFTER = (0, 19), (20, 300)
HEAD = (
    'setting', 'runs', 'steps', 'rises',
    *(f'above {size:g}' for size in SIZES), 'gradient before', 'by chance',
    'highest in', 'two steps before', 'RMS_t before', 'by chance', 'highest in',
    'RMS_t itself', 'highest in each large rise', 'after each',
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


def heights(
    curve: np.ndarray, at: Sequence[int], lag: int = -1
) -> np.ndarray:
  """Returns `aligned` for one step beside each of some steps, [m]."""
  return aligned(curve, at, np.array([lag]))[:, 0]


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


Rising = Sequence[Sequence[int]]


def of_rises(
    of_runs: Sequence[Curves], rising: Rising, prefix: str, lag: int = -1
) -> dict[str, np.ndarray]:
  """Returns the height of each layer's curve beside every rise, by layer."""
  return {
      name.removeprefix(prefix): np.concatenate([
          heights(of_run[name], at, lag)
          for of_run, at in zip(of_runs, rising, strict=True)
      ]) for name in of_runs[0] if name.startswith(prefix)
  }


def medians(found: Mapping[str, np.ndarray]) -> str:
  """Returns the median of each layer; values are logarithms."""
  return ', '.join(f'{x} {np.exp(np.median(v)):.1f}' for x, v in found.items())


def level(
    of_runs: Sequence[Curves], rising: Rising, prefix: str
) -> list[str]:
  """Returns the first three cells of HEAD for the gradients or for RMS_t."""
  found = of_rises(of_runs, rising, prefix)
  chance = max(
      by_chance([of_run[prefix + x] for of_run in of_runs], [*map(len, rising)])
      for x in found
  )
  names = [*found]
  highest = collections.Counter(
      names[i] for i in np.argmax([*found.values()], 0)
  )
  return [
      medians(found), f'{np.exp(chance):.1f}',
      ', '.join(f'{x} {n}' for x, n in highest.most_common(3)),
  ]


def beside(of_runs: Sequence[Curves], rising: Rising) -> list[str]:
  """Returns the cells of HEAD from 'gradient before' to 'RMS_t itself'."""
  gradients, updates = LEVELS
  if not any(map(len, rising)):
    return [''] * 8
  cells = [
      *level(of_runs, rising, gradients),
      medians(of_rises(of_runs, rising, gradients, -2)),
  ]
  logged = [x for x in of_runs[0] if x.startswith(updates)]
  if not logged:
    return [*cells, *[''] * 4]
  itself = {
      name.removeprefix(updates): np.concatenate([
          of_run[name][np.asarray(at, int) - 1]
          for of_run, at in zip(of_runs, rising, strict=True)
      ]) for name in logged
  }
  return [*cells, *level(of_runs, rising, updates), medians(itself)]


def size(run: history.Run, step: int) -> float:
  """Returns how far the loss of a run rises from a step on."""
  _, loss = stability.series(run.rows, 'train/loss')
  usual = np.median(loss[step - events.WINDOW:step])
  return float(loss[step:step + RISING].max() - usual)


def highest_updates(
    runs: Sequence[history.Run], rising: Rising, steps: tuple[int, int]
) -> str:
  """Returns the highest RMS_t of any layer in some steps from each rise."""
  return ', '.join(f'{value:.1f}' for value in sorted(
      tables.highest_update(
          tables.between(run, step + steps[0], step + steps[1])
      ) for run, at in zip(runs, rising, strict=True) for step in at
  ))


def lines(name: str, runs: Sequence[history.Run]) -> list[list[str]]:
  """Returns the cells of HEAD for all rises of a setting and for large ones."""
  alive = [tables.lived(run) for run in runs]
  of_runs = [curves(run) for run in alive]
  rising = [risen(run) for run in alive]
  sizes = [
      [size(run, step) for step in at]
      for run, at in zip(runs, rising, strict=True)
  ]
  large = [
      [step for step, x in zip(at, those, strict=True) if x > LARGE]
      for at, those in zip(rising, sizes, strict=True)
  ]
  first = [str(len(runs)), str(sum(len(run.rows) for run in alive))]
  return [
      [
          name, *first, str(sum(map(len, rising))),
          *(str(sum(x > y for those in sizes for x in those)) for y in SIZES),
          *beside(of_runs, rising), '', '',
      ],
      [
          f'{name}: large rises', *first, str(sum(map(len, large))),
          *[''] * len(SIZES), *beside(of_runs, large),
          *(highest_updates(runs, large, x) for x in (DURING, AFTER)),
      ],
  ]


def main(*folders: str) -> None:
  """Prints the table of all runs in the given folders."""
  tables.print_head(HEAD)
  for name, runs in tables.settings(tables.kept(folders)):
    for cells in lines(name, runs):
      tables.print_row(cells)


if __name__ == '__main__':
  main(*sys.argv[1:])
