"""Draws the figure of docs/study.md from runs saved by keep.py.

  python docs/study/figure.py docs/images/study.png docs/study/rates

draws the runs at the highest learning rate: with a learned patch projection on
the left, with a frozen one on the right. The upper row shows kNN accuracy. The
lower row shows the gradient of each layer around the rises of the loss,
relative to its own past (see lead.py).
"""

from collections.abc import Sequence
import sys

import lead
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
import tables

from mocov3_jax.runs import history
from mocov3_jax.training import stability

RATE, PROJECTION = 'optimizer.lr_per_256', 'model.patch_embed'
LAGS = np.arange(-30, 31)
LAYERS = {
    'patch_embed': ('patch projection', 'tab:red'),
    'block_0': ('block 0', 'tab:blue'), 'block_1': ('block 1', 'tab:cyan'),
    'block_2': ('block 2', 'tab:green'), 'last_block': ('block 3', 'tab:gray'),
}


def draw_knn(ax: Axes, runs: Sequence[history.Run]) -> None:
  """Draws a curve for each seed, and the random networks."""
  for run in runs:
    steps, knn = stability.series(run.rows, 'knn/top1')
    ax.plot(steps, 100 * knn, lw=1, label=f"seed {run.config['seed']}")
  starts = [stability.series(run.rows, 'knn/top1')[1][0] for run in runs]
  ax.axhline(100 * np.mean(starts), color='k', ls=':', lw=1, label='random')
  ax.set(ylim=(0, 100), xlabel='step')
  ax.legend(fontsize=7, loc='lower left')


def draw_lead(ax: Axes, runs: Sequence[history.Run]) -> None:
  """Draws each layer's gradient around the rises of the loss (their median)."""
  runs = [tables.lived(run) for run in runs]
  rising = [lead.risen(run) for run in runs]
  of_runs = [lead.curves(run) for run in runs]
  for layer, (label, color) in LAYERS.items():
    name = tables.GRADIENTS + layer
    if name in of_runs[0] and any(rising):
      around = np.concatenate([
          lead.aligned(of_run[name], at, LAGS)
          for of_run, at in zip(of_runs, rising, strict=True)
      ])
      ax.plot(
          LAGS, np.exp(np.median(around, 0)), color=color, lw=1.5, label=label
      )
  ax.axvline(0, color='k', lw=0.8)
  ax.set(
      yscale='log', ylim=(0.7, 10), yticks=(1, 2, 5, 10),
      yticklabels=('1x', '2x', '5x', '10x'),
      xlabel=f'steps from a rise of the loss ({sum(map(len, rising))} rises)',
  )
  ax.minorticks_off()
  if any(rising):
    ax.legend(fontsize=7, loc='upper left')


def main(path: str, *folders: str) -> None:
  """Draws the figure of all runs in the given folders."""
  runs = tables.kept(folders)
  highest = max(run.config[RATE] for run in runs)
  figure = Figure(figsize=(10, 6), layout='constrained')
  axes = figure.subplots(2, 2, sharey='row')
  for column, projection in zip(axes.T, ('learned', 'frozen'), strict=True):
    those = [
        run for run in runs
        if run.config[RATE] == highest and run.config[PROJECTION] == projection
    ]
    draw_knn(column[0], those)
    draw_lead(column[1], those)
    column[0].set_title(f'{projection} patch projection, rate {highest:g}')
  axes[0, 0].set_ylabel('kNN accuracy, %')
  axes[1, 0].set_ylabel('largest gradient, over its past')
  FigureCanvasAgg(figure).print_figure(path, dpi=130)


if __name__ == '__main__':
  main(*sys.argv[1:])
