"""Folders of real photographs: the samples of scikit-learn and scikit-image."""

import os
import pathlib

import numpy as np
from PIL import Image
import skimage
from sklearn.datasets import load_sample_images

NAMES = (
    'coffee.png', 'astronaut.png', 'motorcycle_left.png', 'rocket.jpg',
    'chelsea.png', 'retina.jpg', 'ihc.png', 'hubble_deep_field.jpg',
)


def photographs():
  """{name: uint8 [H, W, 3]}, ten of them."""
  samples = load_sample_images()
  images = dict(zip(('china', 'flower'), samples.images, strict=True))
  folder = pathlib.Path(skimage.__file__).parent / 'data'
  for name in NAMES:
    with Image.open(folder / name) as image:
      images[name.split('.')[0]] = np.asarray(image.convert('RGB'))
  return images


def write_cuts(root, *, each=40, seed=0):
  """Cuts random squares out of every photograph, as JPEG files.

  They have from 96 pixels to 96 more than half of the photograph's shorter
  side, and may overlap.

  Args:
    root: folder to write, with a subfolder a photograph.
    each: squares of each photograph.
    seed: of their places.
  """
  rng = np.random.default_rng(seed)
  for name, image in photographs().items():
    folder = pathlib.Path(root) / name
    folder.mkdir(parents=True)
    height, width = image.shape[:2]
    for number in range(each):
      side = int(rng.integers(96, min(height, width) // 2 + 97))
      side = min(side, height, width)
      y = rng.integers(0, height - side + 1)
      x = rng.integers(0, width - side + 1)
      Image.fromarray(image[y : y + side, x : x + side]).save(
          folder / f'{number:03}.jpg', quality=90
      )


def write_tiles(root, *, tile=64, each=60, nested=True, corrupt=0.0, seed=0):
  """Cuts every photograph into tiles that do not overlap, as JPEG files.

  Args:
    root: folder to write.
    tile: side, pixels.
    each: at most so many tiles a photograph, chosen at random.
    nested: a subfolder a photograph; else all in one folder.
    corrupt: share of the files that are then cut off in their middle.
    seed: of the choice.

  Returns:
    {path relative to the root: name of its photograph}.
  """
  rng = np.random.default_rng(seed)
  root = pathlib.Path(root)
  written = {}
  for name, image in photographs().items():
    rows, columns = (n // tile for n in image.shape[:2])
    for place in rng.permutation(rows * columns)[:each].tolist():
      y, x = (tile * n for n in divmod(place, columns))
      path = f'{name}/{place:04}.jpg' if nested else f'{name}_{place:04}.jpg'
      (root / path).parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image[y:y + tile, x:x + tile]).save(
          root / path, quality=92
      )
      written[path] = name
  paths = sorted(written)
  for i in rng.permutation(len(paths))[:round(corrupt * len(paths))]:
    path = root / paths[i]
    os.truncate(path, path.stat().st_size // 2)
  return written
