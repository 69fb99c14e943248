"""Draws official.png from official.csv: python docs/images/official.py"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).parent
# What one rounding error of float64 makes of a loss of 3.
SMALLEST = 4e-16


def main():
  """Reads the losses of 400 steps and writes the picture."""
  x = np.genfromtxt(HERE / 'official.csv', delimiter=',', names=True)
  figure, (losses, apart) = plt.subplots(1, 2, figsize=(9, 3), dpi=150)
  losses.plot(x['step'], x['official_float64_frozen'], color='#d95f02',
              label='official code, PyTorch')
  losses.plot(x['step'], x['ours_float64_frozen'], color='#1f5fa8',
              linestyle=(0, (3, 3)), label='mocov3_jax')
  losses.set(xlabel='step', ylabel='loss', title='float64')
  losses.legend(frameon=False)
  for names, label, color in (
      (('official_float32_frozen', 'ours_float32_frozen'),
       'the two, float32', '#1b9e77'),
      (('ours_float32_frozen_one_ulp', 'ours_float32_frozen'),
       'ours and ours, one weight\nchanged by one rounding, float32',
       '#7570b3'),
      (('official_float64_frozen', 'ours_float64_frozen'),
       'the two, float64', '#1f5fa8'),
  ):
    difference = np.abs(x[names[0]] - x[names[1]])
    apart.semilogy(x['step'], np.maximum(difference, SMALLEST), color=color,
                   linewidth=0.8, label=label)
  apart.set(xlabel='step', ylabel='difference of the losses', ylim=(1e-16, 30),
            title='how far apart')
  apart.legend(frameon=False, fontsize=7, loc='center right')
  for axes in losses, apart:
    axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(HERE / 'official.png')
  most = np.abs(x['official_float64_frozen'] - x['ours_float64_frozen']).max()
  print(f'{len(x)} steps; float64: at most {most:.1e} apart')


if __name__ == '__main__':
  main()
