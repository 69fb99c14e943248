"""The table of all kinds of sources, by name."""

from collections.abc import Callable
import importlib.util
import pathlib
from typing import NamedTuple

from etils import epath
import numpy as np

from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.sources import (
  ArraySource,
  Splits,
  folder,
  huggingface,
  idx,
  shards,
  tfds,
)


def digits() -> Splits:
  """Opens scikit-learn's 1,797 handwritten digits, 8x8 gray, 10 classes.

  Every fifth image is held out (360, or 20 %), always the same ones.
  """
  # Only its file is read: to import the library takes longer than JAX.
  package = importlib.util.find_spec('sklearn').submodule_search_locations[0]
  file = pathlib.Path(package) / 'datasets' / 'data' / 'digits.csv.gz'
  rows = np.loadtxt(file, dtype=np.int32, delimiter=',')
  images = rows[:, :-1].reshape(-1, 8, 8, 1)
  targets = rows[:, -1]
  # Spreads the 17 gray levels, 0 to 16, over the whole range of a byte.
  images = np.round(images * (255 / 16)).astype(np.uint8)
  classes = tuple(str(digit) for digit in range(10))
  held_out = np.arange(len(images)) % 5 == 0
  train, test = (
      ArraySource(f'digits {name}', images[chosen], targets[chosen], classes)
      for name, chosen in (('train', ~held_out), ('test', held_out))
  )
  return Splits(train, train, test)


class Kind(NamedTuple):
  """A kind of source.

  Attributes:
    form: how `config.data.source` is written for this kind.
    load: (the text after the colon, `config.data.labels`, cache folder for
      listings, number of channels wanted) -> the splits.
    takes_labels: whether `config.data.labels` can give it other labels.
  """

  form: str
  load: Callable[[str, str, epath.Path | None, int], Splits]
  takes_labels: bool = False


SOURCES = {
    'digits': Kind('digits', lambda *_: digits()),
    'folder': Kind('folder:PATH', folder.load, takes_labels=True),
    'idx': Kind('idx:FOLDER', lambda path, *_: idx.load(path)),
    'wds': Kind(
        'wds:GLOB', lambda path, _, cache, __: shards.load(path, cache)
    ),
    'hf': Kind(
        'hf:PATH_OR_NAME[:SPLIT]',
        lambda path, *_: huggingface.load(path),
    ),
    'tfds': Kind(
        'tfds:NAME[:SPLIT]', lambda path, *_: tfds.load(path)
    ),
}


def load(
    spec: str, labels: str = 'auto', cache: epath.Path | None = None,
    channels: int = 3,
) -> Splits:
  """Opens the source that `config.data.source` names.

  Args:
    spec: `config.data.source`, in one of the forms in SOURCES.
    labels: `config.data.labels`.
    cache: folder in which listings are cached, from `listing.cache_folder`;
      None = no cache.
    channels: number of channels that images of a folder are read with. Other
      sources have their own.

  Raises:
    UserError: for a name that is not in the table, or bad data.
  """
  name, colon, path = spec.partition(':')
  # A kind that takes nothing after its name takes no colon either.
  if name not in SOURCES or bool(colon) != (':' in SOURCES[name].form):
    raise unknown(
        'data.source', spec, [kind.form for kind in SOURCES.values()]
    )
  kind = SOURCES[name]
  if labels != 'auto' and not kind.takes_labels:
    raise UserError(
        f'data.labels={labels!r} is only for folder: sources, and data.source '
        f'is {spec!r}. Allowed: auto.'
    )
  return kind.load(path, labels, cache, channels)
