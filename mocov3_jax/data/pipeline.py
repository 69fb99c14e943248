"""The order of the examples, and batches of them read ahead of the device.

Which example stands at place p of the batch of step s is a pure function of
(seed, s, p): a restart needs nothing but s, and the global batch is the same
on any number of hosts. An epoch is one permutation; what is left of it after
the last full batch is dropped, as in the original.
"""

from collections.abc import Iterator

import grain
import numpy as np

from mocov3_jax.data.sources import Source


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """A permutation of range(num_examples), int64, pure in its arguments.

  Sorting raw Philox words instead of asking numpy for a permutation keeps the
  order fixed over numpy versions (only raw bit streams are guaranteed), and
  costs 0.1 us an example where Grain's own index shuffle costs 25.
  """
  bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
  return np.argsort(bits.random_raw(num_examples), kind='stable')


class BatchReader:
  """Reads this process's part of the global batch of any step.

  Attributes:
    source: the examples.
    positions: int64 [local batch], places in the global batch.
    batch_size: global, images.
    seed: of the order.
  """

  def __init__(
      self, source: Source, positions: np.ndarray, batch_size: int, seed: int
  ):
    self.source = source
    self.positions = positions
    self.batch_size = batch_size
    self.seed = seed
    self._order = (-1, np.empty(0, np.int64))  # Of the last epoch asked for.

  def indices(self, step: int) -> np.ndarray:
    """Returns the examples of this step's local part, int64 [local batch]."""
    steps_per_epoch = len(self.source) // self.batch_size
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    cached, order = self._order  # Read at once: readers run in threads.
    if cached != epoch:
      order = epoch_order(self.seed, epoch, len(self.source))
      self._order = (epoch, order)
    return order[step_in_epoch * self.batch_size + self.positions]

  def __call__(self, step: int) -> np.ndarray:
    """Returns uint8 images [local batch, H, W, C]."""
    return self.source.take(self.indices(step))


def train_batches(
    reader: BatchReader, first_step: int, last_step: int, prefetch: int
) -> Iterator[np.ndarray]:
  """Batches of steps first_step .. last_step - 1, read ahead in a thread.

  Args:
    reader: reads the batch of a step.
    first_step, last_step: the steps to read, the last one excluded.
    prefetch: batches held ready.

  Yields:
    uint8 images [local batch, H, W, C].
  """
  steps = grain.MapDataset.range(first_step, last_step)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  return iter(steps.map(reader).to_iter_dataset(options))


def eval_batches(
    source: Source, positions: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
  """All examples once, in order; the last batch repeats the last example.

  Args:
    source: the examples.
    positions: int64 [local batch], places in the global batch.
    batch_size: global, images.

  Yields:
    uint8 images [local batch, H, W, C], ceil(len(source) / batch_size) times.
  """
  for start in range(0, len(source), batch_size):
    yield source.take(np.minimum(start + positions, len(source) - 1))
