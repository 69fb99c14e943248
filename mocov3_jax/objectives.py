"""What is minimised: functions of embeddings, in one table.

An objective takes the online network's embeddings of two views and the target
network's, and returns the scalar loss with metrics. It sees the global batch;
the partitioner gathers the keys.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from mocov3_jax.errors import unknown
from mocov3_jax.models import Embeddings

Metrics = dict[str, jax.Array]
Loss = Callable[[Embeddings, Embeddings | None], tuple[jax.Array, Metrics]]


def contrast(
    queries: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """InfoNCE of each query against all keys ([P] Algorithm 1, `ctr`).

  Args:
    queries: [N, D], any length.
    keys: [N, D]; row i is the positive of query i. Gets no gradient.
    temperature: T of the softmax over cosine similarities.

  Returns:
    2T * cross-entropy, averaged over the queries, and the share of queries
    whose most similar key is the positive.
  """
  queries, keys = _unit(queries), _unit(jax.lax.stop_gradient(keys))
  # Full float32, where a TPU or GPU would round to fewer bits by default.
  cosine = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
  logits = cosine / temperature  # [N, N]
  labels = jnp.arange(len(logits))  # [N]
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
  return 2 * temperature * loss, accuracy


def moco_v3(
    online: Embeddings, target: Embeddings, *, temperature: float,
    symmetric: bool = True,
) -> tuple[jax.Array, Metrics]:
  """ctr(q1, k2) + ctr(q2, k1), with each view predicting the other's key.

  Not symmetric, 2 ctr(q1, k2): of the same size, and of half the pairs.
  """
  q, k = online.predictions, target.projections  # [N, 2, D]
  loss12, accuracy12 = contrast(q[:, 0], k[:, 1], temperature)
  loss21, accuracy21 = loss12, accuracy12
  if symmetric:
    loss21, accuracy21 = contrast(q[:, 1], k[:, 0], temperature)
  return loss12 + loss21, {
      # The loss of a network that tells nothing apart: 4T ln N.
      'train/loss_chance': jnp.asarray(4 * temperature * math.log(len(q))),
      'train/contrast_accuracy': (accuracy12 + accuracy21) / 2,
  }


def simclr(
    online: Embeddings, target: None, *, temperature: float
) -> tuple[jax.Array, Metrics]:
  """NT-Xent: each of the 2N views finds its partner among the 2N - 1 others.

  Chen et al. 2020 (arXiv 2002.05709), equation 1. All views are queries and
  keys, with gradients to both; there is no target network.
  """
  del target
  z = online.predictions  # [N, 2, D]
  n = len(z)
  z = _unit(jnp.concatenate([z[:, 0], z[:, 1]]))  # [2N, D]
  cosine = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
  itself = jnp.eye(2 * n, dtype=bool)
  logits = jnp.where(itself, -jnp.inf, cosine / temperature)
  partners = jnp.roll(jnp.arange(2 * n), n)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, partners)
  return loss.mean(), {
      # Of a network that tells nothing apart.
      'train/loss_chance': jnp.asarray(math.log(2 * n - 1)),
      'train/contrast_accuracy': jnp.mean(jnp.argmax(logits, 1) == partners),
  }


def byol(
    online: Embeddings, target: Embeddings
) -> tuple[jax.Array, Metrics]:
  """(2 - 2 cos(q1, z2)) + (2 - 2 cos(q2, z1)); no negatives.

  Grill et al. 2020 (arXiv 2006.07733), equation 2. Both 0 where all images
  are one, so a low loss is no success: see 'train/feature_std'.
  """
  q = _unit(online.predictions)
  z = _unit(jax.lax.stop_gradient(target.projections))[:, ::-1]
  cosine = jnp.sum(q * z, axis=-1)  # [N, 2]
  # Whether the nearest target is the image's own: of the log alone.
  nearest = jnp.argmax(
      jnp.matmul(q[:, 0], z[:, 0].T, precision=jax.lax.Precision.HIGHEST), 1
  )
  return jnp.mean(jnp.sum(2 - 2 * cosine, axis=1)), {
      # Of embeddings that have nothing to do with each other.
      'train/loss_chance': jnp.asarray(4.0),
      'train/contrast_accuracy': jnp.mean(nearest == jnp.arange(len(q))),
  }


def feature_std(features: jax.Array) -> jax.Array:
  """Spread of L2-normalised features: 1 if isotropic, 0 if collapsed.

  The standard deviation of each channel over the batch, averaged over the
  channels and multiplied by sqrt(D) (Chen & He 2021, arXiv 2011.10566, s4.1).

  Args:
    features: [N, D].
  """
  std = jnp.std(_unit(features), axis=0)  # [D]
  return jnp.mean(std) * math.sqrt(features.shape[-1])


def _unit(x: jax.Array) -> jax.Array:
  # The bound is PyTorch's: a zero vector stays zero instead of becoming NaN.
  norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
  return x / norm


class Objective(NamedTuple):
  """What is minimised, and of what.

  Attributes:
    loss: (online embeddings, the target's) -> (scalar, metrics).
    has_target: whether there is a target network; if not, `loss` gets None.
  """

  loss: Loss
  has_target: bool


# What each reads of `config.objective`.
OBJECTIVES = {
    'moco_v3': lambda c: Objective(
        functools.partial(
            moco_v3, temperature=c.temperature, symmetric=c.symmetric
        ), has_target=True,
    ),
    'simclr': lambda c: Objective(
        functools.partial(simclr, temperature=c.temperature), has_target=False
    ),
    'byol': lambda c: Objective(byol, has_target=True),
}


def build(objective: ConfigDict) -> Objective:
  """Returns the objective that `config.objective` names.

  Raises:
    UserError: for a name that is not in the table.
  """
  if objective.name not in OBJECTIVES:
    raise unknown('objective.name', objective.name, OBJECTIVES)
  return OBJECTIVES[objective.name](objective)
