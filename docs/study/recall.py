"""Compares the spikes that are found with those that a person marked by eye.

  python docs/study/recall.py docs/study/marks.csv docs/study/rates

prints one line per run that has marks, and one for all of them. A line of
marks.csv is run,layer,first,last: the name of the run's file, a layer, and the
steps between which a person saw the layer's gradient rise above its past. A run
in which nothing was seen has one line without layer and steps. The layer ?
stands for a stretch in which the person could not tell; such stretches are left
out, and so are the heads, which nobody inspected. Marks are read off plots, to
within about five steps. A mark that reaches five times the median of the
hundred steps before it counts as missed if nothing is found there; smaller ones
may be found or not. Anything found where nothing is marked is a false alarm.
"""

from collections.abc import Sequence
import csv
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import tables

from mocov3_jax.training import events, stability

READ_TO = 5  # Steps to which a mark is read off a plot.
UNCLEAR = '?'
HEADS = 'projector', 'predictor'
HEAD = (
    'run', 'marks', 'reaching 5 times', 'found',
    'known within 5 steps of the start', 'known within 5 steps of 5 times',
    'found in total', 'false alarms', 'per 4,000 steps',
)


class Mark(NamedTuple):
  """A stretch in which a person saw a gradient rise above its past.

  Attributes:
    layer: the layer's name.
    first, last: the first and the last step.
  """

  layer: str
  first: int
  last: int


class Alarm(NamedTuple):
  """A spike that was found, and the step at which it was known."""

  spike: events.Spike
  known: int


def marks(path: pathlib.Path) -> dict[str, list[Mark]]:
  """Returns the marks of each run; none for a run in which nothing is seen."""
  found: dict[str, list[Mark]] = {}
  with path.open() as file:
    for row in csv.DictReader(file):
      of_run = found.setdefault(row['run'], [])
      if row['layer']:
        of_run.append(
            Mark(row['layer'], int(row['first']), int(row['last']))
        )
  return found


def reached(
    steps: np.ndarray, values: np.ndarray, mark: Mark
) -> int | None:
  """Returns the first step of a mark at five times the median before it.

  Returns None if the gradient does not reach that.
  """
  before = values[
      (steps < mark.first) & (steps >= mark.first - events.WINDOW)
  ]
  high = steps[
      (values >= events.SPIKE_RATIO * np.median(before))
      & (steps >= mark.first) & (steps <= mark.last)
  ]
  return int(high[0]) if high.size else None


def alarms(steps: np.ndarray, values: np.ndarray) -> list[Alarm]:
  """Returns a curve's spikes, and when each is known while the run goes on."""
  finder = events.SpikeFinder()
  known = {}
  for step, value in zip(steps.tolist(), values.tolist(), strict=True):
    spike = finder.update(step, value)
    if spike:
      known[spike.onset] = step
  last = [finder.current] if finder.current else []
  return [Alarm(x, known[x.onset]) for x in [*finder.ended, *last]]


def touch(mark: Mark, spike: events.Spike) -> bool:
  """Returns whether a mark and a spike share a step, or almost."""
  return (
      spike.onset <= mark.last + READ_TO and spike.end >= mark.first - READ_TO
  )


def compare(rows: stability.Rows, marked: Sequence[Mark]) -> list[int]:
  """Returns the counts of HEAD, from the marks to the false alarms."""
  large = found = soon = at_once = every = false = 0
  unclear = [x for x in marked if x.layer == UNCLEAR]
  for name, curve in stability.all_series(rows).items():
    layer = name.removeprefix(tables.GRADIENTS)
    if layer == name or layer in HEADS:
      continue
    of_layer = [x for x in marked if x.layer == layer]
    those = [
        alarm for alarm in alarms(*curve)
        if not any(touch(mark, alarm.spike) for mark in unclear)
    ]
    every += len(those)
    false += sum(
        not any(touch(mark, alarm.spike) for mark in of_layer)
        for alarm in those
    )
    for mark in of_layer:
      high = reached(*curve, mark)
      if high is not None:
        known = [x.known for x in those if touch(mark, x.spike)]
        large += 1
        found += bool(known)
        soon += any(step - mark.first <= READ_TO for step in known)
        at_once += any(step - high <= READ_TO for step in known)
  return [
      len(marked) - len(unclear), large, found, soon, at_once, every, false
  ]


def show(name: str, counts: Sequence[int], steps: int) -> None:
  """Prints a line of the table."""
  tables.print_row([
      name, *map(str, counts), f'{4000 * counts[-1] / steps:.1f}'
  ])


def main(path: str, *folders: str) -> None:
  """Prints the table of all runs that have marks."""
  tables.print_head(HEAD)
  counts, steps = [], []
  for name, marked in marks(pathlib.Path(path)).items():
    found = [p for x in folders for p in pathlib.Path(x).glob(f'{name}.*')]
    if not found:
      sys.exit(f'No {name}.csv.xz in {", ".join(folders)}.')
    rows = tables.read(found[0]).rows
    counts.append(compare(rows, marked))
    steps.append(len(rows) - sum(
        x.last - x.first for x in marked if x.layer == UNCLEAR
    ))
    show(name, counts[-1], steps[-1])
  show('all', np.sum(counts, 0).tolist(), sum(steps))


if __name__ == '__main__':
  main(*sys.argv[1:])
