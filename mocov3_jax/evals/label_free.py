"""Measures features without labels: alignment, uniformity, effective rank.

Alignment and uniformity: Wang and Isola 2020 (arXiv 2005.10242). Effective
rank: Roy and Vetterli 2007; Garrido et al. 2023 (RankMe, arXiv 2210.02885)
apply it to features.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mocov3_jax.evals.evaluator import EvalContext, Evaluator
from mocov3_jax.evals.features import NonFiniteFeatures
from mocov3_jax.method.build import run_keys
from mocov3_jax.models.layers import unit
from mocov3_jax.parallel import sharding

PyTree = Any


def alignment(first: jax.Array, second: jax.Array) -> jax.Array:
  """Returns the mean squared distance of two views' unit features [N, D].

  It ranges from 0, if the views of each image have equal features, to 4.
  """
  return jnp.mean(jnp.sum((unit(first) - unit(second)) ** 2, axis=1))


def uniformity(features: jax.Array) -> jax.Array:
  """Returns log(mean(exp(-2 distance^2))) over pairs of different rows [N, D].

  It is 0 if all rows are equal, or if there is only one. The lower it is, the
  more evenly the unit features cover the sphere.
  """
  if len(features) < 2:
    return jnp.zeros(())
  x = unit(features)
  squared = 2 - 2 * jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
  pairs = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, -2 * squared)
  return jax.nn.logsumexp(pairs) - jnp.log(len(x) * (len(x) - 1))


def effective_rank(features: jax.Array) -> jax.Array:
  """Returns exp(entropy) of the normalised singular values of [N, D].

  It ranges from 1, if all rows are multiples of one vector (or zero), to
  min(N, D).
  """
  values = jnp.linalg.svd(features, compute_uv=False)
  share = values / jnp.maximum(jnp.sum(values), 1e-12)  # Zeros stay zeros.
  return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))


def monitor(context: EvalContext) -> Evaluator | None:
  """Returns the monitor of a run without labels; None if there are labels.

  The metrics are 'features/alignment', 'features/uniformity' and
  'features/effective_rank' of backbone features in evaluation mode. They are
  always measured on the same views of the same images: the batch of step 0.
  """
  if context.splits.test is not None:
    return None
  model, mesh = context.model, context.mesh
  _, key = run_keys(context.config.seed)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def values_of(params, batch_stats, images, key):
    variables = {'params': params, 'batch_stats': batch_stats}
    views = context.augment(images, key)
    features = model.apply(variables, views, train=False, method='trunk')
    first, second = features[:, 0], features[:, 1]
    return {
        'features/alignment': alignment(first, second),
        'features/uniformity': uniformity(first),
        'features/effective_rank': effective_rank(first),
    }

  def measure(state):
    images = sharding.to_global(context.reader(0).images, mesh)
    values = values_of(state.params, state.batch_stats, images, key)
    values = {name: float(v) for name, v in jax.device_get(values).items()}
    for name, value in values.items():
      if not math.isfinite(value):
        raise NonFiniteFeatures(f'{name}={value}: the features are not finite')
    return values

  def words(values):
    return (
        f'alignment {values["features/alignment"]:.3f}  uniformity '
        f'{values["features/uniformity"]:.2f}  effective rank '
        f'{values["features/effective_rank"]:.1f}'
    )

  return Evaluator(
      measure, every=context.config.knn.every_steps,
      main='features/effective_rank', words=words,
  )
