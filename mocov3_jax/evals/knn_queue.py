"""The monitor of [P] App. A: kNN against a queue of training features.

The queue holds the features of the last training images as they were when
they were trained on: augmented, and of older networks. Each batch is
classified before it enters. That costs no pass through the network, so it can
be done at every step. The paper does not say which view or encoder it takes;
here the first view and the online network.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from mocov3_jax.evals import knn
from mocov3_jax.method.train_step import TrainState
from mocov3_jax.models.layers import unit


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


def length(share: float, num_examples: int, batch_size: int) -> int:
  """Images in the queue: a share of all, in whole batches, at least one."""
  return batch_size * max(1, round(share * num_examples / batch_size))


def with_queue(state: TrainState, size: int, width: int) -> QueuedState:
  """Adds an empty queue of so many features."""
  queue = Queue(
      jnp.zeros((size, width)), jnp.full(size, -1, jnp.int32),
      jnp.zeros((), jnp.int32),
  )
  fields = {f.name: state.__dict__[f.name] for f in dataclasses.fields(state)}
  return QueuedState(**fields, queue=queue)


def classify(
    queue: Queue, features: jax.Array, labels: jax.Array, *, k: int,
    temperature: float, num_classes: int,
) -> jax.Array:
  """Share of the labelled images that their neighbours classify right.

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


def watch(
    state: QueuedState, features: jax.Array, labels: jax.Array, *, k: int,
    temperature: float, num_classes: int,
) -> tuple[QueuedState, dict[str, jax.Array]]:
  """Classifies a batch, then lets it in.

  Returns:
    The state with the new queue, and 'knn/queue_top1' and 'knn/queue_filled',
    the share of the queue that has a label.
  """
  queue = state.queue
  values = {
      'knn/queue_top1': classify(
          queue, features, labels, k=k, temperature=temperature,
          num_classes=num_classes,
      ),
      'knn/queue_filled': jnp.mean(queue.labels >= 0),
  }
  return state.replace(queue=push(queue, features, labels)), values
