"""The order of the examples, and batches of them read ahead of the device.

Which example stands at place p of the batch of step s is a pure function of
(seed, s, p): a restart needs nothing but s, and the global batch is the same
on any number of hosts. An epoch is one permutation; what is left of it after
the last full batch is dropped, as in the original.
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

# Streams of random words; epochs have the 0.
CROPS, REPLACEMENTS, RECOLOURS = 1, 2, 3
RECOLOUR_WORDS = 32
# Other examples tried in place of an unreadable one.
TRIES = 50
# Seconds between two looks whether to go on waiting for a batch.
LOOK = 0.2
# Side of the crop by which an image is read again, to say what is wrong.
REREAD = 224


class Batch(NamedTuple):
  """A part of the global batch.

  Attributes:
    images: uint8 [B, H, W, C] if the source has one size; else the crops of
      the V views, [B, V, S, S, C].
    unreadable: int32 [B], an example that had to be replaced; -1 where none.
    stop: int32 [B], in evaluations: 1 if this process has been asked to end.
    labels: int32 [B], where they are wanted; -1 where there is none.
  """

  images: np.ndarray
  unreadable: np.ndarray
  stop: np.ndarray | None = None
  labels: np.ndarray | None = None


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns a permutation of range(num_examples), pure in the arguments, int64.

  Sorting raw Philox words instead of asking numpy for a permutation keeps the
  order fixed over numpy versions (only raw bit streams are guaranteed), and
  costs 0.1 us an example where Grain's own index shuffle costs 25.
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
  return np.argsort(bits.random_raw(num_examples), kind='stable')


def random_words(
    seed: int, place: int, stream: int, count: int
) -> np.ndarray:
  """Returns raw random words, uint64 [count], pure in the arguments."""
  bits = np.random.Philox(
      key=np.array([seed, place], np.uint64),
      counter=np.array([0, 0, 0, stream], np.uint64),
  )
  return bits.random_raw(count)


def draw_boxes(
    seed: int, place: int, height: int, width: int, views: Views
) -> list[crops.Box]:
  """Draws the crops of the example at a place of the sequence, one per view.

  Args:
    seed: of the run.
    place: step * batch size + place in the global batch.
    height, width: of the image, pixels.
    views: their tables.
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
    positions: int64 [local batch], places in the global batch.
    batch_size: global, images.
    seed: of the order and the crops.
    views: their crops, where the host makes them.
    size: side of those crops, pixels.
    workers: read and decode.
    labelled: whether batches have labels.
    recolour: an augmentation on the host, of each crop: (uint8 [H, W, C],
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
    """Returns the examples of this step's local part, int64 [local batch]."""
    steps_per_epoch = len(self.source) // self.batch_size
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    order = _cached_order(self.seed, epoch, len(self.source))
    return order[step_in_epoch * self.batch_size + self.positions]

  def __call__(self, step: int) -> Batch:
    """Reads the local part of a step's batch.

    Raises:
      UserError: if in place of an unreadable example TRIES others could not
        be read either.
    """
    indices = self.indices(step)
    places = step * self.batch_size + self.positions
    images, read = self.workers.read(self._rows, indices, places)
    unreadable = np.where(read == indices, -1, indices).astype(np.int32)
    labels = self.source.labels(read) if self.labelled else None
    return Batch(images, unreadable, labels=labels)

  @functools.cached_property
  def _rows(self) -> 'BatchReader':
    """What other processes need of this reader."""
    return dataclasses.replace(
        self, workers=None, positions=self.positions[:0]
    )

  def read_row(self, out: np.ndarray, index: int, place: int) -> int:
    """Reads one example, or another one in its place; see `RowReader`.

    Raises:
      UserError: as a call.
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
      out: uint8 of `shape`; the pixels go there.
      index: of the example in the source.
      place: step * batch size + place in the global batch.

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
    why = 'it was itself drawn in its place'
    for index in (words % np.uint64(len(self.source))).tolist():
      if index == bad:  # It may have become readable, but is not to be.
        continue
      try:
        self.read_into(out, index, place)
        return index
      except Unreadable as e:
        why = f'{console.shown(self.source.name(index))}: {e}'
    raise UserError(
        f'{TRIES + 1} images in a row could not be read; the last is {why}'
    )


@functools.lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  return epoch_order(seed, epoch, num_examples)


def read_crops(
    source: Source, index: int,
    boxes: Callable[[int, int], list[crops.Box]], out: np.ndarray,
) -> None:
  """Reads one image: whole, of a source of one size, else boxes of it.

  Args:
    source: of the image.
    index: of the image.
    boxes: (height, width) of the image -> its boxes.
    out: uint8; the pixels go there.

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
  """Returns what is wrong with an image that could not be read, on one line."""
  boxes = lambda height, width: [crops.centre_box(height, width)]
  shape = source.shape or (1, REREAD, REREAD, source.channels)
  out = np.empty(shape, np.uint8)
  try:
    read_crops(source, index, boxes, out)
  except Unreadable as e:
    return ' '.join(str(e).split())
  return 'could not be read then, can be now'


def pixels(source: Source, data: bytes | np.ndarray) -> np.ndarray:
  """Returns what `source.read` gave as pixels, for a source of one size.

  Raises:
    Unreadable: if it is damaged, or has another size.
  """
  if isinstance(data, bytes):
    # As before there was any other gray: a continued run reads the same.
    data = channels.opened(data, 3).pixels()
    if source.channels == 1:
      data = cv2.cvtColor(data, cv2.COLOR_RGB2GRAY)[..., None]
  if data.shape != source.shape:
    raise Unreadable(f'has shape {data.shape}, not {source.shape}')
  return data


def train_batches(
    reader: BatchReader, first_step: int, last_step: int, prefetch: int
) -> Iterator[Batch]:
  """Batches of steps first_step .. last_step - 1, read ahead in a thread.

  Args:
    reader: reads the batch of a step.
    first_step, last_step: the steps to read, the last one excluded.
    prefetch: batches held ready.

  Yields:
    Batch of this process's part.
  """
  steps = grain.MapDataset.range(first_step, last_step)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  return iter(steps.map(reader).to_iter_dataset(options))


def until_asked(
    batches: Iterator[Batch], stop_asked: Callable[[], bool]
) -> Iterator[Batch]:
  """Yields batches, and ends if it is asked to while it waits for one.

  What reads the batch then, such as a file on a network that does not answer,
  goes on in a thread that nobody waits for.
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
  """Yields all examples once, in order; the last batch repeats the last one.

  Args:
    source: the examples.
    positions: int64 [local batch], places in the global batch.
    batch_size: global, images.
    size: side of the central crop, pixels, of a source with many sizes.
    workers: read and decode.

  Yields:
    Batch, ceil(len(source) / batch_size) times; its images [B, H, W, C] are
    central crops or, of a source with one size, whole. An unreadable one is
    black.
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
    source: of the images.
    size: side of the crop, pixels, where their sizes differ.
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
