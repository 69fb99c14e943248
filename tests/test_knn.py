"""The kNN classifier against scikit-learn."""

import re
import types

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mocov3_jax import sources
from mocov3_jax.evals import knn
from mocov3_jax.evals.evaluator import EvalContext
from mocov3_jax.parallel import sharding


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def classify(queries, bank, labels, classes, k, temperature, own=None):
  """The votes of each query's neighbours."""
  similarity, index = knn.nearest(
      queries, bank, k, sharding.make_mesh(jax.devices()[:2]), own
  )
  return knn.count_votes(
      similarity, jnp.asarray(labels)[index], num_classes=classes,
      temperature=temperature,
  )


@pytest.mark.parametrize('k', [1, 5, 20, 200])
@pytest.mark.parametrize('temperature', [0.07, 0.5])
def test_votes_equal_scikit_learns_weighted_knn(k, temperature):
  rng = np.random.default_rng(k)
  labels = rng.integers(0, 7, 700)
  centres = rng.normal(size=(7, 64))
  bank = (centres[labels] + 2 * rng.normal(size=(700, 64))).astype(np.float32)
  query_labels = rng.integers(0, 7, 300)
  queries = centres[query_labels] + 2 * rng.normal(size=(300, 64))
  queries = queries.astype(np.float32)
  # On the unit sphere |a - b|^2 = 2 - 2 cosine.
  reference = KNeighborsClassifier(
      k, algorithm='brute',
      weights=lambda d: np.exp((1 - d**2 / 2) / temperature),
  ).fit(unit(bank), labels)
  votes = classify(queries, bank, labels, 7, k, temperature)
  shares = votes / votes.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(
      shares, reference.predict_proba(unit(queries)), atol=1e-4
  )
  np.testing.assert_array_equal(
      np.argmax(votes, axis=1), reference.predict(unit(queries))
  )


def random_set(n=1000, d=64, classes=7, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  centres = rng.normal(size=(classes, d))
  features = centres[labels] + 2 * rng.normal(size=(n, d))
  return features.astype(np.float32), labels


def by_hand(queries, bank, labels, classes, k, temperature):
  """Votes in float64; of equal neighbours the first in the bank win."""
  cosine = unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T
  order = np.argsort(-np.round(cosine, 6), axis=1, kind='stable')[:, :k]
  nearest = np.take_along_axis(cosine, order, 1)
  weight = np.exp((nearest - nearest[:, :1]) / temperature)
  votes = np.zeros((len(queries), classes))
  for row, (w, its) in enumerate(zip(weight, labels[order], strict=True)):
    np.add.at(votes[row], its, w)
  return votes


@pytest.mark.parametrize('k', [1, 2, 7, 50])
@pytest.mark.parametrize('temperature', [0.07, 0.2])
def test_equal_neighbours_are_taken_in_the_order_of_the_bank(k, temperature):
  bank, labels = random_set()
  # Every image three times, under labels of its own each time.
  bank = np.concatenate([bank[:300]] * 3)
  labels = labels[:900]
  queries, _ = random_set(n=200, seed=1)
  queries[:100] = bank[:100]  # Among them the images themselves.
  np.testing.assert_allclose(
      classify(queries, bank, labels, 7, k, temperature),
      by_hand(queries, bank, labels, 7, k, temperature), atol=1e-4,
  )


def test_nearest_are_the_nearest_and_never_the_query_itself():
  bank, _ = random_set(n=300, d=4)
  own = np.array([3, 299])
  mesh = sharding.make_mesh()
  cosine, index = knn.nearest(bank[own], bank, 5, mesh, own)
  for row, (i, found) in enumerate(zip(own, index, strict=True)):
    similarity = unit(bank) @ unit(bank)[i]
    similarity[i] = -2
    want = np.argsort(-similarity)[:5]
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(cosine[row], similarity[want], atol=1e-6)
  _, index = knn.nearest(bank[own], bank, 1, mesh)
  np.testing.assert_array_equal(index[:, 0], own)


def test_an_image_whose_features_are_zero_spoils_no_vote():
  bank, labels = random_set(n=300)
  queries, _ = random_set(n=20, seed=1)
  votes = classify(queries, bank, labels, 7, 9, 0.1)
  bank = np.concatenate([np.zeros_like(bank[:1]), bank])
  labels = np.concatenate([[0], labels])
  np.testing.assert_allclose(
      classify(queries, bank, labels, 7, 9, 0.1), votes, rtol=1e-5
  )
  # Where NaN would be sorted to depends on the device: so all, and itself.
  for asked, k in (queries, 301), (np.zeros_like(queries), 9):
    assert np.isfinite(classify(asked, bank, labels, 7, k, 0.1)).all()


@pytest.mark.parametrize('k', [1, 5, 100])
def test_leaving_one_out_equals_scikit_learns(k):
  features, labels = random_set(n=600)
  votes = classify(
      features, features, labels, 7, k, 0.1, own=np.arange(600)
  )
  found = np.argmax(votes, axis=1)
  for i in range(0, 600, 40):
    reference = KNeighborsClassifier(
        k, algorithm='brute', weights=lambda d: np.exp((1 - d**2 / 2) / 0.1)
    ).fit(unit(np.delete(features, i, 0)), np.delete(labels, i))
    assert found[i] == reference.predict(unit(features[i:i + 1]))[0]


# More than a device has, and more devices than images.
@pytest.mark.parametrize('images, k', [(1000, 20), (1001, 200), (5, 5)])
def test_eight_devices_find_what_one_finds(images, k):
  bank, _ = random_set(n=images)
  queries, _ = random_set(n=300, seed=1)
  one = knn.nearest(queries, bank, k, sharding.make_mesh(jax.devices()[:1]))
  eight = knn.nearest(queries, bank, k, sharding.make_mesh())
  np.testing.assert_allclose(eight[0], one[0], atol=1e-6)
  # Rounding may exchange two that are as near as that.
  apart = np.abs(np.diff(one[0], append=-2)) > 1e-5
  apart[:, 1:] &= apart[:, :-1]
  assert apart.mean() > 0.5
  np.testing.assert_array_equal(eight[1][apart], one[1][apart])


def test_no_device_holds_more_of_the_bank_than_its_share():
  bank, _ = random_set(n=1001)
  mesh = sharding.make_mesh()
  split = sharding.spread(bank, mesh)
  shares = [shard.data for shard in split.addressable_shards]
  assert [share.shape for share in shares] == [(126, 64)] * 8
  np.testing.assert_array_equal(np.concatenate(shares)[:1001], bank)
  blocks = np.zeros((2, knn.QUERY_BLOCK, 64), np.float32)
  compiled = knn._nearest.lower(
      blocks, split, None, k=20, count=1001, mesh=mesh
  ).compile()
  # Nor is it, or are the similarities to it, gathered on the way: a query
  # brings 20 candidates of each device.
  gathered = [
      int(np.prod([int(n) for n in shape.split(',')]))
      for shape in re.findall(
          r'= \(?\w+\[([\d,]+)\]\S* all-gather', compiled.as_text()
      )
  ]
  assert gathered and max(gathered) <= knn.QUERY_BLOCK * 20 * 8
  # Else no process of several could read what was found.
  assert all(s.is_fully_replicated for s in compiled.output_shardings)


def test_one_pass_gives_every_k_and_temperature():
  features, labels = random_set(n=700)
  c = ConfigDict({
      'k': 20, 'temperature': 0.07, 'more_k': (1, 5, 500),
      'more_temperatures': (0.5, 0.07), 'bank_images': 0, 'query_images': 0,
      'leave_one_out': False,
  })
  numbers = np.arange(700, dtype=np.int64).view(np.uint8).reshape(700, 1, 1, 8)
  source = sources.ArraySource(
      'x', numbers, labels.astype(np.int32), tuple('abcdefg')
  )
  bank = sources.Subset(source, np.arange(500))
  test = sources.Subset(source, np.arange(500, 700))

  def extract(params, batch_stats, part):
    places = [part.read(i).view(np.int64).item() for i in range(len(part))]
    return features[places], np.arange(len(part))

  mesh = sharding.make_mesh()
  splits = sources.Splits(bank, bank, test)
  found = knn.table(c, extract, splits, mesh, None, None)
  rows = {(r['k'], r['temperature']): r['top1'] for r in found['table']}
  assert len(rows) == len(found['table'])
  # 500 is capped at a sixth of the 71 images a class, as 20 is.
  assert sorted(rows) == [
      (k, t) for k in (1, 5, 11) for t in (0.07, 0.5)
  ]
  for (k, temperature), top1 in rows.items():
    votes = by_hand(
        features[500:], features[:500], labels[:500], 7, k, temperature
    )
    wanted = np.mean(np.argmax(votes, axis=1) == labels[500:])
    assert top1 == pytest.approx(wanted)
  assert found['top1'] == rows[11, 0.07] and found['test_images'] == 200
  c.leave_one_out = True
  all_out = knn.table(c, extract, splits, mesh, None, None)
  assert all_out['test_images'] == 700


@pytest.mark.parametrize(
    'n, classes, expected', [(1_281_167, 1000, 200), (1437, 10, 23), (8, 4, 1)]
)
def test_k_is_capped_on_small_banks(n, classes, expected):
  assert knn.capped_k(200, n, classes) == expected


def monitored(c, extract, splits):
  """What the monitor says of features that `extract` gives."""
  config = ConfigDict({
      'knn': c, 'micro_batch': 0, 'batch_size': 64,
      'data': {'max_unreadable': 1},
  })
  context = EvalContext(
      config, None, None, splits, sharding.make_mesh(),
      types.SimpleNamespace(workers=None),
  )
  state = types.SimpleNamespace(params=None, batch_stats=None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(knn.features_lib, 'extractor', lambda *_, **__: extract)
    return knn.monitor(context).measure(state)


def test_the_monitor_says_what_the_table_says_of_images_that_can_be_read():
  features, labels = random_set(n=700)
  numbers = np.arange(700, dtype=np.int64).view(np.uint8).reshape(700, 1, 1, 8)
  source = sources.ArraySource(
      'x', numbers, labels.astype(np.int32), tuple('abcdefg')
  )
  bank = sources.Subset(source, np.arange(500))
  test = sources.Subset(source, np.arange(500, 700))

  def extract(params, batch_stats, part):
    places = np.array(
        [part.read(i).view(np.int64).item() for i in range(len(part))]
    )
    readable = np.flatnonzero(places % 3)  # A third of them cannot be.
    return features[places[readable]], readable

  c = ConfigDict({
      'k': 20, 'temperature': 0.07, 'more_k': (), 'more_temperatures': (),
      'bank_images': 0, 'query_images': 0, 'leave_one_out': False,
      'every_steps': 0,
  })
  mesh, splits = sharding.make_mesh(), sources.Splits(bank, bank, test)
  monitor = monitored(c, extract, splits)
  found = knn.table(c, extract, splits, mesh, None, None)
  # A sixth of the 333 / 7 images a class that are left, not of the 500 / 7.
  assert found['k'] == monitor['knn/k'] == 7
  assert found['top1'] == monitor['knn/top1']
  assert monitor['knn/unreadable'] == 234  # Of 700, the multiples of 3.


def test_images_without_label_or_that_cannot_be_read_are_left_out():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(30, 4)).astype(np.float32)
  labels = np.repeat(np.arange(2, dtype=np.int32), 15)
  labels[::5] = -1
  source = sources.ArraySource(
      'x', np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1), labels,
      ('a', 'b'),
  )
  asked = []

  def extract(params, batch_stats, part):
    numbers = np.array([part.read(i).item() for i in range(len(part))])
    readable = np.flatnonzero(numbers != 7)
    asked.append(numbers[readable])
    # The label itself is the feature: each finds its own class.
    its = np.eye(2, dtype=np.float32)[labels[numbers[readable]]]
    return its + 0.01 * features[0, :2], readable

  c = ConfigDict({
      'k': 3, 'temperature': 0.1, 'bank_images': 0, 'query_images': 0,
      'every_steps': 0,
  })
  found = monitored(c, extract, sources.Splits(source, source, source))
  assert found['knn/top1'] == 1.0
  for numbers in asked:
    assert numbers.tolist() == [
        i for i in range(30) if i % 5 and i != 7
    ]
