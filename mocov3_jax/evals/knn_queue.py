"""The monitor of the paper's appendix A: kNN against a queue of features.

The queue holds the features of the last training images as they were when
they were trained on: augmented, and of older networks. Each batch is
classified before it enters. That costs no pass through the network, so it can
be done at every step. The paper does not say which view or encoder it takes;
here it is the first view and the online network.

Unlike other evaluators this one sees the batches. It wraps the training step,
which hands out the features that it computes anyway.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax.evals import features as features_lib
from mocov3_jax.evals import knn
from mocov3_jax.method.build import image_shape
from mocov3_jax.method.train_step import TrainState
from mocov3_jax.models import Network
from mocov3_jax.models.layers import unit
from mocov3_jax.sources import Source

# The fields that a state has for this monitor alone.
FIELDS = ('queue',)


@flax.struct.dataclass
class Queue:
  """First in, first out.

  Attributes:
    features: [K, D], of length 1.
    labels: int32 [K], -1 where there is none, or nothing yet.
    next: int32 scalar, where the next batch goes.
  """

  features: jax.Array
  labels: jax.Array
  next: jax.Array


@flax.struct.dataclass
class QueuedState(TrainState):
  """A training state with a queue.

  Attributes:
    queue: of the monitor.
  """

  queue: Queue


def watching(
    init: Callable[[], TrainState], step: Callable[..., Any],
    config: ConfigDict, model: Network, source: Source,
) -> tuple[Callable[[], QueuedState], Callable[..., Any]]:
  """Wraps the functions of a training, so that a queue watches its batches.

  Args:
    init: () -> state.
    step: (state, Batch with labels) -> (state, metrics, features [B, V, D]).
    config: of the run.
    model: the network.
    source: the images to train on.

  Returns:
    () -> state with a queue, and (that state, Batch) -> (state, metrics); the
    metrics have 'knn/queue_top1' and 'knn/queue_filled', the share of the
    queue that has a label, besides the step's own.
  """
  size = length(config.knn.queue_share, len(source), config.batch_size)
  k = knn.capped_k(config.knn.k, size, len(source.classes))

  def init_with_queue():
    state = init()
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    width = features_lib.width(model, variables, image_shape(config.data))
    return with_queue(state, size, width)

  def watched_step(state, batch):
    state, metrics, features = step(state, batch)
    queue, first_view = state.queue, features[:, 0]
    metrics |= {
        'knn/queue_top1': queue_accuracy(
            queue, first_view, batch.labels, k=k,
            temperature=config.knn.temperature,
            num_classes=len(source.classes),
        ),
        'knn/queue_filled': jnp.mean(queue.labels >= 0),
    }
    return state.replace(queue=push(queue, first_view, batch.labels)), metrics

  return init_with_queue, watched_step


def length(share: float, num_examples: int, batch_size: int) -> int:
  """Returns how many images are in the queue: a share, in whole batches."""
  return batch_size * max(1, round(share * num_examples / batch_size))


def with_queue(state: TrainState, size: int, width: int) -> QueuedState:
  """Adds an empty queue of `size` features of `width` numbers."""
  queue = Queue(
      jnp.zeros((size, width)), jnp.full(size, -1, jnp.int32),
      jnp.zeros((), jnp.int32),
  )
  fields = {f.name: state.__dict__[f.name] for f in dataclasses.fields(state)}
  return QueuedState(**fields, queue=queue)


def queue_accuracy(
    queue: Queue, features: jax.Array, labels: jax.Array, *, k: int,
    temperature: float, num_classes: int,
) -> jax.Array:
  """Returns the share of labelled images that the queue classifies right.

  Args:
    queue: of earlier images; empty places do not vote.
    features: [B, D].
    labels: int [B], -1 where there is none.
    k, temperature: as in `knn`.
    num_classes: number of labels.
  """
  cosine = jnp.matmul(
      unit(features), queue.features.T, precision=jax.lax.Precision.HIGHEST
  )
  cosine = jnp.where(queue.labels[None] < 0, -2.0, cosine)  # Below any cosine.
  nearest, index = jax.lax.top_k(cosine, k)  # [B, k]
  votes = knn.count_votes(
      nearest, queue.labels[index], num_classes=num_classes,
      temperature=temperature,
  )
  found = jnp.argmax(votes, axis=1)
  known = labels >= 0
  right = jnp.sum((found == labels) & known)
  return right / jnp.maximum(jnp.sum(known), 1)


def push(queue: Queue, features: jax.Array, labels: jax.Array) -> Queue:
  """Puts a batch in the place of the oldest one.

  Args:
    queue: its length is a multiple of the batch.
    features: [B, D].
    labels: int [B].
  """
  put = jax.lax.dynamic_update_slice_in_dim
  size = len(queue.labels)
  return Queue(
      put(queue.features, unit(features), queue.next, 0),
      put(queue.labels, labels.astype(jnp.int32), queue.next, 0),
      (queue.next + len(labels)) % size,
  )
