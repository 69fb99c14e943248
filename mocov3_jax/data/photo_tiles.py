"""Cuts photographs into tiles: python -m mocov3_jax.data.photo_tiles OUT [HALF]

This data set is harder than digits and needs no download: 32x32 tiles of the
fourteen pictures that come with scikit-image (the extra `photos`). Each picture
is a class. Tiles do not overlap; every fifth is kept for testing. Many look
alike (sky, gravel, out-of-focus ground), so no network can tell all of them
apart. HALF, `first` or `second`, takes only every other picture; the two halves
have no picture in common.
"""

import pathlib
import sys

import numpy as np
from PIL import Image
from skimage import color, data, util

SIZE = 32
# Maximum number of tiles per picture, evenly spaced over it.
AT_MOST = 200
PICTURES = {
    'astronaut': data.astronaut, 'brick': data.brick, 'camera': data.camera,
    'cat': data.chelsea, 'cell': data.cell, 'coffee': data.coffee,
    'coins': data.coins, 'grass': data.grass, 'gravel': data.gravel,
    'hubble': data.hubble_deep_field, 'moon': data.moon,
    'retina': data.retina, 'rocket': data.rocket,
    'tissue': data.immunohistochemistry,
}
# Which of the sorted pictures each half takes.
HALVES = {
    '': slice(None), 'first': slice(0, None, 2), 'second': slice(1, None, 2)
}


def tiles(picture):
  """Cuts [H, W] or [H, W, C] into uint8 [N, SIZE, SIZE, 3], row by row."""
  picture = util.img_as_ubyte(picture)
  if picture.ndim == 2:
    picture = color.gray2rgb(picture)
  rows, columns = (n // SIZE for n in picture.shape[:2])
  cut = picture[: rows * SIZE, : columns * SIZE, :3]
  cut = cut.reshape(rows, SIZE, columns, SIZE, 3).swapaxes(1, 2)
  return cut.reshape(-1, SIZE, SIZE, 3)


def main(out, half=''):
  """Writes OUT/train/NAME/*.png and OUT/val/NAME/*.png."""
  names = sorted(PICTURES)[HALVES[half]]
  out = pathlib.Path(out)
  if out.exists():
    sys.exit(f'{out} exists. Use a new folder.')
  counts = {'train': 0, 'val': 0}
  for name in names:
    found = tiles(PICTURES[name]())
    chosen = np.linspace(0, len(found) - 1, min(AT_MOST, len(found)))
    for i, tile in enumerate(found[chosen.round().astype(int)]):
      split = 'val' if i % 5 == 0 else 'train'
      folder = out / split / name
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(tile).save(folder / f'{i:03}.png')
      counts[split] += 1
  print(f'{counts["train"]} training and {counts["val"]} test tiles of '
        f'{len(names)} pictures in {out}')


if __name__ == '__main__':
  if not (2 <= len(sys.argv) <= 3 and {*sys.argv[2:]} <= HALVES.keys()):
    sys.exit(__doc__)
  main(*sys.argv[1:])
