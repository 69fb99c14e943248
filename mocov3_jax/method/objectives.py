"""The training objectives: losses on embeddings, selected by name.

An objective takes the embeddings of two views by the online and the target
network, and the keys of earlier steps if it keeps a queue. It returns the
scalar loss and metrics. It sees the global batch: the partitioner gathers the
keys across devices.

Two of the metrics are reference values for the loss. 'train/loss_chance' is the
loss of a network that cannot tell images apart. 'train/loss_collapsed' is the
loss of a collapsed network, which maps all images to the same embedding; it is
a bound if the loss depends on which embedding that is.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from mocov3_jax.base.errors import unknown
from mocov3_jax.models import Embeddings
from mocov3_jax.models.layers import unit

Metrics = dict[str, jax.Array]
# Keys of earlier steps; () if no queue is kept.
PastKeys = jax.Array | tuple[()]
Loss = Callable[
    [Embeddings, Embeddings | None, PastKeys], tuple[jax.Array, Metrics]
]


def contrast(
    queries: jax.Array, keys: jax.Array, temperature: float,
    past_keys: PastKeys = (),
) -> tuple[jax.Array, jax.Array]:
  """Returns the InfoNCE loss of queries and keys (paper, Algorithm 1: `ctr`).

  Args:
    queries: [N, D]; need not be normalised.
    keys: [N, D]; row i is the positive of query i. No gradient flows to them.
    temperature: T of the softmax over cosine similarities.
    past_keys: [K, D], additional negatives; rows of zeros are ignored.

  Returns:
    2T * cross-entropy, averaged over the queries, and the fraction of queries
    whose most similar key is the positive.
  """
  queries, keys = unit(queries), unit(jax.lax.stop_gradient(keys))
  logits = _cosines(queries, keys) / temperature  # [N, N]
  labels = jnp.arange(len(logits))  # [N]
  if len(past_keys):
    past = _cosines(queries, past_keys) / temperature  # [N, K]
    past = jnp.where(_filled(past_keys), past, -jnp.inf)
    logits = jnp.concatenate([logits, past], axis=1)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
  return 2 * temperature * loss, accuracy


def moco_v3(
    online: Embeddings, target: Embeddings, past_keys: PastKeys = (), *,
    temperature: float, symmetric: bool = True,
) -> tuple[jax.Array, Metrics]:
  """Returns ctr(q1, k2) + ctr(q2, k1): each view predicts the other's key.

  If not `symmetric`, it returns 2 ctr(q1, k2), which has the same scale but
  uses half of the pairs. Past keys are additional negatives (the dictionary of
  MoCo v1 and v2, He et al. 2020, arXiv 1911.05722).
  """
  q, k = online.predictions, target.projections  # [N, 2, D]
  loss12, accuracy12 = contrast(q[:, 0], k[:, 1], temperature, past_keys)
  loss21, accuracy21 = loss12, accuracy12
  if symmetric:
    loss21, accuracy21 = contrast(q[:, 1], k[:, 0], temperature, past_keys)
  keys = jnp.asarray(len(q), loss12.dtype)
  if len(past_keys):
    keys += jnp.sum(_filled(past_keys))
  return loss12 + loss21, {
      **_levels(4 * temperature * jnp.log(keys)),  # Without past keys, 4T ln N.
      'train/contrast_accuracy': (accuracy12 + accuracy21) / 2,
  }


def remember(
    past_keys: PastKeys, target: Embeddings, *, symmetric: bool
) -> PastKeys:
  """Adds this step's keys to the queue, in place of the oldest.

  Args:
    past_keys: the queue, [K, D] with rows of norm 1, or zeros where it is not
      filled yet; or () if there is no queue.
    target: the target's embeddings; their projections are this step's keys.
    symmetric: whether both views gave keys; if not, only view 2 did.

  Returns:
    [K, D]: the last K keys, newest first; or () if there is no queue.
  """
  if not len(past_keys):
    return past_keys
  keys = target.projections if symmetric else target.projections[:, 1:]
  keys = unit(keys.reshape(-1, keys.shape[-1]))
  return jnp.concatenate([keys, past_keys])[: len(past_keys)]


def simclr(
    online: Embeddings, target: None, past_keys: PastKeys = (), *,
    temperature: float,
) -> tuple[jax.Array, Metrics]:
  """Returns NT-Xent: each of 2N views finds its partner among 2N - 1 others.

  Chen et al. 2020 (arXiv 2002.05709), equation 1. Every view is both a query
  and a key, and gradients flow to both. There is no target network.
  """
  del target, past_keys
  z = online.predictions  # [N, 2, D]
  n = len(z)
  z = unit(jnp.concatenate([z[:, 0], z[:, 1]]))  # [2N, D]
  itself = jnp.eye(2 * n, dtype=bool)
  logits = jnp.where(itself, -jnp.inf, _cosines(z, z) / temperature)
  partners = jnp.roll(jnp.arange(2 * n), n)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, partners)
  return loss.mean(), {
      **_levels(math.log(2 * n - 1)),
      'train/contrast_accuracy': jnp.mean(jnp.argmax(logits, 1) == partners),
  }


def byol(
    online: Embeddings, target: Embeddings, past_keys: PastKeys = ()
) -> tuple[jax.Array, Metrics]:
  """Returns (2 - 2 cos(q1, z2)) + (2 - 2 cos(q2, z1)); there are no negatives.

  Grill et al. 2020 (arXiv 2006.07733), equation 2. Both terms are 0 if all
  images have the same embedding, so a low loss does not mean success: see
  'train/feature_std'.
  """
  del past_keys
  q = unit(online.predictions)
  z = unit(jax.lax.stop_gradient(target.projections))[:, ::-1]
  cosine = jnp.sum(q * z, axis=-1)  # [N, 2]
  # Whether the nearest target belongs to the same image. Only logged.
  nearest = jnp.argmax(_cosines(q[:, 0], z[:, 0]), axis=1)
  return jnp.mean(jnp.sum(2 - 2 * cosine, axis=1)), {
      # Chance: the embeddings are orthogonal.
      **_levels(4.0, collapsed=0.0),
      'train/contrast_accuracy': jnp.mean(nearest == jnp.arange(len(q))),
  }


def sinkhorn(scores: jax.Array, iterations: int) -> jax.Array:
  """Spreads the images evenly over the prototypes (Cuturi 2013).

  Args:
    scores: [N, K], logarithms of the matrix to balance.
    iterations: how often to scale the columns, then the rows. At the end, the
      row sums are exact and the column sums nearly so.

  Returns:
    Non-negative codes [N, K]: each row sums to 1, each column to about N / K.
  """
  # In log space, because exp(1 / epsilon) could overflow float32, and small
  # sums could underflow.
  def scale(logs, _):
    logs -= jax.nn.logsumexp(logs, axis=0, keepdims=True)  # Columns to 1,
    return jax.nn.log_softmax(logs, axis=1), None  # then rows to 1.

  return jnp.exp(jax.lax.scan(scale, scores, length=iterations)[0])


def swav(
    online: Embeddings, target: None, past_keys: PastKeys = (), *,
    temperature: float, epsilon: float, iterations: int,
) -> tuple[jax.Array, Metrics]:
  """Returns SwAV's loss: each view predicts the other view's code.

  Caron et al. 2020 (arXiv 2006.09882), equations 1 to 3, with two crops. The
  network's predictions are the cosine similarities to the prototypes. No
  gradient flows through the codes. There is no target network.
  """
  del target, past_keys
  scores = online.predictions  # [N, 2, K]
  codes = [
      sinkhorn(jax.lax.stop_gradient(scores[:, v]) / epsilon, iterations)
      for v in (0, 1)
  ]
  predicted = jax.nn.log_softmax(scores / temperature)
  loss = -sum(
      jnp.mean(jnp.sum(codes[v] * predicted[:, 1 - v], axis=1)) for v in (0, 1)
  )
  found = jnp.argmax(predicted[:, 1], axis=1) == jnp.argmax(codes[0], axis=1)
  return loss, {
      **_levels(2 * math.log(scores.shape[-1])),
      # Here: whether the nearest prototype is the largest entry of the other
      # view's code.
      'train/contrast_accuracy': jnp.mean(found),
  }


def feature_std(features: jax.Array) -> jax.Array:
  """Returns the spread of normalised features: 1 isotropic, 0 collapsed.

  The standard deviation of each channel over the batch, averaged over the
  channels and multiplied by sqrt(D) (Chen & He 2021, arXiv 2011.10566, s4.1).

  Args:
    features: [N, D].
  """
  std = jnp.std(unit(features), axis=0)  # [D]
  return jnp.mean(std) * math.sqrt(features.shape[-1])


def _cosines(a: jax.Array, b: jax.Array) -> jax.Array:
  # Full float32 precision; TPUs and GPUs use less by default.
  return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _filled(past_keys: jax.Array) -> jax.Array:
  return jnp.any(past_keys != 0, axis=1)  # [K]


def _levels(
    chance: float | jax.Array, collapsed: float | None = None
) -> Metrics:
  # In a contrastive loss, a collapsed network is at chance.
  collapsed = chance if collapsed is None else collapsed
  return {
      'train/loss_chance': jnp.asarray(chance, float),
      'train/loss_collapsed': jnp.asarray(collapsed, float),
  }


class Objective(NamedTuple):
  """A loss, and the inputs that it needs.

  Attributes:
    loss: (online embeddings, target embeddings, past keys) -> (scalar loss,
      metrics).
    has_target: whether there is a target network; if not, `loss` gets None.
    queue: how many past keys to keep; 0 = none, and `loss` gets ().
    remember: (past keys, target embeddings) -> the next past keys.
  """

  loss: Loss
  has_target: bool
  queue: int = 0
  remember: Callable[[PastKeys, Embeddings | None], PastKeys] = (
      lambda past_keys, target: past_keys
  )


# Each entry builds an objective from `config.objective`.
OBJECTIVES = {
    'moco_v3': lambda c: Objective(
        functools.partial(
            moco_v3, temperature=c.temperature, symmetric=c.symmetric
        ), has_target=True, queue=c.queue,
        remember=functools.partial(remember, symmetric=c.symmetric),
    ),
    'simclr': lambda c: Objective(
        functools.partial(simclr, temperature=c.temperature), has_target=False
    ),
    'byol': lambda c: Objective(byol, has_target=True),
    'swav': lambda c: Objective(
        functools.partial(
            swav, temperature=c.temperature, epsilon=c.sinkhorn_epsilon,
            iterations=c.sinkhorn_iterations,
        ), has_target=False,
    ),
}


def build(objective: ConfigDict) -> Objective:
  """Returns the objective that `config.objective` names.

  Raises:
    UserError: if the name is not in the table.
  """
  if objective.name not in OBJECTIVES:
    raise unknown('objective.name', objective.name, OBJECTIVES)
  return OBJECTIVES[objective.name](objective)
