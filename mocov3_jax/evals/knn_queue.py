"""The monitor of the paper's appendix A: kNN against a queue of features.

The queue holds the features of the latest training images, as computed when
they were trained on: of augmented images, and by older networks. Each batch is
classified before it enters the queue. That needs no extra forward pass, so it
runs at every step. The paper does not say which view or encoder it uses; here
it is the first view and the online network.

Unlike other evaluators, this one sees the training batches. It wraps the
training step, which returns the features that it computes anyway.
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

# The fields of the state that only this monitor uses.
FIELDS = ('queue',)


@flax.struct.dataclass
class Queue:
  """A first-in, first-out queue of features and labels.

  Attributes:
    features: [K, D], rows of norm 1.
    labels: int32 [K]; -1 = no label, or the place is still empty.
    next: int32 scalar, the position for the next batch.
  """

  features: jax.Array
  labels: jax.Array
  next: jax.Array


@flax.struct.dataclass
class QueuedState(TrainState):
  """A training state with the monitor's queue.

  Attributes:
    queue: the queue of features.
  """

  queue: Queue


def watching(
    init: Callable[[], TrainState], step: Callable[..., Any],
    config: ConfigDict, model: Network, source: Source,
) -> tuple[Callable[[], QueuedState], Callable[..., Any]]:
  """Wraps the functions init and step of a run to add the queue monitor.

  Args:
    init: () -> state.
    step: (state, Batch with labels) -> (state, metrics, features [B, V, D]).
    config: the run's config.
    model: the network.
    source: the training images.

  Returns:
    () -> state with a queue, and (that state, Batch) -> (state, metrics). The
    step adds two metrics: 'knn/queue_top1', and 'knn/queue_filled', the
    fraction of the queue that has a label.
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
  """Returns the queue's length: a share of the data, in whole batches."""
  return batch_size * max(1, round(share * num_examples / batch_size))


def with_queue(state: TrainState, size: int, width: int) -> QueuedState:
  """Adds an empty queue of `size` features of this width."""
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
  """Returns the accuracy on the labelled images of a batch.

  Args:
    queue: features of earlier images; entries without a label do not vote.
    features: [B, D].
    labels: int [B]; -1 = no label.
    k, temperature: as in `knn`.
    num_classes: number of classes.
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
  """Replaces the oldest batch in the queue by a new one.

  Args:
    queue: the queue; its length is a multiple of B.
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
