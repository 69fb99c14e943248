"""The sources by name: `digits`, `folder:PATH`, `tfds:NAME[:SPLIT]`."""

from etils import epath
import numpy as np

from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.data import folder, tfds
from mocov3_jax.data.sources import ArraySource, Splits


def digits() -> Splits:
  """Opens scikit-learn's 1,797 handwritten digits, 8x8 gray, 10 classes.

  Every fifth image is held out (360, or 20 %), always the same ones.
  """
  # Here, since it would double the time that every command takes to start.
  from sklearn.datasets import load_digits

  data = load_digits()
  # 17 gray levels, 0 to 16, to the whole range of a byte.
  images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
  targets = data.target.astype(np.int32)
  held_out = np.arange(len(images)) % 5 == 0
  train, test = (
      ArraySource(f'digits {name}', images[chosen], targets[chosen], 10)
      for name, chosen in (('train', ~held_out), ('test', held_out))
  )
  return Splits(train, train, test)


def load(
    spec: str, labels: str = 'auto', cache: epath.Path | None = None
) -> Splits:
  """Opens the source that `config.data.source` names.

  Args:
    spec: 'digits', 'folder:PATH' or 'tfds:NAME[:SPLIT]'.
    labels: `config.data.labels`.
    cache: where listings of image folders are kept; None = nowhere.

  Raises:
    UserError: for a name that is not in the table, or bad data.
  """
  kind, _, path = spec.partition(':')
  if kind == 'folder':
    return folder.load(path, labels, cache)
  if labels != 'auto':
    raise UserError(
        f'data.labels={labels!r} is only for folder: sources, and data.source '
        f'is {spec!r}. Allowed: auto.'
    )
  if kind == 'tfds':
    return tfds.load(path)
  if spec != 'digits':
    raise unknown('data.source', spec, ['digits', 'folder:PATH', 'tfds:NAME'])
  return digits()
