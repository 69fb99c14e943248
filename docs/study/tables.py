"""Counts the events in runs saved by keep.py: the tables of docs/study.md.

  python docs/study/tables.py docs/study/rates

prints one line per setting, that is, for all runs that differ only in their
seed. Events are those of mocov3_jax/training/events.py. The lowest layer is the
lowest one that learns. The column "by shuffling" says how many events would
begin there if the spikes of different layers were unrelated, each layer keeping
the number and the distances of its spikes: the mean over all shuffles, and the
bound that holds in 95 of 100 shuffles. If a run falls below the random network
for good, the events after that are left out.
"""

import collections
from collections.abc import Iterator, Sequence
import csv
import dataclasses
import json
import lzma
import math
import pathlib
import statistics
import sys

from etils import epath
import numpy as np

from mocov3_jax.runs import history
from mocov3_jax.training import events, stability

SHUFFLES = 1000
GRADIENTS, UPDATES = 'grad_max/', 'update_rms/'
LAST = 'last_block'
HEAD = (
    'setting', 'runs', 'kNN at the end', 'of each run',
    'lowest from a tenth on', 'highest RMS_t', 'lowest layer above 1, %',
    'dips', 'falls', 'events', 'of several layers', 'lowest layer first',
    'by shuffling', 'first are', 'steps to the last block',
)


def read(path: pathlib.Path) -> history.Run:
  """Reads a file written by `keep.py`; the run has one row per step."""
  with lzma.open(path, 'rt') as file:
    about = json.loads(file.readline().removeprefix('# '))
    rows = [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(file)
    ]
  return history.Run(
      epath.Path(path), about['config'],
      [row | {'step': int(row['step'])} for row in rows],
      about['status'], about['result'], [],
  )


def kept(folders: Sequence[str]) -> list[history.Run]:
  """Returns all runs that are kept in some folders."""
  return [
      read(path) for folder in folders
      for path in sorted(pathlib.Path(folder).glob('*.csv.xz'))
  ]


def settings(
    runs: Sequence[history.Run]
) -> Iterator[tuple[str, list[history.Run]]]:
  """Yields each setting, as the fields that distinguish it, and its runs."""
  fields = history.differing(history.aligned(runs))
  groups: dict[str, list[history.Run]] = {}
  for number, run in enumerate(runs):
    name = ', '.join(
        f'{field.rpartition(".")[2]} {fields[field][number]}'
        for field in sorted(fields) if field != 'seed'
    )
    groups.setdefault(name, []).append(run)
  yield from sorted(groups.items())


Onsets = dict[str, list[events.Spike]]


def shuffled(by_layer: Onsets, steps: int, rng: np.random.Generator) -> Onsets:
  """Returns the spikes of each layer, rotated around the run by a random lag.

  The number of a layer's spikes and the distances between them do not change.
  """
  return {
      layer: [
          spike._replace(onset=(spike.onset + shift) % steps)
          for spike in those
      ]
      for layer, those in by_layer.items()
      for shift in [int(rng.integers(steps))]
  }


def joint(by_layer: Onsets) -> list[dict[str, int]]:
  """Returns the events of at least two layers."""
  return [e for e in events.together(by_layer) if len(e) > 1]


def between(run: history.Run, first: int, last: int) -> history.Run:
  """Returns a run with only the rows of the steps from `first` to `last`."""
  return dataclasses.replace(
      run, rows=[row for row in run.rows if first <= row['step'] <= last]
  )


def lived(run: history.Run) -> history.Run:
  """Returns a run up to where it falls below the random network for good.

  That is the first kNN after the last one at or above the random network's.
  """
  steps, knn = stability.series(run.rows, 'knn/top1')
  last = np.flatnonzero(knn >= knn[0])[-1]
  return between(run, 0, steps[min(last + 1, len(steps) - 1)])


def lowest(run: history.Run) -> str:
  """Returns the lowest layer that learns: the first with a gradient."""
  return next(
      name.removeprefix(GRADIENTS) for name, value in run.rows[0].items()
      if name.startswith(GRADIENTS) and value
  )


def first(event: dict[str, int]) -> list[str]:
  """Returns the layers in which an event begins, at the same step."""
  return sorted(x for x, step in event.items() if step == min(event.values()))


def end(run: history.Run) -> float:
  """Returns kNN at the end of a run, in percent."""
  return 100 * [row['knn/top1'] for row in run.rows if 'knn/top1' in row][-1]


def lowest_knn(run: history.Run) -> float:
  """Returns the lowest kNN from a tenth of a run on, in percent."""
  steps, knn = stability.series(run.rows, 'knn/top1')
  return 100 * knn[steps >= steps[-1] / 10].min()


def highest_update(run: history.Run) -> float:
  """Returns the highest RMS_t of any layer that was logged; NaN without."""
  logged = stability.all_series(run.rows)
  return max(
      (values.max() for name, (_, values) in logged.items()
       if name.startswith(UPDATES)), default=math.nan,
  )


def above_one(run: history.Run) -> float:
  """Returns in how many of 100 steps the lowest layer's RMS_t is above 1.

  Returns NaN if it was not logged.
  """
  _, values = stability.series(run.rows, UPDATES + lowest(run))
  return 100 * float(np.mean(values > 1)) if len(values) else math.nan


def spread(values: Sequence[float]) -> str:
  """Returns the mean and, of several values, their standard deviation."""
  deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.1f}{deviation}'


def line(name: str, runs: Sequence[history.Run]) -> list[str]:
  """Returns the cells of HEAD for the runs of a setting."""
  found = [stability.analyse(run.rows) for run in runs]
  alive = [lived(run) for run in runs]
  spikes = [stability.analyse(run.rows).spikes for run in alive]
  bottom = lowest(runs[0])
  those = [event for one in spikes for event in joint(one)]
  rng = np.random.default_rng(0)
  by_chance = [
      sum(
          bottom in first(event)
          for one, run in zip(spikes, alive, strict=True)
          for event in joint(shuffled(one, len(run.rows), rng))
      )
      for _ in range(SHUFFLES if those else 0)
  ]
  lags = [e[LAST] - e[bottom] for e in those if {LAST, bottom} <= e.keys()]
  begun = collections.Counter(' + '.join(first(event)) for event in those)
  return [
      name, str(len(runs)), spread([*map(end, runs)]),
      *(
          ', '.join(f'{of(run):.1f}' for run in runs)
          for of in (end, lowest_knn, highest_update, above_one)
      ),
      str(sum(len(one.dips) for one in found)),
      str(sum(one.fall is not None for one in found)),
      str(sum(len(events.together(one)) for one in spikes)),
      str(len(those)),
      str(sum(bottom in first(event) for event in those)),
      f'{np.mean(by_chance):.1f}, at most {np.quantile(by_chance, 0.95):.0f}'
      if by_chance else '',
      ', '.join(f'{layers} {n}' for layers, n in begun.most_common(3)),
      f'{statistics.median(lags):g}' if lags else '',
  ]


def print_row(cells: Sequence[str]) -> None:
  """Prints a line of a table."""
  print(f'| {" | ".join(cells)} |')


def print_head(names: Sequence[str]) -> None:
  """Prints the first two lines of a table."""
  print_row(names)
  print(f'|{"---|" * len(names)}')


def main(*folders: str) -> None:
  """Prints the table of all runs in the given folders."""
  print_head(HEAD)
  for name, runs in settings(kept(folders)):
    print_row(line(name, runs))


if __name__ == '__main__':
  main(*sys.argv[1:])
