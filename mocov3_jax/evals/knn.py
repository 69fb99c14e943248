"""Weighted k-nearest-neighbour classification of backbone features.

This is the monitor of the paper's appendix A, which refers to Wu et al. 2018
(arXiv 1805.01978): cosine similarity, k = 200, and votes weighted by
exp(similarity / 0.07).
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import sources
from mocov3_jax.base.errors import UserError
from mocov3_jax.evals import features as features_lib
from mocov3_jax.evals.evaluator import EvalContext, Evaluator, State
from mocov3_jax.evals.features import Extract
from mocov3_jax.models.layers import unit
from mocov3_jax.parallel import sharding
from mocov3_jax.sources import Source, Splits

PyTree = Any
# How many queries are compared with the whole bank at once. Their similarities
# to 1.28 M images take 1.3 GB, split over all devices. The bank is split, too:
# with ResNet-50's 2,048 features per image it takes 10 GB, and twice that while
# it is normalised.
QUERY_BLOCK = 256


class LabelledImages(NamedTuple):
  """Images that all have a label.

  Attributes:
    source: N images.
    labels: int [N].
  """

  source: Source
  labels: np.ndarray


class LabelledFeatures(NamedTuple):
  """Features of the labelled images that could be read.

  Attributes:
    features: [n, D], in the host's memory.
    labels: int [n].
    unreadable: how many labelled images could not be read.
  """

  features: np.ndarray
  labels: np.ndarray
  unreadable: int = 0


def nearest(
    queries: np.ndarray, bank: np.ndarray, k: int, mesh: Mesh,
    exclude_self: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds each query's k nearest neighbours, exactly.

  Args:
    queries: [Q, D]; scaled to unit length here.
    bank: [N, D]; scaled likewise. Each device of the mesh gets some of its
      rows.
    k: number of neighbours, at most N. Ties go to the first row of the bank.
    mesh: the mesh to compute on. All its processes pass the same arguments.
    exclude_self: int [Q], the row of the bank that is the query itself, and
      must not be its neighbour; None = the queries are not in the bank.

  Returns:
    Cosine similarities in descending order, float32 [Q, k], and rows of the
    bank, int32 [Q, k].
  """
  padding = -len(queries) % QUERY_BLOCK
  blocks = np.pad(queries, ((0, padding), (0, 0)), mode='edge')
  blocks = blocks.reshape(-1, QUERY_BLOCK, queries.shape[1])
  if exclude_self is not None:
    exclude_self = np.pad(exclude_self, (0, padding), mode='edge')
    exclude_self = exclude_self.reshape(-1, QUERY_BLOCK)
  found = _nearest(
      blocks, sharding.spread(bank, mesh), exclude_self, k=k, count=len(bank),
      mesh=mesh,
  )
  return jax.tree.map(
      lambda x: x.reshape(-1, k)[: len(queries)], jax.device_get(found)
  )


@functools.partial(jax.jit, static_argnames=('k', 'count', 'mesh'))
def _nearest(
    blocks: jax.Array, bank: jax.Array, exclude_self: jax.Array | None, *,
    k: int, count: int, mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
  """Finds neighbours for one block of queries [QUERY_BLOCK, D] after the other.

  Each device compares all queries of a block with its part of the bank and
  finds the best k there. Only these are gathered, and the best k of them kept.

  Args:
    blocks: the queries, [blocks, QUERY_BLOCK, D].
    bank: [N, D], with its rows split over the devices.
    exclude_self: int [blocks, QUERY_BLOCK], or None.
    k: number of neighbours.
    count: number of real rows of the bank; the rest is padding.
    mesh: the mesh that the bank is split over.

  Returns:
    Cosine similarities and rows, [blocks, QUERY_BLOCK, k], replicated.
  """
  axes = sharding.BATCH_AXES

  def of_part(q, excluded, part):
    """Returns the best k of this device's rows, [Q, k]."""
    row = jax.lax.axis_index(axes) * len(part) + jnp.arange(len(part))
    similarity = jnp.matmul(q, part.T, precision=jax.lax.Precision.HIGHEST)
    no_neighbour = jnp.broadcast_to(row >= count, similarity.shape)
    if excluded is not None:
      no_neighbour |= row[None] == excluded[:, None]
    similarity = jnp.where(no_neighbour, -jnp.inf, similarity)
    cosine, place = jax.lax.top_k(similarity, min(k, len(part)))
    return cosine, row[place]

  of_parts = jax.shard_map(
      of_part, mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(axes)),
      out_specs=PartitionSpec(None, axes),
  )
  bank = unit(bank)

  def block(queries):
    q, excluded = queries
    # The parts are in the order of the bank, so ties go to the first row.
    cosine, row = of_parts(unit(q), excluded, bank)  # [Q, P k]
    cosine, place = jax.lax.top_k(cosine, k)
    return cosine, jnp.take_along_axis(row, place, axis=1)

  return jax.lax.with_sharding_constraint(
      jax.lax.map(block, (blocks, exclude_self)), sharding.replicated(mesh)
  )


def count_votes(
    similarity: jax.Array, labels: jax.Array, *, num_classes: int,
    temperature: float,
) -> jax.Array:
  """Sums the votes of each query's neighbours.

  Args:
    similarity: cosine similarities in descending order, [Q, k].
    labels: labels of the neighbours, int [Q, k]; -1 does not vote.
    num_classes: number of classes.
    temperature: the weight of a vote is exp(cosine / temperature).

  Returns:
    float32 [Q, num_classes]; each row up to a positive factor.
  """
  # Relative to the weight of the nearest neighbour, so exp cannot overflow.
  weight = jnp.exp((similarity - similarity[:, :1]) / temperature)

  # Add one neighbour of each query at a time: [Q, k, classes] would be large.
  def add(votes, neighbour):
    its_weight, its_label = neighbour  # [Q]
    vote = its_weight[:, None] * jax.nn.one_hot(
        its_label, num_classes, dtype=weight.dtype
    )
    return votes + vote, None

  votes = jnp.zeros((len(labels), num_classes), weight.dtype)
  return jax.lax.scan(add, votes, (weight.T, labels.T))[0]


_vote = jax.jit(count_votes, static_argnames=('num_classes', 'temperature'))


def capped_k(k: int, bank_size: int, num_classes: int) -> int:
  """Returns k, capped to a sixth of the mean number of images per class.

  For ImageNet, with 1,281 images per class, a sixth is about 200. In a small
  bank, if k is near the size of a class or larger, other classes get to vote.
  """
  return max(1, min(k, bank_size // num_classes // 6))


def monitor(context: EvalContext) -> Evaluator | None:
  """Returns the kNN monitor of a pre-training run; None without labels.

  Its metrics are 'knn/top1', the accuracy on the test images; 'knn/k', the
  number of neighbours; and 'knn/unreadable', the number of images of bank and
  test split that could not be read and are left out.

  Raises:
    UserError: see `bank_and_queries`.
  """
  knn, splits = context.config.knn, context.splits
  if splits.test is None:
    return None
  log = features_lib.ReadingLog(context.config.data.max_unreadable)
  read = reading(context, log)

  def measure(state):
    bank, queries = read(state)
    (row,) = _classify(
        queries, bank, len(splits.train.classes), (knn.k,), (knn.temperature,),
        context.mesh,
    )
    return {
        'knn/top1': row['top1'], 'knn/k': row['k'],
        'knn/unreadable': bank.unreadable + queries.unreadable,
    }

  return Evaluator(
      measure, every=knn.every_steps, main='knn/top1',
      words=lambda values: f'kNN {values["knn/top1"]:.1%}', best=True,
      unreadable=log.unreadable,
  )


def reading(
    context: EvalContext, log: features_lib.ReadingLog
) -> Callable[[State], tuple[LabelledFeatures, LabelledFeatures]]:
  """Returns a function from a state to the features of bank and queries.

  Other evaluators of labelled images can use it as well.

  Args:
    context: the parts of the run.
    log: records the images that cannot be read.

  Raises:
    UserError: see `bank_and_queries`.
  """
  config = context.config
  # No more images at a time than in a forward pass of training.
  batch_size = config.micro_batch * context.mesh.size or config.batch_size
  extract = features_lib.extractor(
      context.model, config.data, context.mesh, batch_size,
      context.reader.workers, log=log, stop_asked=context.stop_asked,
  )
  bank, queries = bank_and_queries(config.knn, context.splits)

  def read(state):
    of = functools.partial(_read, extract, state.params, state.batch_stats)
    return of(bank), of(queries)

  return read


def bank_and_queries(
    knn: ConfigDict, splits: Splits
) -> tuple[LabelledImages, LabelledImages]:
  """Returns the labelled images of the bank, and those to classify.

  Raises:
    UserError: if one of them has no labelled images, or if all labels in the
      bank are the same.
  """
  found = []
  for name, source, count in (
      ('bank', splits.bank, knn.bank_images),
      ('test', splits.test, knn.query_images),
  ):
    images = LabelledImages(*sources.labelled(sources.evenly(source, count)))
    if not len(images.labels):
      raise UserError(
          f'none of the {name} images for kNN has a label. Use a split '
          'with labels.'
      )
    found.append(images)
  if len(np.unique(found[0].labels)) < 2:
    raise UserError(
        f'knn.bank_images={knn.bank_images}: the {len(found[0].labels)} images '
        'of the bank are of a single class, so that every answer is the same. '
        'Use a bank of two classes or more.'
    )
  return found[0], found[1]


def table(
    knn: ConfigDict, extract: Extract, splits: Splits, mesh: Mesh,
    params: PyTree, batch_stats: PyTree,
) -> dict[str, Any]:
  """Evaluates kNN for all values of k and temperature in the config.

  With `leave_one_out`, each image of both splits is classified by all others.

  Returns:
    'top1', the accuracy with `k` and `temperature`; 'k', the capped number of
    neighbours; 'test_images', the number of images classified; and 'table',
    [{'k', 'temperature', 'top1'}, ...], which also covers `more_k` and
    `more_temperatures`.

  Raises:
    UserError: see `bank_and_queries`.
  """
  read = functools.partial(_read, extract, params, batch_stats)
  bank, queries = map(read, bank_and_queries(knn, splits))
  exclude_self = None
  if knn.leave_one_out:
    bank = queries = LabelledFeatures(
        np.concatenate([bank.features, queries.features]),
        np.concatenate([bank.labels, queries.labels]),
        bank.unreadable + queries.unreadable,
    )
    exclude_self = np.arange(len(bank.labels))
  rows = _classify(
      queries, bank, len(splits.train.classes), (knn.k, *knn.more_k),
      (knn.temperature, *knn.more_temperatures), mesh, exclude_self,
  )
  return {
      'top1': rows[0]['top1'], 'k': rows[0]['k'],
      'test_images': len(queries.labels), 'table': rows,
  }


def _read(
    extract: Extract, params: PyTree, batch_stats: PyTree,
    images: LabelledImages,
) -> LabelledFeatures:
  features, readable = extract(params, batch_stats, images.source)
  labels = images.labels[readable]
  return LabelledFeatures(
      features, labels, len(images.labels) - len(labels)
  )


def _classify(
    queries: LabelledFeatures, bank: LabelledFeatures, classes: int,
    ks: Sequence[int], temperatures: Sequence[float], mesh: Mesh,
    exclude_self: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """Returns the accuracy for each (capped) k and each temperature."""
  ks = [capped_k(k, len(bank.labels), classes) for k in ks]
  similarity, index = nearest(
      queries.features, bank.features, max(ks), mesh, exclude_self
  )
  voters = bank.labels[index]
  rows = []
  for k in dict.fromkeys(ks):
    for temperature in dict.fromkeys(temperatures):
      votes = _vote(
          similarity[:, :k], voters[:, :k], num_classes=classes,
          temperature=temperature,
      )
      right = np.argmax(jax.device_get(votes), axis=1) == queries.labels
      rows.append({
          'k': k, 'temperature': temperature, 'top1': float(np.mean(right))
      })
  return rows
