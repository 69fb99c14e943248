"""Sources of images: random access to encoded images or pixels."""

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Protocol

import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.sources.layout import NAMED, listed

# Without a test split, one in this many labelled images is held out.
HOLD_OUT = 10
# Version of how images of differing sizes are cropped.
READING = 2
# Stands for a label that cannot be read.
LOST = -2


class Unreadable(Exception):
  """The bytes are not an image, or the image is damaged."""


class Source(Protocol):
  """Random access to images and labels.

  Attributes:
    shape: (H, W, C) if all images have one size, else None. Images of one
      size are cropped on the device.
    channels: number of channels of the images as they are read.
    classes: names of the labels 0, 1, ...; empty if there are no labels.
    labels_at_hand: whether `labels` works without reading images.
  """

  shape: tuple[int, int, int] | None
  channels: int
  classes: tuple[str, ...]
  labels_at_hand: bool

  def __len__(self) -> int:
    """Returns the number of images."""

  def read(self, index: int) -> bytes | np.ndarray:
    """Returns an encoded image, or its pixels as uint8 [H, W, C].

    Raises:
      Unreadable: if it cannot be read.
    """

  def labels(self, indices: Sequence[int]) -> np.ndarray:
    """Returns the labels, int32 [len(indices)].

    -1 stands for an image without a label; LOST for an image that cannot be
    read, if its label is stored with it.
    """

  def name(self, index: int) -> str:
    """Returns the name to look for: a path, or a split and a number."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """Images of one size in memory.

  Attributes:
    title: name of the data set.
    images: uint8 [N, H, W, C].
    all_labels: int32 [N], indices into `classes`.
    classes: names of the labels.
  """

  title: str
  images: np.ndarray
  all_labels: np.ndarray
  classes: tuple[str, ...]
  labels_at_hand = True

  @property
  def shape(self) -> tuple[int, int, int]:
    """The shape (H, W, C) of each image."""
    return self.images.shape[1:]

  @property
  def channels(self) -> int:
    """The channels of each image."""
    return self.images.shape[-1]

  def __len__(self) -> int:
    return len(self.images)

  def read(self, index: int) -> np.ndarray:
    """Returns the pixels, uint8 [H, W, C]."""
    return self.images[index]

  def labels(self, indices: Sequence[int]) -> np.ndarray:
    """Returns the labels of these images."""
    return self.all_labels[indices]

  def name(self, index: int) -> str:
    """Returns the title and the index."""
    return f'{self.title}[{index}]'


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some of the images of a source, as a source."""

  source: Source
  indices: np.ndarray

  @property
  def shape(self) -> tuple[int, int, int] | None:
    """The shape of the images, as in the whole source."""
    return self.source.shape

  @property
  def channels(self) -> int:
    """The channels of the images, as in the whole source."""
    return self.source.channels

  @property
  def classes(self) -> tuple[str, ...]:
    """The names of the labels, as in the whole source."""
    return self.source.classes

  @property
  def labels_at_hand(self) -> bool:
    """Whether labels are at hand, as in the whole source."""
    return self.source.labels_at_hand

  def __len__(self) -> int:
    return len(self.indices)

  def read(self, index: int) -> bytes | np.ndarray:
    """Reads an image of the whole source."""
    return self.source.read(self.indices[index])

  def labels(self, indices: Sequence[int]) -> np.ndarray:
    """Returns the labels of these images."""
    return self.source.labels(self.indices[indices])

  def name(self, index: int) -> str:
    """Returns the name that the image has in the whole source."""
    return self.source.name(self.indices[index])


@dataclasses.dataclass(frozen=True)
class Splits:
  """What a run trains on, and what it is tested on.

  Attributes:
    train: the images to train on.
    bank: the training images that have labels, as kNN's bank; None if there are
      no labels.
    test: labelled images that kNN classifies; None if there are no labels.
    note: what was found, in words.
  """

  train: Source
  bank: Source | None
  test: Source | None
  note: str = ''

  def fingerprint(self) -> dict[str, int | str]:
    """Returns what must stay the same for a run to be continued.

    Labels that are only known after reading the images are left out.
    """
    found = {
        'images': len(self.train), 'classes': len(self.train.classes),
        'names_sha256': _names_digest(self.train),
    }
    if self.train.shape is None:
      found['reading'] = READING
    if self.test is None:
      return found
    found |= {
        'test_images': len(self.test),
        'test_names_sha256': _names_digest(self.test),
    }
    if self.train.labels_at_hand:
      labels = [x.labels(np.arange(len(x))) for x in (self.train, self.test)]
      found['labels_sha256'] = hashlib.sha256(
          np.concatenate(labels).astype('<i4').tobytes()
      ).hexdigest()
    return found


def _names_digest(source: Source) -> str:
  digest = hashlib.sha256()
  for index in range(len(source)):
    digest.update(source.name(index).encode(errors='surrogateescape'))
    digest.update(b'\0')
  return digest.hexdigest()


def check_channels(splits: Splits, spec: str, wanted: int) -> None:
  """Checks that images have as many channels as a network was trained on.

  Raises:
    UserError: if they do not.
  """
  found = splits.train.channels
  if found != wanted:
    raise UserError(
        f'the source {spec!r} has {found} channels, but the network was '
        f'trained on {wanted}. Use images with {wanted} channels.'
    )


def evenly(source: Source, count: int) -> Source:
  """Returns at most `count` images, evenly spaced over the source; 0 = all."""
  if not 0 < count < len(source):
    return source
  return Subset(source, np.arange(count) * len(source) // count)


def labelled(source: Source) -> tuple[Source, np.ndarray]:
  """Returns the images that have a label, and these labels, int32.

  Images whose label is LOST are included. The code that reads them then finds
  and reports that they are unreadable.
  """
  labels = source.labels(np.arange(len(source)))
  known = np.flatnonzero((labels >= 0) | (labels == LOST))
  if len(known) == len(source):
    return source, labels
  return Subset(source, known), labels[known]


def hold_out(
    source: Source, candidates: np.ndarray, labels: np.ndarray | None = None
) -> tuple[Source, Source]:
  """Holds out every tenth of `candidates`.

  Args:
    source: the source of the images.
    candidates: indices into the source, int64 [N].
    labels: labels of the candidates, int32 [N], all known. If given, a class is
      never held out completely: if the first of ten images is the last of its
      class, the next one is taken instead. If that holds for all ten, none is.

  Returns:
    The rest of the source, and the images held out.
  """
  held = candidates[::HOLD_OUT]
  if labels is not None:
    held = candidates[_spread(labels)]
  rest = np.setdiff1d(np.arange(len(source)), held, assume_unique=True)
  return Subset(source, rest), Subset(source, held)


def labelled_splits(
    where: str, train: Source, test: Source | None, remarks: tuple[str, ...]
) -> Splits:
  """Returns the splits of a set whose labels, if there are any, are at hand.

  Without labelled test images, every tenth labelled training image is held out,
  but never the last of a class.

  Args:
    where: name of the data set, for the note.
    train: the images to train on.
    test: the images to test on, perhaps without labels; None if there are none.
    remarks: further remarks for the note.
  """
  labels = train.labels(np.arange(len(train)))
  labelled = np.flatnonzero(labels >= 0)
  known = [] if test is None else np.flatnonzero(
      test.labels(np.arange(len(test))) >= 0
  )
  source: Source = train
  held: Source | None = None
  how = ''
  if len(known):
    held = Subset(test, known)
  elif len(labelled) > 1:
    source, held = hold_out(train, labelled, labels[labelled])
    labelled = np.flatnonzero(source.labels(np.arange(len(source))) >= 0)
    how = ' (every tenth labelled one, held out)'
  note = f'{where}: {len(source)} images'
  if not len(labelled) or held is None or not len(held):
    lacking = 'labels to test on' if train.classes else 'labels'
    note = '; '.join([f'{note} without {lacking}', *remarks])
    return Splits(source, None, None, note)
  unlabelled = len(source) - len(labelled)
  classes = f'{len(train.classes)} classes ({listed(train.classes, NAMED)})'
  note = '; '.join([
      f'{note} in {classes}'
      + (f', {unlabelled} of them without a label' if unlabelled else '')
      + f', {len(held)} to test on{how}',
      *remarks,
  ])
  return Splits(source, Subset(source, labelled), held, note)


def _spread(labels: np.ndarray) -> np.ndarray:
  """Returns, of every ten, the first whose class has another image left."""
  left = np.bincount(labels)
  chosen = []
  for start in range(0, len(labels), HOLD_OUT):
    for place, label in enumerate(labels[start:start + HOLD_OUT], start):
      if left[label] > 1:
        left[label] -= 1
        chosen.append(place)
        break
  return np.array(chosen, np.int64)
