"""Where images come from: random access to uint8 images and labels."""

import dataclasses

import numpy as np
from sklearn.datasets import load_digits

from mocov3_jax.errors import unknown


@dataclasses.dataclass(frozen=True)
class Source:
  """Images of one size in memory.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N], from 0 to num_classes - 1.
    num_classes: how many labels there are.
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int

  def __len__(self) -> int:
    return len(self.images)

  def take(self, indices: np.ndarray) -> np.ndarray:
    """Returns the images at `indices`, uint8 [len(indices), H, W, C]."""
    return self.images[indices]


@dataclasses.dataclass(frozen=True)
class Splits:
  """What a run trains on, and what it is tested on."""

  train: Source
  test: Source


def digits() -> Splits:
  """scikit-learn's 1,797 handwritten digits, 8x8 gray, 10 classes.

  Every fifth image is held out (360, or 20 %), always the same ones.
  """
  data = load_digits()
  # 17 gray levels, 0 to 16, to the whole range of a byte.
  images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = data.target.astype(np.int32)
  held_out = np.arange(len(images)) % 5 == 0
  return Splits(
      *(Source(images[m], labels[m], 10) for m in (~held_out, held_out))
  )


SOURCES = {'digits': digits}


def load(spec: str) -> Splits:
  """Opens the source that `config.data.source` names.

  Raises:
    UserError: for a name that is not in the table.
  """
  if spec not in SOURCES:
    raise unknown('data.source', spec, SOURCES)
  return SOURCES[spec]()
