"""Orders the examples, and reads batches of them ahead of the device.

The example at position p in the batch of step s is a pure function of
(seed, s, p). So a restart needs nothing but s, and the global batch is the same
on any number of hosts. An epoch is one permutation of the examples. Those left
over after its last full batch are dropped, as in the release.
"""

from collections.abc import Callable, Hashable, Iterator
from concurrent import futures
import dataclasses
import functools
import threading
from typing import NamedTuple

import cv2
import grain
import numpy as np

from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.data import channels, crops
from mocov3_jax.data.workers import Workers
from mocov3_jax.method.augment import Views
from mocov3_jax.sources import Source, Unreadable

# Streams of random words; stream 0 orders the epochs.
CROPS, REPLACEMENTS, RECOLOURS = 1, 2, 3
RECOLOUR_WORDS = 32
# Other examples tried in place of an unreadable one.
TRIES = 50
# Seconds between two checks whether to go on waiting for a batch.
LOOK = 0.2
# Side of the crop, pixels, when an image is read again to find what is wrong.
REREAD = 224


class Batch(NamedTuple):
  """A part of the global batch.

  Attributes:
    images: uint8 [B, H, W, C] if all images of the source have one size; else
      the crops of the V views, [B, V, S, S, C].
    unreadable: int32 [B], index of the example if it could not be read; else
      -1.
    stop: int32 [B], only in evaluations: 1 if this process was asked to stop.
    labels: int32 [B], if they are wanted; -1 for examples without a label.
  """

  images: np.ndarray
  unreadable: np.ndarray
  stop: np.ndarray | None = None
  labels: np.ndarray | None = None


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns a permutation of range(num_examples), int64.

  It depends on the arguments only. Sorting raw Philox words, instead of asking
  NumPy for a permutation, keeps the order fixed over NumPy versions (only raw
  bit streams are guaranteed). It costs 0.1 us per example, where Grain's own
  index shuffle costs 25 us.
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
  return np.argsort(bits.random_raw(num_examples), kind='stable')


def random_words(
    seed: int, place: int, stream: int, count: int
) -> np.ndarray:
  """Returns random words, uint64 [count], that depend on the arguments only."""
  bits = np.random.Philox(
      key=np.array([seed, place], np.uint64),
      counter=np.array([0, 0, 0, stream], np.uint64),
  )
  return bits.random_raw(count)


def draw_boxes(
    seed: int, place: int, height: int, width: int, views: Views
) -> list[crops.Box]:
  """Draws the crops, one per view, of the example at a place in the sequence.

  Args:
    seed: seed of the run.
    place: step * batch size + position in the global batch.
    height, width: size of the image, pixels.
    views: config tables of the views.
  """
  words = random_words(seed, place, CROPS, len(views) * crops.NUMBERS)
  numbers = (words >> np.uint64(11)) * 2.0**-53  # Uniform in [0, 1).
  return [
      crops.random_box(n, height, width, view)
      for n, view in zip(np.split(numbers, len(views)), views, strict=True)
  ]


@dataclasses.dataclass(frozen=True)
class BatchReader:
  """Reads this process's part of the global batch of any step.

  Attributes:
    source: the examples.
    positions: int64 [local batch], positions in the global batch.
    batch_size: global batch size, images.
    seed: seed of the order and the crops.
    views: config tables of the views, used if the host makes the crops.
    size: side of these crops, pixels.
    workers: read and decode the images.
    labelled: whether batches have labels.
    recolour: an augmentation of each crop on the host: (uint8 [H, W, C],
      random words uint64 [RECOLOUR_WORDS]) -> uint8 of that shape.
  """

  source: Source
  positions: np.ndarray
  batch_size: int
  seed: int
  views: Views
  size: int
  workers: Workers | None
  labelled: bool = False
  recolour: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

  def indices(self, step: int) -> np.ndarray:
    """Returns the example indices of this step's part, int64 [local batch]."""
    steps_per_epoch = len(self.source) // self.batch_size
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    order = _cached_order(self.seed, epoch, len(self.source))
    return order[step_in_epoch * self.batch_size + self.positions]

  def __call__(self, step: int) -> Batch:
    """Reads this process's part of a step's batch.

    Raises:
      UserError: if an example is unreadable, and none of the TRIES examples
        drawn to replace it could be read either.
    """
    indices = self.indices(step)
    places = step * self.batch_size + self.positions
    images, read = self.workers.read(self._rows, indices, places)
    unreadable = np.where(read == indices, -1, indices).astype(np.int32)
    labels = self.source.labels(read) if self.labelled else None
    return Batch(images, unreadable, labels=labels)

  @functools.cached_property
  def _rows(self) -> 'BatchReader':
    """A copy with only what other processes need in order to read rows."""
    return dataclasses.replace(
        self, workers=None, positions=self.positions[:0]
    )

  def read_row(self, out: np.ndarray, index: int, place: int) -> int:
    """Reads one example, or a replacement if it is damaged; see `RowReader`.

    Raises:
      UserError: as `__call__` does.
    """
    try:
      self.read_into(out, index, place)
      return index
    except Unreadable:
      return self._replace(out, place, index)

  @property
  def key(self) -> Hashable:
    """See `RowReader`."""
    return id(self)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of an example in a batch."""
    return self.source.shape or (
        len(self.views), self.size, self.size, self.source.channels
    )

  def read_into(self, out: np.ndarray, index: int, place: int) -> None:
    """Reads one example, with the crops of its place in the sequence.

    Args:
      out: uint8 of `shape`; receives the pixels.
      index: index of the example in the source.
      place: step * batch size + position in the global batch.

    Raises:
      Unreadable: if it is damaged.
    """
    def boxes(height, width):
      return draw_boxes(self.seed, place, height, width, self.views)

    read_crops(self.source, index, boxes, out)
    if self.recolour:
      parts = out.reshape(-1, *out.shape[-3:])  # A view of `out`.
      words = random_words(
          self.seed, place, RECOLOURS, len(parts) * RECOLOUR_WORDS
      )
      for part, its in zip(parts, np.split(words, len(parts)), strict=True):
        part[...] = self.recolour(part, its)

  def _replace(self, out: np.ndarray, place: int, bad: int) -> int:
    words = random_words(self.seed, place, REPLACEMENTS, TRIES)
    why = 'each image drawn in its place was that image again'
    for index in (words % np.uint64(len(self.source))).tolist():
      if index == bad:  # Even if it has become readable since.
        continue
      try:
        self.read_into(out, index, place)
        return index
      except Unreadable as e:
        why = f'the last is {console.shown(self.source.name(index))}: {e}'
    raise UserError(
        f'{TRIES + 1} images in a row could not be read; {why}'
    )


@functools.lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  return epoch_order(seed, epoch, num_examples)


def read_crops(
    source: Source, index: int,
    boxes: Callable[[int, int], list[crops.Box]], out: np.ndarray,
) -> None:
  """Reads one image: whole, if the source has one size, or else boxes of it.

  Args:
    source: the source of the image.
    index: index of the image in the source.
    boxes: (height, width) of the image -> its boxes.
    out: uint8; receives the pixels.

  Raises:
    Unreadable: if it is damaged.
  """
  data = source.read(index)
  if source.shape:
    out[...] = pixels(source, data)
    return
  encoded = channels.opened(data, source.channels)
  crops.cut(encoded, boxes(encoded.height, encoded.width), out)


def why_unreadable(source: Source, index: int) -> str:
  """Returns, on one line, why an image could not be read."""
  boxes = lambda height, width: [crops.centre_box(height, width)]
  shape = source.shape or (1, REREAD, REREAD, source.channels)
  out = np.empty(shape, np.uint8)
  try:
    read_crops(source, index, boxes, out)
  except Unreadable as e:
    return ' '.join(str(e).split())
  return 'could not be read at first, but can be read now'


def pixels(source: Source, data: bytes | np.ndarray) -> np.ndarray:
  """Converts the result of `source.read` to pixels, for a source of one size.

  Raises:
    Unreadable: if it is damaged, or has another size.
  """
  if isinstance(data, bytes):
    # Gray is made from RGB, as in earlier versions, so that a continued run
    # reads the same pixels.
    data = channels.opened(data, 3).pixels()
    if source.channels == 1:
      data = cv2.cvtColor(data, cv2.COLOR_RGB2GRAY)[..., None]
  if data.shape != source.shape:
    raise Unreadable(f'has shape {data.shape}, not {source.shape}')
  return data


def train_batches(
    reader: BatchReader, first_step: int, last_step: int, prefetch: int
) -> Iterator[Batch]:
  """Yields the batches of steps first_step .. last_step - 1, read in a thread.

  Args:
    reader: reads the batch of a step.
    first_step, last_step: the steps to read, the last one excluded.
    prefetch: number of batches read ahead.

  Yields:
    This process's part of each batch.
  """
  steps = grain.MapDataset.range(first_step, last_step)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  return iter(steps.map(reader).to_iter_dataset(options))


def until_asked(
    batches: Iterator[Batch], stop_asked: Callable[[], bool]
) -> Iterator[Batch]:
  """Yields batches, and ends if it is asked to stop while it waits for one.

  The unfinished read, perhaps of a file on a network that does not answer, goes
  on in a daemon thread that nobody waits for.
  """
  def read(found):
    try:
      found.set_result(next(batches, None))
    except Exception as e:
      found.set_exception(e)

  while True:
    found = futures.Future()
    threading.Thread(target=read, args=[found], daemon=True).start()
    while not futures.wait([found], timeout=LOOK).done:
      if stop_asked():
        return
    if found.result() is None:
      return
    yield found.result()


def eval_batches(
    source: Source, positions: np.ndarray, batch_size: int, size: int,
    workers: Workers,
) -> Iterator[Batch]:
  """Yields all examples once, in order.

  The last batch is filled up with copies of the last example.

  Args:
    source: the examples.
    positions: int64 [local batch], positions in the global batch.
    batch_size: global batch size, images.
    size: side of the central crop, pixels, if the images differ in size.
    workers: read and decode the images.

  Yields:
    Batch, ceil(len(source) / batch_size) times. Its images [B, H, W, C] are
    central crops or, if the source has one size, whole images. An unreadable
    image is black.
  """
  reader = _CentreReader(source, size)
  for start in range(0, len(source), batch_size):
    indices = np.minimum(start + positions, len(source) - 1)
    images, read = workers.read(reader, indices, indices)
    unreadable = np.where(read < 0, indices, -1).astype(np.int32)
    yield Batch(images, unreadable)


@dataclasses.dataclass(frozen=True)
class _CentreReader:
  """Reads the central crop of an image, as a `RowReader`.

  Attributes:
    source: the source of the images.
    size: side of the crop, pixels, if the images differ in size.
  """

  source: Source
  size: int

  @property
  def key(self) -> Hashable:
    return id(self.source), self.size

  @property
  def shape(self) -> tuple[int, ...]:
    return self.source.shape or (self.size, self.size, self.source.channels)

  def read_row(self, out: np.ndarray, index: int, place: int) -> int:
    del place
    boxes = lambda height, width: [crops.centre_box(height, width)]
    try:
      read_crops(self.source, index, boxes, out[None])
      return index
    except Unreadable:
      out[...] = 0
      return -1
