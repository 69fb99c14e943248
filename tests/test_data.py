"""Sources and the order of examples."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mocov3_jax.data import pipeline, sources
from mocov3_jax.errors import UserError


def numbered(n):
  """A source whose images tell their index."""
  images = np.arange(n).astype(np.uint8).reshape(n, 1, 1, 1)
  return sources.Source(images, np.arange(n, dtype=np.int32) % 10, 10)


def batch_numbers(batch):
  return batch[:, 0, 0, 0].tolist()


def test_digits_are_split_once_and_for_all():
  splits = sources.load('digits')
  assert (len(splits.train), len(splits.test)) == (1437, 360)
  assert splits.train.images.shape == (1437, 8, 8, 1)
  assert splits.train.images.dtype == np.uint8
  assert splits.train.images.max() == 255
  for source in splits.train, splits.test:
    assert set(source.labels) == set(range(10))


def test_unknown_source_suggests_the_nearest():
  with pytest.raises(UserError, match="Did you mean 'digits'"):
    sources.load('digit')


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
  reader = pipeline.BatchReader(numbered(23), np.arange(5), 5, seed=0)
  epochs = [
      sum((batch_numbers(reader(s)) for s in range(e * 4, e * 4 + 4)), [])
      for e in range(3)
  ]
  for numbers in epochs:
    assert len(set(numbers)) == 20
  assert len({tuple(e) for e in epochs}) == 3


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_hosts_share_the_same_global_batch(hosts):
  source = numbered(40)
  whole = pipeline.BatchReader(source, np.arange(8), 8, seed=3)
  parts = [
      pipeline.BatchReader(source, p, 8, seed=3)
      for p in np.split(np.arange(8), hosts)
  ]
  for step in (0, 3, 11):
    together = sum((batch_numbers(part(step)) for part in parts), [])
    assert together == batch_numbers(whole(step))


def test_batches_can_start_at_any_step():
  reader = pipeline.BatchReader(numbered(40), np.arange(8), 8, seed=0)
  straight = list(map(batch_numbers, pipeline.train_batches(reader, 0, 12, 2)))
  resumed = list(map(batch_numbers, pipeline.train_batches(reader, 7, 12, 2)))
  assert len(straight) == 12 and straight[7:] == resumed


def test_evaluation_reads_every_example_once_in_order():
  batches = list(pipeline.eval_batches(numbered(11), np.arange(4), 4))
  assert sum(map(batch_numbers, batches), [])[:11] == list(range(11))
  assert all(len(b) == 4 for b in batches)
