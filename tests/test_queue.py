"""The queue monitor: first in, first out, classified before it enters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mocov3_jax.evals import knn_queue
from mocov3_jax.training import pretrain


def empty(size, width):
  return knn_queue.Queue(
      jnp.zeros((size, width)), jnp.full(size, -1, jnp.int32),
      jnp.zeros((), jnp.int32),
  )


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_it_holds_exactly_the_last_features():
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(7, 4, 3)).astype(np.float32)
  labels = rng.integers(-1, 5, (7, 4))
  held = empty(12, 3)
  for x, y in zip(batches, labels, strict=True):
    held = knn_queue.push(held, jnp.asarray(x), jnp.asarray(y))
  order = (np.arange(12) + int(held.next)) % 12  # The oldest first.
  np.testing.assert_allclose(
      np.asarray(held.features)[order], unit(batches[4:].reshape(12, 3)),
      rtol=1e-5,
  )
  np.testing.assert_array_equal(
      np.asarray(held.labels)[order], labels[4:].reshape(12)
  )


def test_its_votes_are_counted_as_by_hand():
  rng = np.random.default_rng(1)
  features = rng.normal(size=(40, 6)).astype(np.float32)
  labels = rng.integers(0, 3, 40)
  labels[::7] = -1
  held = knn_queue.push(
      empty(60, 6), jnp.asarray(features), jnp.asarray(labels)
  )
  asked = rng.normal(size=(20, 6)).astype(np.float32)
  wanted = rng.integers(0, 3, 20)
  wanted[:5] = -1
  cosine = unit(asked) @ unit(features).T
  cosine[:, labels < 0] = -9
  right = 0
  for row, label in zip(cosine, wanted, strict=True):
    its = np.argsort(-row)[:5]
    votes = np.zeros(3)
    np.add.at(votes, labels[its], np.exp(row[its] / 0.1))
    right += label >= 0 and np.argmax(votes) == label
  found = knn_queue.queue_accuracy(
      held, jnp.asarray(asked), jnp.asarray(wanted), k=5, temperature=0.1,
      num_classes=3,
  )
  assert float(found) == pytest.approx(right / 15)


def test_an_image_whose_features_are_zero_spoils_no_vote():
  rng = np.random.default_rng(2)
  features = rng.normal(size=(40, 6)).astype(np.float32)
  features[0] = 0
  labels = rng.integers(1, 3, 40)
  asked = jnp.asarray(features[1:]), jnp.asarray(labels[1:])
  found = []
  for label in -1, 1:  # Without a vote, and with one.
    labels[0] = label
    held = knn_queue.push(
        empty(40, 6), jnp.asarray(features), jnp.asarray(labels)
    )
    found.append(knn_queue.queue_accuracy(
        held, *asked, k=5, temperature=0.1, num_classes=3
    ))
  assert found[0] == found[1] > 0.5
  # Where NaN would be sorted to depends on the device.
  assert jnp.isfinite(held.features).all()


@pytest.mark.parametrize(
    'share, n, batch, expected',
    [
        (0.1, 1_281_167, 4096, 31 * 4096), (0.1, 100, 64, 64),
        (1.0, 320, 64, 320),
    ],
)
def test_its_length_is_a_share_in_whole_batches(share, n, batch, expected):
  assert knn_queue.length(share, n, batch) == expected


@pytest.mark.slow
def test_it_watches_a_run_without_changing_it(tmp_path):
  plain = tiny.config(**{'schedule.steps': 12, 'schedule.warmup_epochs': 0.1})
  watched = tiny.config(**{
      'schedule.steps': 12, 'schedule.warmup_epochs': 0.1,
      'knn.queue_share': 0.2,
  })
  pretrain.pretrain(plain, str(tmp_path / 'plain'))
  pretrain.pretrain(watched, str(tmp_path / 'watched'))
  a, b = (tiny.metrics(tmp_path / name) for name in ('plain', 'watched'))
  for before, after in zip(a, b, strict=True):
    if 'train/loss' in before:
      assert after.pop('knn/queue_filled') == min(after['step'] * 64, 256) / 256
      assert 0 <= after.pop('knn/queue_top1') <= 1
    for name, value in before.items():
      np.testing.assert_allclose(after[name], value, rtol=1e-5, err_msg=name)
  assert jax.device_count() == 8  # Features and queue lie on all of them.


@pytest.mark.slow
def test_it_is_restored_with_the_rest(tmp_path):
  overrides = {
      'schedule.steps': 12, 'schedule.warmup_epochs': 0.1,
      'knn.queue_share': 0.2, 'save.every_steps': 6,
  }
  pretrain.pretrain(tiny.config(**overrides), str(tmp_path / 'a'))
  (tmp_path / 'a' / 'checkpoints' / '12').rename(tmp_path / 'gone')
  straight = tiny.metrics(tmp_path / 'a')
  pretrain.pretrain(tiny.config(**overrides), str(tmp_path / 'a'))
  assert tiny.metrics(tmp_path / 'a') == straight
