"""Draws the kNN curves of every variant of a run, from runs saved by keep.py.

  python docs/study/variants.py docs/images/variants.png \\
      docs/study/rates docs/study/b2 docs/study/blocks docs/study/cures

draws the runs at the highest learning rate, one panel for each setting: those
that end highest first.
"""

import collections
from collections.abc import Sequence
import math
import statistics
import sys

import figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import tables

from mocov3_jax.runs import history

COLUMNS = 4


def title(run: history.Run) -> str:
  """Returns what distinguishes a run from configs/instability.py."""
  config = run.config
  parts = [config[figure.PROJECTION]]
  if config['model.frozen_blocks']:
    parts.append('block 0 frozen')
  if config['optimizer.update_clip']:
    parts.append(f"update_clip {config['optimizer.update_clip']:g}")
  if config['optimizer.b2'] != 0.999:
    parts.append(f"b2 {config['optimizer.b2']:g}")
  return ', '.join(parts)


def panels(
    folders: Sequence[str]
) -> list[tuple[str, list[history.Run]]]:
  """Returns the title and the runs of each panel."""
  runs = tables.kept(folders)
  highest = max(run.config[figure.RATE] for run in runs)
  found = collections.defaultdict(list)
  for run in runs:
    if run.config[figure.RATE] == highest:
      found[title(run)].append(run)
  return sorted(
      found.items(),
      key=lambda panel: statistics.mean(map(tables.end, panel[1])),
      reverse=True,
  )


def main(path: str, *folders: str) -> None:
  """Draws the figure of all runs in the given folders."""
  those = panels(folders)
  rows = math.ceil(len(those) / COLUMNS)
  drawing = Figure(figsize=(12, 2.7 * rows), layout='constrained')
  axes = drawing.subplots(
      rows, COLUMNS, sharex=True, sharey=True, squeeze=False
  )
  for ax, (name, runs) in zip(axes.flat, those, strict=False):
    figure.draw_knn(ax, runs)
    ax.set_title(name, fontsize=10)
    ax.label_outer()
  for ax in axes.flat[len(those):]:
    ax.set_visible(False)
  for row in axes:
    row[0].set_ylabel('kNN accuracy, %')
  FigureCanvasAgg(drawing).print_figure(path, dpi=110)


if __name__ == '__main__':
  main(*sys.argv[1:])
