"""Data sets in the format of MNIST: four IDX files, read whole into memory.

MNIST, Fashion-MNIST, KMNIST and EMNIST are distributed in this format. A file
begins with two zero bytes, the type of its values (8: uint8), the number of its
axes, and their lengths, big-endian; the values follow (LeCun et al.,
yann.lecun.com/exdb/mnist).
"""

import gzip
import math
import re
import struct
from typing import NamedTuple
import zlib

from etils import epath
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import ArraySource, Splits

# Names such as train-images-idx3-ubyte.gz, t10k-labels.idx1-ubyte, and
# emnist-letters-test-images-idx3-ubyte.gz.
_NAME = re.compile(
    r'(?P<set>.*?)(?P<split>train|t10k|test)[-.]'
    r'(?P<kind>images|labels)[-.]idx[13][-.]ubyte(\.gz)?'
)
# Maximum unpacked bytes of a file: a data set is read whole into memory.
MOST_BYTES = 2**30
WHERE = (
    'Use a folder with the four IDX files of one set, packed by gzip or not, '
    'such as train-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz. On '
    'Debian and Ubuntu, apt-get install dataset-fashion-mnist puts those of '
    'Fashion-MNIST into /usr/share/datasets/fashion-mnist.'
)


class _Part(NamedTuple):
  """What one of the four files holds."""

  split: str
  kind: str


PARTS = tuple(
    _Part(split, kind)
    for split in ('train', 'test') for kind in ('images', 'labels')
)


def load(path: str) -> Splits:
  """Opens the data set whose files are in a folder.

  Args:
    path: path of the folder.

  Raises:
    UserError: if a file is missing, damaged, or does not fit the others.
  """
  folder = files.absolute(path)
  found = _find(path, folder)
  arrays = {part: _read(file) for part, file in found.items()}
  # EMNIST's images are stored column by column.
  turned = any('emnist' in file.name.lower() for file in found.values())
  numbers = np.unique(np.concatenate([
      arrays[_Part(split, 'labels')].ravel() for split in ('train', 'test')
  ]))
  classes = tuple(map(str, numbers.tolist()))

  def source(split):
    images, labels = (arrays[_Part(split, k)] for k in ('images', 'labels'))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
      raise UserError(
          f'the {split} files of data.source=idx:{path} do not fit: images '
          f'{list(images.shape)}, labels {list(labels.shape)}. {WHERE}'
      )
    if turned:
      images = images.swapaxes(1, 2)
    places = np.searchsorted(numbers, labels).astype(np.int32)
    # The title leaves out the folder, which may move without another change.
    return ArraySource(f'idx {split}', images[..., None], places, classes)

  train, test = source('train'), source('test')
  if train.shape != test.shape:
    raise UserError(
        f'data.source=idx:{path} has images of {train.shape[:2]} to train on, '
        f'and of {test.shape[:2]} to test on. {WHERE}'
    )
  height, width, _ = train.shape
  return Splits(
      train, train, test,
      f'idx:{path}: {len(train)} images of {height} x {width} in '
      f'{len(classes)} classes, {len(test)} to test on',
  )


def _find(path: str, folder: epath.Path) -> dict[_Part, epath.Path]:
  """Returns the four files of the data set."""
  found, sets = {}, set()
  for file in sorted(folder.iterdir()) if folder.is_dir() else ():
    match = _NAME.fullmatch(file.name)
    if match and file.is_file():
      split = 'train' if match['split'] == 'train' else 'test'
      sets.add(match['set'])
      # A packed and an unpacked file may lie side by side; they hold the same.
      found.setdefault(_Part(split, match['kind']), file)
  if len(sets) > 1:
    raise UserError(
        f'data.source=idx:{path} has files of several sets: '
        f'{", ".join(sorted(sets))[:200]}. {WHERE}'
    )
  missing = [f'{p.split} {p.kind}' for p in PARTS if p not in found]
  if missing:
    raise UserError(
        f'data.source=idx:{path} lacks {", ".join(missing)}. {WHERE}'
    )
  return found


def _read(file: epath.Path) -> np.ndarray:
  """Reads the array of a file, and no more bytes than its header says."""
  unpack = gzip.open if file.suffix == '.gz' else open
  try:
    with unpack(file, 'rb') as f:
      head = f.read(4)
      if len(head) < 4 or head[:3] != b'\0\0\x08' or not 1 <= head[3] <= 4:
        raise ValueError('it is no IDX file of bytes')
      shape = struct.unpack(f'>{head[3]}I', f.read(4 * head[3]))
      size = math.prod(shape)
      if not 0 < size <= MOST_BYTES:
        raise ValueError(f'its header says {list(shape)}')
      data = f.read(size)
      if len(data) < size or f.read(1):
        raise ValueError(
            f'its header says {size:,} bytes, and it has '
            f'{"fewer" if len(data) < size else "more"}'
        )
  except (OSError, EOFError, ValueError, struct.error, zlib.error) as e:
    raise UserError(f'{file} cannot be read: {e}. {WHERE}') from e
  return np.frombuffer(data, np.uint8).reshape(shape)
