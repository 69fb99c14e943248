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
