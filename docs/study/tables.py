"""Counts what happened in kept runs: the tables of docs/study.md.

  python docs/study/tables.py docs/study/rates

prints a line for each setting, that is for all runs that differ in their seed
alone. Events are those of mocov3_jax/training/events.py. The lowest layer is
the lowest that learns. What shuffling gives, as a mean and for 95 in 100
shuffles, is how many events would begin there if the layers' spikes, each as
many and as far apart, had nothing to do with each other.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import csv
import json
import lzma
import pathlib
import statistics
import sys

from etils import epath
import numpy as np

from mocov3_jax.runs import history
from mocov3_jax.training import events, stability

SHUFFLES = 1000
GRADIENTS = 'grad_max/'
LAST = 'last_block'
HEAD = (
    'setting', 'runs', 'kNN at the end', 'dips', 'falls', 'events',
    'of several layers', 'lowest layer first', 'by shuffling', 'first are',
    'steps to the last block',
)


def read(path: pathlib.Path) -> history.Run:
  """Reads a file of `keep.py`; the rows of the run are one a step."""
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
  """Yields the runs of each setting, with what tells it from the others."""
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
  """Returns the spikes of each layer, shifted round the run by its own lag.

  How many a layer has, and how they lie to each other, stays as it is.
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


def lowest(run: history.Run) -> str:
  """Returns the lowest layer that learns: the first with a gradient."""
  return next(
      name.removeprefix(GRADIENTS) for name, value in run.rows[0].items()
      if name.startswith(GRADIENTS) and value
  )


def first(event: dict[str, int]) -> list[str]:
  """Returns the layers in which an event begins, at the same step."""
  return sorted(x for x, step in event.items() if step == min(event.values()))


def line(name: str, runs: Sequence[history.Run]) -> list[str]:
  """Returns the cells of HEAD for the runs of a setting."""
  found = [stability.analyse(run.rows) for run in runs]
  bottom = lowest(runs[0])
  those = [event for one in found for event in joint(one.spikes)]
  rng = np.random.default_rng(0)
  by_chance = [
      sum(
          bottom in first(event)
          for one, run in zip(found, runs, strict=True)
          for event in joint(shuffled(one.spikes, len(run.rows), rng))
      )
      for _ in range(SHUFFLES if those else 0)
  ]
  knn = [
      100 * [row['knn/top1'] for row in run.rows if 'knn/top1' in row][-1]
      for run in runs
  ]
  spread = f' ± {statistics.stdev(knn):.1f}' if len(knn) > 1 else ''
  lags = [e[LAST] - e[bottom] for e in those if {LAST, bottom} <= e.keys()]
  begun = collections.Counter(' + '.join(first(event)) for event in those)
  return [
      name, str(len(runs)), f'{statistics.mean(knn):.1f}{spread}',
      str(sum(len(one.dips) for one in found)),
      str(sum(one.fall is not None for one in found)),
      str(sum(len(events.together(one.spikes)) for one in found)),
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


def show(
    folders: Sequence[str], head: Sequence[str],
    cells: Callable[[str, Sequence[history.Run]], Sequence[str]],
) -> None:
  """Prints a table of all runs in some folders, a line for each setting.

  Args:
    folders: folders of kept runs.
    head: names of the columns.
    cells: (setting, its runs) -> the cells of its line.
  """
  print_head(head)
  for name, those in settings(kept(folders)):
    print_row(cells(name, those))


def main(*folders: str) -> None:
  """Prints the table of all runs in some folders."""
  show(folders, HEAD, line)


if __name__ == '__main__':
  main(*sys.argv[1:])
