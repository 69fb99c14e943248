"""The training state, and one training step as a pure function."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocov3_jax.method.monitors import Monitor, nothing
from mocov3_jax.method.objectives import Objective, PastKeys, feature_std
from mocov3_jax.method.optimizers import Schedule
from mocov3_jax.models import Embeddings, Network

PyTree = Any


@flax.struct.dataclass
class TrainState:
  """Everything that training carries from step to step.

  It holds no random key: keys are derived from the seed and the step.

  Attributes:
    step: int32 scalar, the number of updates done.
    params: {'backbone', 'projector', 'predictor'} of the online network.
    batch_stats: the online network's running BatchNorm statistics.
    target_params: {'backbone', 'projector'} of the target (momentum) network.
    target_batch_stats: the target's running statistics, from its own forward
      passes.
    opt_state: the optimizer's state.
    past_keys: the queue of past keys, float32 [K, D], newest first; rows of
      zeros are not filled yet. () if the objective keeps no queue.
  """

  step: jax.Array
  params: PyTree
  batch_stats: PyTree
  target_params: PyTree
  target_batch_stats: PyTree
  opt_state: optax.OptState
  past_keys: PastKeys


@flax.struct.dataclass
class Method:
  """The parts of a training step; none of them has state.

  Attributes:
    model: the network.
    objective: the loss, and whether it has a target network.
    optimizer: the optax chain; it already includes the learning rate.
    augment: (uint8 images, key) -> views [B, 2, S, S, C].
    learning_rate: its schedule, used here for logging only.
    momentum: the schedule of the target network's momentum.
    monitor: computes the per-layer metrics of a step.
  """

  model: Network
  objective: Objective
  optimizer: optax.GradientTransformation
  augment: Callable[[jax.Array, jax.Array], jax.Array]
  learning_rate: Schedule
  momentum: Schedule
  monitor: Monitor = nothing


def init_state(
    method: Method, key: jax.Array, image_shape: tuple[int, int, int]
) -> TrainState:
  """Returns the initial state; the target is a copy of the online encoder.

  Args:
    method: the parts of a step.
    key: the random key of the initialisation.
    image_shape: the shape of a view, (S, S, C).
  """
  views = jnp.zeros((2, 2, *image_shape))
  variables = method.model.init(key, views, train=True)
  params, batch_stats = variables['params'], statistics(variables)
  queue = method.objective.queue
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      # Copied, because donated buffers must not alias.
      target_params=jax.tree.map(jnp.copy, encoder(params)),
      target_batch_stats=jax.tree.map(jnp.copy, encoder(batch_stats)),
      opt_state=method.optimizer.init(params),
      past_keys=(
          jnp.zeros((queue, method.model.projector.out_dim)) if queue else ()
      ),
  )


def abstract_state(
    method: Method, image_shape: tuple[int, int, int]
) -> TrainState:
  """Returns the shapes and dtypes of `init_state` without computing it."""
  return jax.eval_shape(
      lambda: init_state(method, jax.random.key(0), image_shape)
  )


def encoder(tree: PyTree) -> PyTree:
  """Returns the parameters or statistics without those of the predictor."""
  return {name: sub for name, sub in tree.items() if name != 'predictor'}


def statistics(variables: PyTree) -> PyTree:
  """Returns the running statistics; {} for a network without BatchNorm."""
  return variables['batch_stats'] if 'batch_stats' in variables else {}


def encode_target(
    method: Method, params: PyTree, batch_stats: PyTree, views: jax.Array
) -> tuple[Embeddings | None, PyTree]:
  """Returns the target's embeddings and its updated running statistics.

  If the objective has no target network, the embeddings are None and the
  statistics are unchanged. The moving average of the parameters is still
  kept, and can be evaluated.
  """
  if not method.objective.has_target:
    return None, batch_stats
  target, stats = method.model.apply(
      {'params': params, 'batch_stats': batch_stats}, views, train=True,
      mutable=['batch_stats'], method='encode',
  )
  return target, statistics(stats)


@jax.named_scope('ema')
def ema(target: PyTree, params: PyTree, momentum: jax.Array) -> PyTree:
  """Returns m * target + (1 - m) * params.

  The formula is written so that tensors that are equal stay exactly equal.
  """
  return jax.tree.map(
      lambda t, p: t + (1 - momentum).astype(t.dtype) * (p - t), target, params
  )


def train_step(
    method: Method, key: jax.Array, state: TrainState, images: jax.Array
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
  """Takes one step of the paper's Algorithm 1, in the order given there.

  Args:
    method: the parts of a step.
    key: the key of the run's augmentation; the step is folded in here.
    state: the current state, donated by the caller.
    images: uint8 [B, H, W, C], or crops [B, V, S, S, C]; B is the global batch
      size.

  Returns:
    The next state; float32 scalar metrics of this step; and the features of
    both views, [B, 2, dim], for monitors. If nothing uses the features, they
    cost nothing once the step is jitted.
  """
  views = method.augment(images, jax.random.fold_in(key, state.step))
  # The target is updated first, from the online network before its own update.
  # The updated target computes the keys.
  momentum = method.momentum(state.step)
  target_params = ema(state.target_params, encoder(state.params), momentum)
  target, target_stats = encode_target(
      method, target_params, state.target_batch_stats, views
  )

  def loss_fn(params):
    online, stats = method.model.apply(
        {'params': params, 'batch_stats': state.batch_stats},
        views, train=True, mutable=['batch_stats'],
    )
    with jax.named_scope('loss'):
      loss, metrics = method.objective.loss(online, target, state.past_keys)
    return loss, (statistics(stats), online.features, metrics)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, (batch_stats, features, metrics)), grads = grad_fn(state.params)
  params, opt_state = update(method, state, grads)
  with jax.named_scope('metrics'):
    metrics |= step_metrics(method, state.step, loss, grads, features)
    metrics |= method.monitor(state.step, grads, opt_state, state.params)
  return state.replace(
      step=state.step + 1,
      params=params,
      batch_stats=batch_stats,
      target_params=target_params,
      target_batch_stats=target_stats,
      opt_state=opt_state,
      past_keys=method.objective.remember(state.past_keys, target),
  ), metrics, features


@jax.named_scope('optimizer')
def update(
    method: Method, state: TrainState, grads: PyTree
) -> tuple[PyTree, optax.OptState]:
  """Returns the parameters and the optimizer state after one update."""
  updates, opt_state = method.optimizer.update(
      grads, state.opt_state, state.params
  )
  return optax.apply_updates(state.params, updates), opt_state


def step_metrics(
    method: Method, step: jax.Array, loss: jax.Array, grads: PyTree,
    features: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the metrics that a stability study needs per step (paper s4)."""
  return {
      'train/loss': loss,
      'train/lr': method.learning_rate(step),
      'train/momentum': method.momentum(step),
      'train/feature_std': feature_std(features[:, 0]),
      'grad_norm/global': optax.tree.norm(grads),
  }
