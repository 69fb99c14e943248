"""Weighted k-nearest-neighbour classification of backbone features.

The monitor of [P] App. A, which refers to Wu et al. 2018 (arXiv 1805.01978):
cosine similarity, k = 200, votes weighted by exp(similarity / 0.07).
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.data import sources
from mocov3_jax.data.sources import Splits
from mocov3_jax.errors import UserError
from mocov3_jax.evals.features import Extract, unit

PyTree = Any
# Queries compared with the whole bank at once: 256 x 1.28 M similarities are
# 1.3 GB, within any accelerator.
QUERY_BLOCK = 256


def neighbour_votes(
    queries: jax.Array, bank: jax.Array, bank_labels: jax.Array, *,
    num_classes: int, k: int, temperature: float,
) -> jax.Array:
  """Sums the votes of each query's k nearest neighbours.

  Args:
    queries: [Q, D]; scaled to unit length here.
    bank: [N, D]; likewise.
    bank_labels: int [N].
    num_classes: number of labels.
    k: neighbours, at most N; of equal ones the first in the bank win.
    temperature: of the weights exp(cosine / temperature).

  Returns:
    float32 [Q, num_classes], each row up to a positive factor.
  """
  queries, bank = unit(queries), unit(bank)

  def block(q):  # [QUERY_BLOCK, D]
    similarity = jnp.matmul(q, bank.T, precision=jax.lax.Precision.HIGHEST)
    nearest, index = jax.lax.top_k(similarity, k)  # [QUERY_BLOCK, k]
    # Over the nearest one's weight, which cannot overflow.
    weight = jnp.exp((nearest - nearest[:, :1]) / temperature)
    votes = jax.nn.one_hot(bank_labels[index], num_classes)
    return jnp.einsum('qk,qkc->qc', weight, votes)

  padding = -len(queries) % QUERY_BLOCK
  blocks = jnp.pad(queries, ((0, padding), (0, 0)), mode='edge')
  blocks = blocks.reshape(-1, QUERY_BLOCK, queries.shape[1])
  votes = jax.lax.map(block, blocks)
  return votes.reshape(-1, num_classes)[: len(queries)]


def capped_k(k: int, bank_size: int, num_classes: int) -> int:
  """k, but at most a sixth of the mean number of bank images a class.

  200 neighbours are a sixth of ImageNet's 1,281 images a class. On a small
  bank, k near the size of a class or beyond lets the other classes vote.
  """
  return max(1, min(k, bank_size // num_classes // 6))


def build(
    knn: ConfigDict, extract: Extract, splits: Splits
) -> Callable[[PyTree, PyTree], dict[str, float]]:
  """Returns an evaluator, f(params, batch_stats) -> metrics.

  The metrics are 'knn/top1', the share of test images classified right, and
  'knn/k', the neighbours asked. Images that cannot be read are left out.

  Args:
    knn: `config.knn`.
    extract: features of a source.
    splits: their bank and their test split, both labelled.

  Raises:
    UserError: if one of them has no label after all.
  """
  bank, bank_labels = sources.labelled(
      sources.evenly(splits.bank, knn.bank_images)
  )
  queries, query_labels = sources.labelled(
      sources.evenly(splits.test, knn.query_images)
  )
  for name, labels in ('bank', bank_labels), ('test', query_labels):
    if not len(labels):
      raise UserError(
          f'none of the {name} images for kNN has a label. Allowed: a split '
          'with labels.'
      )
  num_classes = splits.train.num_classes
  k = capped_k(knn.k, len(bank), num_classes)
  vote = jax.jit(
      functools.partial(
          neighbour_votes,
          num_classes=num_classes, k=k, temperature=knn.temperature,
      )
  )

  def evaluate(params, batch_stats):
    asked, ask = extract(params, batch_stats, queries)
    known, remember = extract(params, batch_stats, bank)
    votes = vote(asked, known, jnp.asarray(bank_labels[remember]))
    predicted = np.argmax(jax.device_get(votes), axis=1)
    top1 = float(np.mean(predicted == query_labels[ask]))
    return {'knn/top1': top1, 'knn/k': k}

  return evaluate
