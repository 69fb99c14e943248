"""What is minimised: functions of embeddings, in one table.

An objective takes the online network's embeddings of two views and the target
network's, and returns the scalar loss with metrics. It sees the global batch;
the partitioner gathers the keys.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from mocov3_jax.errors import unknown
from mocov3_jax.models import Embeddings

Metrics = dict[str, jax.Array]
Objective = Callable[[Embeddings, Embeddings], tuple[jax.Array, Metrics]]


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
    online: Embeddings, target: Embeddings, *, temperature: float
) -> tuple[jax.Array, Metrics]:
  """ctr(q1, k2) + ctr(q2, k1), with each view predicting the other's key."""
  q, k = online.predictions, target.projections  # [N, 2, D]
  loss12, accuracy12 = contrast(q[:, 0], k[:, 1], temperature)
  loss21, accuracy21 = contrast(q[:, 1], k[:, 0], temperature)
  return loss12 + loss21, {
      # The loss of a network that tells nothing apart: 4T ln N.
      'train/loss_chance': jnp.asarray(4 * temperature * math.log(len(q))),
      'train/contrast_accuracy': (accuracy12 + accuracy21) / 2,
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


OBJECTIVES = {'moco_v3': moco_v3}


def build(objective: ConfigDict) -> Objective:
  """Returns the objective that `config.objective` names.

  Raises:
    UserError: for a name that is not in the table.
  """
  if objective.name not in OBJECTIVES:
    raise unknown('objective.name', objective.name, OBJECTIVES)
  return functools.partial(
      OBJECTIVES[objective.name], temperature=objective.temperature
  )
