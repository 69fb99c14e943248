"""Sources and the order of examples."""

import dataclasses
import io

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_digits
import tiny

from mocov3_jax import sources
from mocov3_jax.base.errors import UserError
from mocov3_jax.data import decode as decode_lib
from mocov3_jax.data import pipeline
from mocov3_jax.data.workers import Workers
from mocov3_jax.method import augment
from mocov3_jax.sources import Unreadable, catalog

VIEWS = augment.both_views(tiny.config().augment)


def numbered(n):
  """A source whose images tell their index."""
  images = np.arange(n).astype(np.uint8).reshape(n, 1, 1, 1)
  labels = np.arange(n, dtype=np.int32) % 10
  return sources.ArraySource('numbers', images, labels, tuple("0123456789"))


def reader(source, positions, batch_size, seed=0, threads=1):
  return pipeline.BatchReader(
      source, positions, batch_size, seed, VIEWS, 8,
      Workers(threads),
  )


def batch_numbers(batch):
  return batch.images[:, 0, 0, 0].tolist()


def test_digits_are_those_of_scikit_learn():
  data = load_digits()
  splits = catalog.load('digits')
  held_out = np.arange(len(data.images)) % 5 == 0
  for source, chosen in (splits.train, ~held_out), (splits.test, held_out):
    images = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(source.images, images[..., None])
    np.testing.assert_array_equal(
        source.labels(np.arange(len(source))), data.target[chosen]
    )


def test_digits_are_split_once_and_for_all():
  splits = catalog.load('digits')
  assert (len(splits.train), len(splits.test)) == (1437, 360)
  assert splits.train.images.shape == (1437, 8, 8, 1)
  assert splits.train.images.dtype == np.uint8
  assert splits.train.shape == (8, 8, 1)
  assert splits.train.images.max() == 255
  for source in splits.train, splits.test:
    labels = source.labels(np.arange(len(source)))
    assert set(labels) == set(range(10))


def test_unknown_source_suggests_the_nearest():
  with pytest.raises(UserError, match="Did you mean 'digits'"):
    catalog.load('digit')


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_an_epoch_is_a_permutation_of_seed_and_epoch(seed, epoch, n):
  order = pipeline.epoch_order(seed, epoch, n)
  assert sorted(order) == list(range(n))
  np.testing.assert_array_equal(order, pipeline.epoch_order(seed, epoch, n))


def test_orders_of_neighbouring_seeds_and_epochs_differ():
  orders = {
      tuple(pipeline.epoch_order(seed, epoch, 100))
      for seed in range(5) for epoch in range(5)
  }
  assert len(orders) == 25


def test_the_order_is_pinned():
  # Changing it would break the resumption of every run there is.
  assert pipeline.epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_an_epoch_drops_the_remainder_and_repeats_nothing():
  read = reader(numbered(23), np.arange(5), 5)
  epochs = [
      sum((batch_numbers(read(s)) for s in range(e * 4, e * 4 + 4)), [])
      for e in range(3)
  ]
  for numbers in epochs:
    assert len(set(numbers)) == 20
  assert len({tuple(e) for e in epochs}) == 3


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_hosts_share_the_same_global_batch(hosts):
  source = numbered(40)
  whole = reader(source, np.arange(8), 8, seed=3)
  parts = [
      reader(source, p, 8, seed=3) for p in np.split(np.arange(8), hosts)
  ]
  for step in (0, 3, 11):
    together = sum((batch_numbers(part(step)) for part in parts), [])
    assert together == batch_numbers(whole(step))


def test_batches_can_start_at_any_step():
  read = reader(numbered(40), np.arange(8), 8)
  straight = list(map(batch_numbers, pipeline.train_batches(read, 0, 12, 2)))
  resumed = list(map(batch_numbers, pipeline.train_batches(read, 7, 12, 2)))
  assert len(straight) == 12 and straight[7:] == resumed


def test_evaluation_reads_every_example_once_in_order():
  batches = list(pipeline.eval_batches(
      numbered(11), np.arange(4), 4, 8, Workers(2)
  ))
  assert sum(map(batch_numbers, batches), [])[:11] == list(range(11))
  assert all(len(b.images) == 4 for b in batches)


@dataclasses.dataclass
class Encoded:
  """PNGs of several sizes that tell their index; some are broken."""

  count: int
  broken: frozenset = frozenset()
  shape = None
  channels = 3
  classes = ()
  labels_at_hand = True

  def __len__(self):
    return self.count

  def read(self, index):
    if index in self.broken:
      raise Unreadable('broken')
    file = io.BytesIO()
    Image.new('RGB', (20 + index % 7, 16), (index, 0, 0)).save(file, 'PNG')
    return file.getvalue()

  def name(self, index):
    return f'image {index}'


def seen(batch):
  """The examples of a batch, told by the red of their first crops."""
  return batch.images[:, 0, 0, 0, 0].tolist()


@pytest.mark.parametrize('threads', [1, 3])
def test_the_crops_of_an_example_do_not_depend_on_hosts_or_threads(threads):
  source = Encoded(40)
  whole = reader(source, np.arange(8), 8)(5)
  assert whole.images.shape == (8, 2, 8, 8, 3)
  for part in np.split(np.arange(8), 4):
    local = reader(source, part, 8, threads=threads)(5)
    np.testing.assert_array_equal(local.images, whole.images[part])


def test_an_unreadable_image_is_replaced_the_same_way_every_time():
  source = Encoded(40, frozenset({3, 17}))
  read = reader(source, np.arange(40), 40)
  first, again = read(0), read(0)
  np.testing.assert_array_equal(first.images, again.images)
  assert set(first.unreadable.tolist()) == {-1, 3, 17}
  healthy = reader(Encoded(40), np.arange(40), 40)(0)
  for place in range(40):
    same = seen(first)[place] == seen(healthy)[place]
    assert same == (first.unreadable[place] < 0)
  assert not {3, 17} & set(seen(first))


def test_the_replacement_does_not_depend_on_hosts():
  source = Encoded(40, frozenset(range(0, 40, 3)))
  whole = reader(source, np.arange(20), 20)(1)
  for part in np.split(np.arange(20), 2):
    local = reader(source, part, 20)(1)
    np.testing.assert_array_equal(local.images, whole.images[part])
    np.testing.assert_array_equal(local.unreadable, whole.unreadable[part])


def test_a_source_without_any_readable_image_is_an_error():
  source = Encoded(10, frozenset(range(10)))
  with pytest.raises(UserError, match='could not be read; the last is image'):
    reader(source, np.arange(5), 5)(0)


def test_evaluation_tells_what_it_could_not_read():
  source = Encoded(10, frozenset({4}))
  batches = list(pipeline.eval_batches(
      source, np.arange(5), 5, 8, Workers(1)
  ))
  assert batches[0].images.shape == (5, 8, 8, 3)
  unreadable = np.concatenate([b.unreadable for b in batches])
  assert np.flatnonzero(unreadable >= 0).tolist() == [4]


def test_a_part_of_a_source_is_evenly_spaced():
  source = numbered(100)
  part = sources.evenly(source, 4)
  assert [part.read(i).item() for i in range(4)] == [0, 25, 50, 75]
  assert part.labels(np.arange(4)).tolist() == [0, 5, 0, 5]
  assert sources.evenly(source, 0) is source
  assert sources.evenly(source, 100) is source


def test_every_tenth_labelled_image_is_held_out():
  rest, held = sources.hold_out(numbered(50), np.arange(5, 50))
  numbers = [held.read(i).item() for i in range(len(held))]
  assert numbers == [5, 15, 25, 35, 45]
  assert len(rest) == 45
  assert not set(numbers) & {rest.read(i).item() for i in range(45)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.booleans())
def test_labels_change_the_held_out_only_where_a_class_would_vanish(
    labels, ordered
):
  labels = np.array(sorted(labels) if ordered else labels, np.int32)
  plain = np.arange(len(labels))[::10]
  rest, held = sources.hold_out(
      numbered(len(labels)), np.arange(len(labels)), labels
  )
  assert sorted([*rest.indices, *held.indices]) == list(range(len(labels)))
  assert set(labels[rest.indices]) == set(labels)
  vanishing = set(labels) - set(np.delete(labels, plain))
  if not vanishing:
    assert held.indices.tolist() == plain.tolist()


def test_the_next_image_is_held_out_in_place_of_the_last_of_its_class():
  labels = np.repeat([0, 1, 2, 3], [1, 1, 20, 1]).astype(np.int32)
  _, held = sources.hold_out(numbered(43), np.arange(20, 43), labels)
  assert held.indices.tolist() == [22, 30, 40]
  rest, held = sources.hold_out(
      numbered(12), np.arange(12), np.arange(12, dtype=np.int32)
  )
  assert len(rest) == 12 and len(held) == 0


def test_a_jpeg_of_another_size_than_its_header_says_so(monkeypatch):
  class OneJpeg:
    shape = None
    channels = 3

    def read(self, index):
      file = io.BytesIO()
      Image.new('RGB', (40, 30)).save(file, 'JPEG')
      return file.getvalue()

  decode = decode_lib.Encoded.pixels
  monkeypatch.setattr(
      decode_lib.Encoded, 'pixels',
      lambda self, shrink=1: decode(self, shrink)[1:],
  )
  assert 'decodes to (29, 40) pixels' in pipeline.why_unreadable(OneJpeg(), 0)
