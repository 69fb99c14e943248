"""Shows up to which learning rate methods such as SimCLR and BYOL are stable.

  python docs/study/edge.py docs/images/edge.png docs/study/simclr \\
      docs/study/byol

prints a table of the final kNN accuracy, one line per method and rate. The
upper row of the figure plots it against the rate. The lower row plots the kNN
curves of all runs at the edge: the lowest rate at which a learned patch
projection ends more than two points below its own best.
"""

import collections
from collections.abc import Mapping, Sequence
import statistics
import sys

from figure import PROJECTION, RATE
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
import tables

from mocov3_jax.runs import history
from mocov3_jax.training import stability

# A mean this many points below the best one is no longer stable.
FALLEN = 2.0
HEAD = (
    'method', 'rate', 'learned', 'below its best', 'frozen', 'below its best',
    'frozen - learned',
)
# (projection, rate) -> its runs.
Runs = Mapping[tuple[str, float], Sequence[history.Run]]
STYLES = {'learned': ('tab:red', '-.'), 'frozen': ('tab:blue', '-')}


def methods(runs: Sequence[history.Run]) -> dict[str, Runs]:
  """Returns the runs of each method, by projection and rate."""
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for run in runs:
    place = run.config[PROJECTION], run.config[RATE]
    found[run.config['objective.name']][place].append(run)
  return found


def ends(runs: Runs, projection: str, rate: float) -> list[float]:
  """Returns kNN at the end of each run of a setting, in percent."""
  return [tables.end(run) for run in runs[projection, rate]]


def below(runs: Runs, projection: str, rate: float) -> float:
  """Returns by how many points the mean at a rate is below the best mean."""
  means = {
      r: statistics.mean(ends(runs, projection, r))
      for x, r in runs if x == projection
  }
  return max(means.values()) - means[rate]


def edge(runs: Runs, rates: Sequence[float]) -> float:
  """Returns the lowest rate at which a learned projection has fallen.

  Args:
    runs: the runs of a method.
    rates: from the lowest up. If it falls at none, the last one is returned.
  """
  fallen = (r for r in rates if below(runs, 'learned', r) > FALLEN)
  return next(fallen, rates[-1])


def gain(runs: Runs, rate: float) -> float:
  """Returns by how many points the frozen projection ends above the learned."""
  return (
      statistics.mean(ends(runs, 'frozen', rate))
      - statistics.mean(ends(runs, 'learned', rate))
  )


def draw_ends(ax: Axes, runs: Runs, rates: Sequence[float]) -> None:
  """Plots the final kNN against the rate: means as lines, runs as dots."""
  for projection, (color, style) in STYLES.items():
    those = [ends(runs, projection, rate) for rate in rates]
    ax.plot(
        rates, [*map(statistics.mean, those)], color=color, ls=style,
        label=projection,
    )
    for rate, values in zip(rates, those, strict=True):
      ax.plot([rate] * len(values), values, '.', color=color)
  starts = [
      100 * stability.series(run.rows, 'knn/top1')[1][0]
      for run in sum(runs.values(), [])
  ]
  ax.axhline(np.mean(starts), color='k', ls=':', lw=1, label='random')
  ax.set(
      xscale='log', xticks=rates, xticklabels=[f'{rate:g}' for rate in rates],
      xlabel='peak rate per 256 images',
  )
  ax.minorticks_off()
  ax.legend(fontsize=8, loc='lower left')


def draw_curves(ax: Axes, runs: Runs, rate: float) -> None:
  """Draws kNN of each run at a rate."""
  for projection, (color, style) in STYLES.items():
    for run in runs[projection, rate]:
      steps, knn = stability.series(run.rows, 'knn/top1')
      ax.plot(steps, 100 * knn, color=color, ls=style, lw=1)
  ax.set(xlabel='step', title=f'the edge: rate {rate:g}')


def main(path: str, *folders: str) -> None:
  """Prints the table and draws the figure of all runs in the given folders."""
  of_methods = methods(tables.kept(folders))
  figure = Figure(figsize=(10, 6), layout='constrained')
  axes = figure.subplots(2, len(of_methods), sharey='row', squeeze=False)
  tables.print_head(HEAD)
  for (upper, lower), (method, runs) in zip(
      axes.T, of_methods.items(), strict=True
  ):
    rates = sorted({rate for _, rate in runs})
    for rate in rates:
      tables.print_row([
          method, f'{rate:g}',
          *(cell for x in STYLES for cell in (
              tables.spread(ends(runs, x, rate)), f'{below(runs, x, rate):.1f}',
          )),
          f'{gain(runs, rate):+.1f}',
      ])
    draw_ends(upper, runs, rates)
    upper.set_title(method)
    draw_curves(lower, runs, edge(runs, rates))
  axes[0, 0].set_ylabel('kNN accuracy at the end, %')
  axes[1, 0].set_ylabel('kNN accuracy, %')
  FigureCanvasAgg(figure).print_figure(path, dpi=130)


if __name__ == '__main__':
  main(*sys.argv[1:])
