"""Linear classifiers on frozen features, for several learning rates at once.

As in paper s5 and its PyTorch release: SGD with momentum and no weight decay, a
half cosine that changes by epochs, random crops and flips, and the backbone in
evaluation mode. Probes are sensitive to the learning rate, but all use the same
features. So one pass through the backbone serves one head for each rate.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocov3_jax.method.optimizers import Schedule
from mocov3_jax.models.layers import BatchNorm

PyTree = Any


@flax.struct.dataclass
class ProbeState:
  """All that the probe carries from step to step.

  Attributes:
    step: int32 scalar, number of updates done.
    params: 'kernel' [L, D, C] and 'bias' [L, C], a head for each rate.
    batch_stats: statistics of the BatchNorm before the heads; empty without
      one.
    opt_state: state of the optimizer.
  """

  step: jax.Array
  params: PyTree
  batch_stats: PyTree
  opt_state: optax.OptState


@flax.struct.dataclass
class Probe:
  """The parts of the probe; all of them are functions or numbers.

  Attributes:
    features: (frozen variables, images uint8, key) -> [B, D], float32.
    optimizer: from `build_optimizer`.
    rates: the learning rate of each head, at a schedule of 1; only logged here.
    learning_rate: the schedule for a rate of 1; only logged here.
    norm: applied to the features before the heads, or None.
  """

  features: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
  optimizer: optax.GradientTransformation
  rates: jax.Array
  learning_rate: Schedule
  norm: BatchNorm | None


def build_optimizer(
    rates: tuple[float, ...], schedule: Schedule, momentum: float
) -> optax.GradientTransformation:
  """Returns SGD with momentum; head l learns at rates[l] * schedule."""

  def each_its_rate(updates, params):
    del params
    return jax.tree.map(
        lambda u: u * jnp.asarray(rates, u.dtype).reshape(
            -1, *[1] * (u.ndim - 1)
        ),
        updates,
    )

  return optax.chain(
      optax.trace(momentum), optax.stateless(each_its_rate),
      optax.scale_by_learning_rate(schedule),
  )


def init_state(
    probe: Probe, key: jax.Array, heads: int, width: int, num_classes: int
) -> ProbeState:
  """Draws weights from N(0, 0.01), the same for all heads; biases are 0."""
  kernel = 0.01 * jax.random.normal(key, (1, width, num_classes))
  params = {
      'kernel': jnp.repeat(kernel, heads, axis=0),
      'bias': jnp.zeros((heads, num_classes)),
  }
  stats = {}
  if probe.norm is not None:
    stats = probe.norm.init(key, jnp.zeros((2, width)), True)['batch_stats']
  return ProbeState(
      step=jnp.zeros((), jnp.int32), params=params, batch_stats=stats,
      opt_state=probe.optimizer.init(params),
  )


def logits(params: PyTree, features: jax.Array) -> jax.Array:
  """Maps features [B, D] to the logits of all heads, [L, B, C]."""
  products = jnp.einsum('bd,ldc->lbc', features, params['kernel'])
  return products + params['bias'][:, None]


def apply_norm(
    probe: Probe, stats: PyTree, features: jax.Array, train: bool
) -> tuple[jax.Array, PyTree]:
  """Applies the BatchNorm, if there is one; returns its new statistics."""
  if probe.norm is None:
    return features, stats
  x, new = probe.norm.apply(
      {'batch_stats': stats}, features, train, mutable=['batch_stats']
  )
  return x, new['batch_stats']


def probe_step(
    probe: Probe, frozen: PyTree, key: jax.Array, state: ProbeState,
    images: jax.Array, labels: jax.Array,
) -> tuple[ProbeState, dict[str, jax.Array]]:
  """Takes one step of all heads.

  Args:
    probe: the parts of the probe.
    frozen: 'params' and 'batch_stats' of the backbone.
    key: random key of the run; the step is folded in here.
    state: donated by the caller.
    images: uint8 [B, H, W, C], or crops [B, V, S, S, C]; B is the global batch
      size.
    labels: int [B], -1 for images without a label.

  Returns:
    The next state, and scalar metrics of the head with the lowest loss.
  """
  features = probe.features(
      frozen, images, jax.random.fold_in(key, state.step)
  )
  features, stats = apply_norm(probe, state.batch_stats, features, True)
  known = labels >= 0

  def loss_fn(params):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, features), jnp.maximum(labels, 0)[None]
    )  # [L, B]
    losses = jnp.sum(losses * known[None], 1) / jnp.maximum(jnp.sum(known), 1)
    return jnp.sum(losses), losses  # Heads do not depend on each other.

  grads, losses = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = probe.optimizer.update(
      grads, state.opt_state, state.params
  )
  classes = state.params['bias'].shape[1]
  best = jnp.nanargmin(losses)
  return ProbeState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=stats, opt_state=opt_state,
  ), {
      'train/loss': losses[best],
      'train/loss_chance': jnp.log(jnp.asarray(classes, float)),
      'train/lr': probe.rates[best] * probe.learning_rate(state.step),
      'grad_norm/global': optax.tree.norm(
          jax.tree.map(lambda g: g[best], grads)
      ),
  }


def classifier(
    probe: Probe, state: ProbeState, head: int
) -> dict[str, jax.Array]:
  """Returns one head as a linear layer on the features themselves.

  The BatchNorm before the head, if there is one, is folded into it: after the
  training, it is an affine map, too.

  Args:
    probe: the parts of the probe.
    state: state of the training.
    head: index of the head.

  Returns:
    'kernel' [D, C] and 'bias' [C], float32.
  """
  kernel, bias = (state.params[name][head] for name in ('kernel', 'bias'))
  if probe.norm is not None:
    scale = jax.lax.rsqrt(state.batch_stats['var'] + probe.norm.epsilon)
    bias = bias - (state.batch_stats['mean'] * scale) @ kernel
    kernel = kernel * scale[:, None]
  return {'kernel': kernel, 'bias': bias}


def predict(
    probe: Probe, state: ProbeState, features: jax.Array
) -> jax.Array:
  """Returns the class that each head finds: features [n, D] -> int [L, n]."""
  features, _ = apply_norm(probe, state.batch_stats, features, False)
  # One head after the other: the logits of all heads would be large.
  def one(head):
    return jnp.argmax(features @ head['kernel'] + head['bias'][None], axis=1)

  return jax.lax.map(one, state.params)
