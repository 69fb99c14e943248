"""Draws a run's curves: python docs/plot_run.py WORKDIR OUT.png

Reads WORKDIR/metrics.jsonl.
"""

import json
import pathlib
import sys

from matplotlib import pyplot as plt


def series(rows, name):
  """The steps and values of the rows that have `name`."""
  pairs = [(row['step'], row[name]) for row in rows if name in row]
  return zip(*pairs, strict=True)


def main(workdir, out):
  """Draws kNN, loss, and gradients over steps, side by side."""
  workdir = pathlib.Path(workdir)
  file = workdir / 'metrics.jsonl'
  if not file.exists():
    sys.exit(f'{workdir} is not the workdir of a training run.')
  lines = file.read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  plt.rcParams.update({
      'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False,
      'axes.grid': True, 'grid.alpha': 0.3, 'axes.titlesize': 10,
  })
  figure, (left, middle, right) = plt.subplots(
      1, 3, figsize=(10, 2.9), layout='constrained'
  )
  steps, knn = series(rows, 'knn/top1')
  knn = [100 * value for value in knn]
  left.plot(steps, knn, color='tab:green', lw=2)
  left.axhline(knn[0], color='gray', ls=':', lw=1)
  left.annotate(
      f'random network {knn[0]:.1f}', (steps[-1], knn[0]), ha='right',
      xytext=(0, 3), textcoords='offset points', color='gray',
  )
  left.annotate(
      f'{knn[-1]:.1f}', (steps[-1], knn[-1]), ha='right',
      xytext=(0, -12), textcoords='offset points', color='tab:green',
  )
  left.set(title='kNN accuracy, held-out images (%)', xlabel='step')
  middle.plot(*series(rows, 'train/loss'), color='tab:blue', lw=1)
  steps, chance = series(rows, 'train/loss_chance')
  middle.plot(steps, chance, color='gray', ls=':', lw=1)
  middle.annotate(
      'chance', (steps[-1], chance[0]), ha='right', xytext=(0, -11),
      textcoords='offset points', color='gray',
  )
  middle.set(title='contrastive loss', xlabel='step')
  right.plot(
      *series(rows, 'grad_max/last_block'), color='tab:orange', lw=1,
      label='last block',
  )
  right.plot(
      *series(rows, 'grad_max/patch_embed'), color='tab:blue', lw=1,
      label='patch projection',
  )
  right.set(title='largest |gradient|', xlabel='step')
  right.legend(frameon=False)
  figure.savefig(out, dpi=110)


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])
