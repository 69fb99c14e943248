"""Weighted k-nearest-neighbour classification of backbone features.

The monitor of the paper's appendix A, which refers to Wu et al. 2018 (arXiv
1805.01978): cosine similarity, k = 200, votes weighted by
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
# Queries compared with the whole bank at once: their similarities to 1.28 M
# images are 1.3 GB over all devices. So is the bank, of ResNet-50's 2,048
# numbers an image 10 GB, which is there twice while it is normalised.
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
    unreadable: how many could not be.
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
    bank: [N, D]; likewise. Each device of the mesh gets a part of its rows.
    k: neighbours, at most N; of equal ones the first in the bank win.
    mesh: to work on; all processes of it are given the same.
    exclude_self: int [Q], the row of the bank that is the query itself and no
      neighbour of its own; None = the queries are not in the bank.

  Returns:
    Cosines float32 [Q, k], falling, and rows of the bank, int32 [Q, k].
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
  """Finds neighbours, a block of queries [QUERY_BLOCK, D] after the other.

  Each device compares all queries with its part of the bank and finds the best
  k there. These alone are brought together, and the best k of them kept.

  Args:
    blocks: [blocks, QUERY_BLOCK, D].
    bank: [N, D], its rows split over the devices.
    exclude_self: int [blocks, QUERY_BLOCK], or None.
    k: neighbours.
    count: rows of the bank; what follows is padding.
    mesh: of the bank.

  Returns:
    Cosines and rows, [blocks, QUERY_BLOCK, k], whole on every device.
  """
  axes = sharding.BATCH_AXES

  def of_part(q, excluded, part):
    """Returns the best k of the rows that this device has, [Q, k]."""
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
    # In the order of the bank, so that of equal ones the first win.
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
    similarity: cosines [Q, k], falling.
    labels: of the neighbours, int [Q, k]; -1 does not vote.
    num_classes: number of labels.
    temperature: of the weights exp(cosine / temperature).

  Returns:
    float32 [Q, num_classes], each row up to a positive factor.
  """
  # Relative to the nearest one's weight, which cannot overflow.
  weight = jnp.exp((similarity - similarity[:, :1]) / temperature)

  # One neighbour of every query after the other: [Q, k, classes] is large.
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
  """Returns k, but at most a sixth of the mean number of images per class.

  200 neighbours are a sixth of ImageNet's 1,281 images per class. On a small
  bank, k near the size of a class or beyond lets the other classes vote.
  """
  return max(1, min(k, bank_size // num_classes // 6))


def monitor(context: EvalContext) -> Evaluator | None:
  """Returns the kNN monitor of a pre-training; None without labels.

  Its metrics are 'knn/top1', the share of test images classified right,
  'knn/k', the neighbours asked, and 'knn/unreadable', the images of bank and
  test that could not be read and are left out.

  Raises:
    UserError: if bank or test split has no label after all.
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
  """Returns what computes features of bank and queries from a state.

  Other evaluators of labelled images can use it as well.

  Args:
    context: of the run.
    log: is told what cannot be read.

  Raises:
    UserError: if bank or test split has no label after all.
  """
  config = context.config
  # No more at a time than in a pass of the training.
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
  """Returns the labelled images to remember, and those to classify.

  Raises:
    UserError: if there are none.
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
  """Classifies once, for all k and temperatures.

  With `leave_one_out`, each image of both splits by all others.

  Returns:
    'top1' and 'test_images' for `k` and `temperature`; 'k', the neighbours
    asked; 'table', [{'k', 'temperature', 'top1'}, ...] with those and `more_k`
    and `more_temperatures`.

  Raises:
    UserError: if there are no labels.
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
  """Returns the share classified right for each (capped) k and temperature."""
  ks = [capped_k(k, len(bank.labels), classes) for k in ks]
  similarity, index = nearest(
      queries.features, bank.features, max(ks), mesh, exclude_self
  )
  voters = bank.labels[index]
  rows = []
  for k in dict.fromkeys(ks):
    for temperature in temperatures:
      votes = _vote(
          similarity[:, :k], voters[:, :k], num_classes=classes,
          temperature=temperature,
      )
      right = np.argmax(jax.device_get(votes), axis=1) == queries.labels
      rows.append({
          'k': k, 'temperature': temperature, 'top1': float(np.mean(right))
      })
  return rows
