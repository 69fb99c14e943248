"""Weighted k-nearest-neighbour classification of backbone features.

The monitor of [P] App. A, which refers to Wu et al. 2018 (arXiv 1805.01978):
cosine similarity, k = 200, votes weighted by exp(similarity / 0.07).
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.data import sources
from mocov3_jax.data.sources import Splits
from mocov3_jax.evals.features import Extract
from mocov3_jax.models.layers import unit
from mocov3_jax.parallel import sharding

PyTree = Any
# Queries compared with the whole bank at once: their similarities to 1.28 M
# images are 1.3 GB. The bank itself lies on every device, twice while it is
# normalised: 8 GB of 768 numbers an image, 20 GB of ResNet-50's 2,048;
# `knn.bank_images` bounds it.
QUERY_BLOCK = 256


def nearest(
    queries: jax.Array, bank: jax.Array, k: int,
    own: np.ndarray | None = None, mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Finds each query's k nearest neighbours, exactly, a block at a time.

  Args:
    queries: [Q, D]; scaled to unit length here.
    bank: [N, D]; likewise.
    k: neighbours, at most N; of equal ones the first in the bank win.
    own: int [Q], the row of the bank that is the query itself, which is no
      neighbour of its own; None = the queries are not in the bank.
    mesh: over whose devices the queries of a block are split; the bank lies
      on each of them.

  Returns:
    Cosines float32 [Q, k], falling, and places in the bank, int32 [Q, k].
  """
  queries, bank = unit(queries), unit(bank)
  count, width = queries.shape

  def block(part):
    if mesh is not None:
      part = jax.lax.with_sharding_constraint(
          part, sharding.batch_sharding(mesh)
      )
    q, its_own = part  # [QUERY_BLOCK, D], [QUERY_BLOCK] or None
    similarity = jnp.matmul(q, bank.T, precision=jax.lax.Precision.HIGHEST)
    if its_own is not None:
      itself = its_own[:, None] == jnp.arange(len(bank))[None]
      similarity = jnp.where(itself, -jnp.inf, similarity)
    return jax.lax.top_k(similarity, k)

  padding = -count % QUERY_BLOCK
  blocks = jnp.pad(queries, ((0, padding), (0, 0)), mode='edge')
  blocks = blocks.reshape(-1, QUERY_BLOCK, width)
  if own is not None:
    own = jnp.pad(own, (0, padding), mode='edge').reshape(-1, QUERY_BLOCK)
  found = jax.lax.map(block, (blocks, own))
  found = jax.tree.map(lambda x: x.reshape(-1, k)[:count], found)
  if mesh is not None:  # Whole on every device, for every process to read.
    found = jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))
  return found


def count_votes(
    similarity: jax.Array, labels: jax.Array, *, num_classes: int,
    temperature: float,
) -> jax.Array:
  """Sums the votes of each query's neighbours.

  Args:
    similarity: cosines [Q, k], falling.
    labels: of the neighbours, int [Q, k]; -1 does not vote.
    num_classes: number of labels.
    temperature: of the weights exp(cosine / temperature).

  Returns:
    float32 [Q, num_classes], each row up to a positive factor.
  """
  # Over the nearest one's weight, which cannot overflow.
  weight = jnp.exp((similarity - similarity[:, :1]) / temperature)

  # One neighbour of every query after the other: [Q, k, classes] is large.
  def add(votes, neighbour):
    its_weight, its_label = neighbour  # [Q]
    vote = its_weight[:, None] * jax.nn.one_hot(its_label, num_classes)
    return votes + vote, None

  votes = jnp.zeros((len(labels), num_classes), weight.dtype)
  return jax.lax.scan(add, votes, (weight.T, labels.T))[0]


_find = jax.jit(nearest, static_argnames=('k', 'mesh'))
_vote = jax.jit(count_votes, static_argnames=('num_classes', 'temperature'))


def capped_k(k: int, bank_size: int, num_classes: int) -> int:
  """k, but at most a sixth of the mean number of bank images a class.

  200 neighbours are a sixth of ImageNet's 1,281 images a class. On a small
  bank, k near the size of a class or beyond lets the other classes vote.
  """
  return max(1, min(k, bank_size // num_classes // 6))


def build(
    knn: ConfigDict, extract: Extract, splits: Splits, mesh: Mesh
) -> Callable[[PyTree, PyTree], dict[str, float]]:
  """Returns an evaluator, f(params, batch_stats) -> metrics.

  The metrics are 'knn/top1', the share of test images classified right, and
  'knn/k', the neighbours asked. Images that cannot be read are left out.

  Args:
    knn: `config.knn`.
    extract: features of a source.
    splits: their bank and their test split, both labelled.
    mesh: to work on.

  Raises:
    UserError: if one of them has no label after all.
  """
  bank, queries = banked(knn, splits)

  def evaluate(params, batch_stats):
    read = functools.partial(_read, extract, params, batch_stats)
    (row,) = _classify(
        read(queries), read(bank), splits.train.num_classes, (knn.k,),
        (knn.temperature,), mesh,
    )
    return {'knn/top1': row['top1'], 'knn/k': row['k']}

  return evaluate


Labelled = tuple[sources.Source, np.ndarray]
# Features [N, D] of the images that could be read, and their labels, int [N].
Known = tuple[jax.Array, np.ndarray]


def banked(knn: ConfigDict, splits: Splits) -> tuple[Labelled, Labelled]:
  """The labelled images to remember, and those to classify, with labels.

  Raises:
    UserError: if there are none.
  """
  found = []
  for name, source, count in (
      ('bank', splits.bank, knn.bank_images),
      ('test', splits.test, knn.query_images),
  ):
    images, labels = sources.labelled(sources.evenly(source, count))
    if not len(labels):
      raise UserError(
          f'none of the {name} images for kNN has a label. Allowed: a split '
          'with labels.'
      )
    found.append((images, labels))
  return found[0], found[1]


def table(
    knn: ConfigDict, extract: Extract, splits: Splits, mesh: Mesh,
    params: PyTree, batch_stats: PyTree,
) -> dict[str, Any]:
  """Classifies once, for all k and temperatures.

  With `leave_one_out`, each image of both splits by all others.

  Returns:
    'top1' and 'test_images' for `k` and `temperature`; 'k', the neighbours
    asked; 'table', [{'k', 'temperature', 'top1'}, ...] with those and `more_k`
    and `more_temperatures`.

  Raises:
    UserError: if there are no labels.
  """
  bank, queries = banked(knn, splits)
  read = functools.partial(_read, extract, params, batch_stats)
  known, asked, own = read(bank), read(queries), None
  if knn.leave_one_out:
    known = asked = (
        jnp.concatenate([known[0], asked[0]]),
        np.concatenate([known[1], asked[1]]),
    )
    own = np.arange(len(known[1]))
  rows = _classify(
      asked, known, splits.train.num_classes, (knn.k, *knn.more_k),
      (knn.temperature, *knn.more_temperatures), mesh, own,
  )
  return {
      'top1': rows[0]['top1'], 'k': rows[0]['k'],
      'test_images': len(asked[1]), 'table': rows,
  }


def _read(
    extract: Extract, params: PyTree, batch_stats: PyTree, images: Labelled
) -> Known:
  source, labels = images
  features, readable = extract(params, batch_stats, source)
  return features, labels[readable]


def _classify(
    asked: Known, known: Known, classes: int, ks: Sequence[int],
    temperatures: Sequence[float], mesh: Mesh, own: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """The share classified right, for each k (after its cap) and temperature."""
  ks = [capped_k(k, len(known[1]), classes) for k in ks]
  similarity, index = _find(asked[0], known[0], k=max(ks), own=own, mesh=mesh)
  voters = jnp.asarray(known[1])[index]
  rows = []
  for k in dict.fromkeys(ks):
    for temperature in temperatures:
      votes = _vote(
          similarity[:, :k], voters[:, :k], num_classes=classes,
          temperature=temperature,
      )
      right = np.argmax(jax.device_get(votes), axis=1) == asked[1]
      rows.append({
          'k': k, 'temperature': temperature, 'top1': float(np.mean(right))
      })
  return rows
