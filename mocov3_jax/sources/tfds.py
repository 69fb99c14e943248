"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

Only the interface of `tfds.data_source` is used. It gives random access to
array_record or parquet files, on a disk or in a bucket, and leaves the images
encoded.
"""

import difflib
import importlib.util
import re
from typing import Any

from etils import epath
import numpy as np

from mocov3_jax.base.errors import UserError, first_line, is_of_environment
from mocov3_jax.sources import LOST, Source, Splits, Unreadable, hold_out
from mocov3_jax.sources.layout import NAMED, listed

# Records that are requested at once, for their labels.
AT_ONCE = 256
# Stands for a label that has not been read yet.
UNREAD = -3
# Splits to test on; the first that exists and has labels is used.
TEST_SPLITS = ('validation', 'test')
# Number of records that are read to find out whether a split has labels. The
# labels of a contest's test split, such as ImageNet's, are kept secret: all of
# them are -1.
FEW = 10


class TfdsSource:
  """One split of a prepared data set, as a `sources.Source`."""

  labels_at_hand = False

  def __init__(self, builder: Any, split: str):
    """Opens the split.

    Args:
      builder: a tfds.core.DatasetBuilder of a prepared data set.
      split: in TFDS's notation, such as 'train' or 'train[:10%]'.

    Raises:
      UserError: if it cannot be opened.
    """
    import tensorflow_datasets as tfds

    self._title = f'{builder.info.name}:{split}'
    features = builder.info.features
    images = _keys(features, tfds.features.Image)
    classes = _keys(features, tfds.features.ClassLabel)
    if len(images) != 1:
      raise UserError(
          f'data.source=tfds:{builder.info.name} has {len(images)} images an '
          f'example {images}. Use sets with one.'
      )
    self._image = images[0]
    self._label = 'label' if 'label' in classes else (classes or [None])[0]
    self.classes = tuple(features[self._label].names) if self._label else ()
    shape = features[self._image].shape
    self.shape = None if None in shape else tuple(shape)
    if self.shape and self.shape[-1] not in (1, 3):
      raise UserError(
          f'data.source=tfds:{builder.info.name} has images of '
          f'{self.shape[-1]} channels. Allowed: 1 (gray) or 3 (RGB).'
      )
    self.channels = self.shape[-1] if self.shape else 3
    decoders = {self._image: tfds.decode.SkipDecoding()}
    known = list(builder.info.splits)
    file_format = _file_format(builder)
    try:
      self._records = builder.as_data_source(
          split, decoders=decoders, file_format=file_format
      )
      count = len(self._records)
      expected = builder.info.splits[split].num_examples
    except ValueError as e:
      raise UserError(
          f'data.source=tfds:{self._title}: {first_line(e)} Allowed: '
          f'{", ".join(known)}, or a part, such as {known[0]}[:10%].'
      ) from e
    if not count:
      raise UserError(f'data.source=tfds:{self._title} has no images.')
    if count != expected:
      # TFDS 4.9 loses images when it writes parquet, and reads the whole split
      # if a part is asked for.
      raise UserError(
          f'data.source=tfds:{self._title} has {expected} images, but TFDS '
          f'finds {count} images in its {file_format.value} files. Use the '
          'data set as array_record files, which TFDS reads correctly.'
      )
    self._labels = np.full(len(self._records), UNREAD, np.int32)

  def __len__(self) -> int:
    return len(self._records)

  def read(self, index: int) -> bytes:
    """Returns the image as it was encoded.

    Raises:
      Unreadable: if the record is damaged.
    """
    try:
      record = self._records[int(index)]
    except Exception as e:  # array_record and protobuf raise many kinds.
      raise Unreadable(str(e)) from e
    if self._label is not None:
      # Kept, so that `labels` need not read it again. Threads that read the
      # same record write the same number.
      self._labels[index] = record[self._label]
    return record[self._image]

  def labels(self, indices: np.ndarray) -> np.ndarray:
    """Returns the labels of these images.

    Records that have not been read yet are read, each of them once.
    """
    if self._label is None:
      return np.full(len(indices), -1, np.int32)
    indices = np.asarray(indices)
    unread = np.unique(indices[self._labels[indices] == UNREAD]).tolist()
    for begin in range(0, len(unread), AT_ONCE):
      part = unread[begin:begin + AT_ONCE]
      try:  # Sends many requests to a bucket at once.
        records = self._records.__getitems__(part)
        self._labels[part] = [record[self._label] for record in records]
      except Exception as e:
        if is_of_environment(e):
          raise
        for index in part:  # One of them is damaged.
          self._labels[index] = self._one_label(index)
    return self._labels[indices]

  def _one_label(self, index: int) -> int:
    try:
      return self._records[index][self._label]
    except Exception as e:  # As in `read`, which will say so.
      if is_of_environment(e):
        raise
      return LOST

  def name(self, index: int) -> str:
    """Returns the data set, the split and the index."""
    return f'{self._title}[{index}]'


def _keys(features: Any, kind: type) -> list[str]:
  return [name for name, f in features.items() if type(f) is kind]


def load(path: str) -> Splits:
  """Opens a prepared data set.

  It is looked for where TFDS keeps its data: ~/tensorflow_datasets, or the
  folder that the environment variable TFDS_DATA_DIR names.

  Args:
    path: 'NAME[:SPLIT]'; the split to train on is 'train' if none is given.
      NAME may hold a config and a version, 'name/config:1.0.0'.

  Raises:
    UserError: if the data set is unknown, not prepared, or has no files with
      random access; the message says which command helps.
  """
  name, split = re.fullmatch(
      r'([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?', path
  ).groups()
  builder = _open(name)
  split = split or 'train'
  train = TfdsSource(builder, split)
  if not train.classes:
    note = f'tfds:{path}: {len(train)} images without labels'
    return Splits(train, None, None, note)
  test, held = _labelled_test(builder, split)
  source: Source = train
  if test is None:
    # Regardless of class: finding out the labels takes a pass over all images.
    source, test = hold_out(train, np.arange(len(train)))
    held = 'every tenth, held out'
  return Splits(
      source, source, test,
      f'tfds:{path}: {len(source)} images in {len(train.classes)} '
      f'classes ({listed(train.classes, NAMED)}), {len(test)} to test on '
      f'({held})',
  )


def _labelled_test(
    builder: Any, split: str
) -> tuple[TfdsSource, str] | tuple[None, None]:
  """Returns the first test split with labels and its name; None if none has."""
  used = set(re.split(r'\W+', split))  # Already trained on.
  for name in TEST_SPLITS:
    if name not in builder.info.splits or used & {name, 'all'}:
      continue
    test = TfdsSource(builder, name)
    if (test.labels(np.arange(min(FEW, len(test)))) >= 0).any():
      return test, name
  return None, None


def _open(name: str) -> Any:
  import tensorflow_datasets as tfds

  where = f'data.source=tfds:{name}'
  try:
    builder = tfds.builder(name)
  except tfds.core.DatasetNotFoundError as e:
    base = re.split('[/:]', name)[0]
    near = difflib.get_close_matches(
        base, tfds.list_builders(with_community_datasets=False), n=3
    )
    raise UserError(
        f'data.source=tfds:{base} is not known to TFDS. '
        + (f'Nearest: {", ".join(near)}. ' if near else '')
        + 'Use a name of its catalogue, or of a data set prepared before.'
    ) from e
  except Exception as e:  # TFDS raises many kinds, for versions and configs.
    raise UserError(f'{where} cannot be opened: {first_line(e)}') from e
  if not builder.info.splits:
    raise UserError(
        f'{where} is not prepared in {builder.data_dir}. To prepare it (TFDS '
        'needs TensorFlow for that, in this or another environment):\n'
        '  pip install tensorflow tensorflow-datasets\n'
        '  python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"'{name}', data_dir='{_root(builder)}', file_format='array_record')"
        '.download_and_prepare()"'
    )
  file_format = _file_format(builder)
  if file_format == tfds.core.FileFormat.PARQUET and (
      importlib.util.find_spec('pyarrow') is None
  ):
    raise UserError(
        f'{where} is prepared as parquet, which pyarrow reads. Use: pip '
        "install 'mocov3-jax[hf]'"
    )
  if file_format is None:
    raise UserError(
        f'{where} is prepared in {builder.data_dir} as '
        f'{builder.info.file_format.value}, which has no random access. To '
        'add array_record files (TFDS needs TensorFlow for that, in this or '
        'another environment):\n'
        '  pip install tensorflow tensorflow-datasets apache-beam mlcroissant\n'
        f'  tfds convert_format --dataset_version_dir={builder.data_dir} '
        '--out_file_format=array_record'
    )
  return builder


def _file_format(builder: Any) -> Any:
  """Returns the file format to read, array_record if there is a choice.

  None if no format has random access.
  """
  import tensorflow_datasets as tfds

  formats = {builder.info.file_format, *builder.info.alternative_file_formats}
  formats &= tfds.core.FileFormat.with_random_access()
  return min(formats, key=lambda f: f.value, default=None)


def _root(builder: Any) -> epath.Path:
  # .../NAME[/CONFIG]/VERSION
  relative = epath.Path(builder.info.full_name).parts
  return epath.Path(builder.data_dir).parents[len(relative) - 1]
