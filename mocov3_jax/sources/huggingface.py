"""Data sets of Hugging Face: saved folders, parquet files, names on the Hub.

The library `datasets` finds the splits and features. The encoded images are
then read from its Arrow table, which is memory-mapped from the disk.
"""

import difflib
import importlib.util
import os
import re
from typing import Any

import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.sources import Splits, Unreadable, labelled_splits, layout
from mocov3_jax.sources.layout import NAMED, listed

# Maximum bytes of an image.
MOST_IMAGE = 2**28
# Names of label columns, the preferred one first.
LABELS = 'label', 'labels', 'fine_label', 'class'
INSTALL = "Use: pip install 'mocov3-jax[hf]'"


class TableSource:
  """One split of a data set, as a `sources.Source`."""

  shape = None
  channels = 3
  labels_at_hand = True

  def __init__(
      self, name: str, split: str, dataset: Any, known: tuple[Any, ...] = ()
  ):
    """Finds the columns of images and labels.

    Args:
      name: name of the data set as given to `load`, without the split.
      split: name of the split.
      dataset: a `datasets.Dataset`.
      known: the label values that are classes; empty = those in `dataset`.

    Raises:
      UserError: if there is not exactly one column of images, or no row.
    """
    self._name, self._split, self._known = name, split, known
    where = f'hf:{name}'
    columns = [
        name for name, feature in dataset.features.items() if _is_image(feature)
    ]
    if len(columns) != 1:
      raise UserError(
          f'data.source={where!r} has {len(columns)} columns of images '
          f'({listed(columns) or "none"}) among '
          f'{listed(list(dataset.features), NAMED)}. Use a data set with one.'
      )
    if not len(dataset):
      raise UserError(f'data.source={where!r}: {split} has no rows.')
    if dataset._indices is not None:  # A selection of rows: copy them.
      dataset = dataset.flatten_indices()
    column = dataset.data.column(columns[0])
    self._chunks = column.chunks
    self._begins = np.cumsum([0, *map(len, self._chunks)])
    self._folder = os.path.dirname(
        dataset.cache_files[0]['filename']
    ) if dataset.cache_files else ''
    self.classes, self._labels = _labels(dataset, known)
    if len(np.unique(self._labels[self._labels >= 0])) < 2:  # Too few.
      self.classes, self._labels = (), np.full(len(dataset), -1, np.int32)

  def __reduce__(self):
    """Lets another process reopen the split from the same mapped files."""
    return _reopened, (self._name, self._split, self._known)

  def __len__(self) -> int:
    return int(self._begins[-1])

  def read(self, index: int) -> bytes:
    """Returns the encoded image.

    Raises:
      Unreadable: if the row has no image, or its file cannot be read.
    """
    chunk = int(np.searchsorted(self._begins, index, side='right')) - 1
    cell = self._chunks[chunk][int(index - self._begins[chunk])].as_py()
    if isinstance(cell, dict):
      data, path = (cell[k] if k in cell else None for k in ('bytes', 'path'))
    else:
      data, path = cell, None
    if data is None and path:
      try:
        with open(os.path.join(self._folder, path), 'rb') as file:
          data = file.read(MOST_IMAGE + 1)
      except OSError as e:
        raise Unreadable(e.strerror or str(e)) from e
    if not data:
      raise Unreadable('there is no image in this row')
    if len(data) > MOST_IMAGE:
      raise Unreadable(f'{len(data):,} bytes are more than {MOST_IMAGE:,}')
    return data

  def labels(self, indices: np.ndarray) -> np.ndarray:
    """Returns the labels of these images."""
    return self._labels[indices]

  def name(self, index: int) -> str:
    """Returns the split and the index."""
    return f'{self._split}[{index}]'


def _is_image(feature: Any) -> bool:
  """Returns whether a column holds encoded images.

  Parquet files that the library did not write do not mark such a column. In
  these, it is a column with the bytes of a file, alone or beside its path.
  """
  import datasets

  if isinstance(feature, datasets.Image):
    return True
  if isinstance(feature, dict):
    return set(feature) == {'bytes', 'path'}
  return _dtype(feature) in ('binary', 'large_binary')


def _dtype(feature: Any) -> str:
  """Returns the type of a plain column; '' for any other feature."""
  import datasets

  return feature.dtype if isinstance(feature, datasets.Value) else ''


def _label_column(dataset: Any) -> tuple[str | None, bool]:
  """Returns the label column, or None, and whether its classes have names."""
  import datasets

  features = dataset.features
  typed = [
      name for name, feature in features.items()
      if isinstance(feature, datasets.ClassLabel)
  ]
  plain = [
      name for name, feature in features.items()
      if re.match('u?int|string|large_string', _dtype(feature))
  ]
  name = next((n for n in LABELS if n in typed), None) or next(
      iter(typed), None
  ) or next((n for n in LABELS if n in plain), None)
  return name, name in typed


def _values(dataset: Any) -> list[Any]:
  """Returns the label values of a split; empty if its classes have names."""
  name, named = _label_column(dataset)
  if name is None or named:
    return []
  return [v for v in dataset.data.column(name).to_pylist() if v is not None]


def _labels(
    dataset: Any, known: tuple[Any, ...]
) -> tuple[tuple[str, ...], np.ndarray]:
  """Returns the names of the classes and the labels, int32; -1 for none."""
  name, named = _label_column(dataset)
  if name is None:
    return (), np.full(len(dataset), -1, np.int32)
  values = dataset.data.column(name).to_pylist()
  if named:
    numbers = np.array([-1 if v is None else v for v in values], np.int32)
    return tuple(dataset.features[name].names), np.maximum(numbers, -1)
  known = known or tuple(sorted(set(_values(dataset))))
  number = {value: i for i, value in enumerate(known)}
  return tuple(map(str, known)), np.array(
      [number[v] if v in number else -1 for v in values], np.int32
  )


def load(path: str) -> Splits:
  """Opens a data set.

  Args:
    path: 'PATH_OR_NAME[:SPLIT]': a folder that `save_to_disk` wrote, a .parquet
      file or a folder of them, or a name on the Hub, which the library
      downloads. SPLIT is the split to train on; the default is 'train', or the
      first split if there is no 'train'.

  Raises:
    UserError: if there is no such data set or split, or it holds no images.
  """
  where = f'hf:{path}'
  if importlib.util.find_spec('datasets') is None:
    raise UserError(
        f'data.source={where!r} needs the package datasets. {INSTALL}'
    )
  name, _, split = path.partition(':')
  if not name:
    raise UserError(
        f'data.source={where!r} names no data set. Use hf:FOLDER, '
        'hf:FILE.parquet, or hf:NAME of a data set on the Hub.'
    )
  found = _opened(where, name)
  chosen = split or ('train' if 'train' in found else next(iter(found)))
  if chosen not in found:
    near = difflib.get_close_matches(chosen, found, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise UserError(
        f'data.source={where!r}: there is no split {chosen!r}.{hint} Allowed: '
        f'{", ".join(found)}.'
    )
  # Label values without names are classes if any split has them.
  values = {
      kind: {v for split in found.values() for v in _values(split)
             if type(v) is kind} for kind in (int, str)
  }
  known = tuple(sorted(values[int] or values[str]))
  train = TableSource(name, chosen, found[chosen], known)
  remarks = ()
  for other in layout.TESTS:
    if other in found and other != chosen and len(found[other]):
      test = TableSource(name, other, found[other], known)
      labels = test.labels(np.arange(len(test)))
      if test.classes == train.classes and labels.max() >= 0:
        return labelled_splits(
            where, train, test, (f'tested on {other}', *remarks)
        )
      # For example, the test split of a contest has no labels.
      remarks += (f'{other} has no labels of these classes',)
  return labelled_splits(where, train, None, remarks)


def _reopened(name: str, split: str, known: tuple[Any, ...]) -> TableSource:
  return TableSource(name, split, _opened(f'hf:{name}', name)[split], known)


def _opened(where: str, name: str) -> dict[str, Any]:
  """Returns the splits of a data set.

  Raises:
    UserError: if the library cannot open it.
  """
  import datasets

  datasets.disable_progress_bars()
  path = files.absolute(name, 'data.source')
  try:
    if path.is_file():
      return dict(datasets.load_dataset('parquet', data_files=str(path)))
    if (path / 'dataset_dict.json').exists() or (path / 'state.json').exists():
      found = datasets.load_from_disk(str(path))
    elif path.is_dir() and not any(path.glob('*.parquet')) and not any(
        path.glob('*/*.parquet')
    ):
      raise UserError(
          f'data.source={where!r}: {path} was not written by save_to_disk of '
          'datasets, and holds no .parquet files. The source for a folder of '
          'image files is folder:PATH.'
      )
    else:
      # A folder with files named by split, or a data set on the Hub.
      found = datasets.load_dataset(str(path) if path.is_dir() else name)
  except UserError:
    raise
  except Exception as e:  # The library and Arrow raise many kinds.
    lines = str(e).strip().splitlines() or [type(e).__name__]
    raise UserError(
        f'data.source={where!r} cannot be opened: {type(e).__name__}: '
        f'{lines[0][:300]} (Looked for as {path}, and as a name on the Hub, '
        'which needs a network, or what was downloaded before.)'
    ) from e
  if isinstance(found, datasets.Dataset):
    return {'train': found}
  return dict(found)
