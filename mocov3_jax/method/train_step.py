"""The state of training and one pure step of it."""

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
  """All that training carries from step to step; nothing in it is random.

  Attributes:
    step: int32 scalar, updates done.
    params: {'backbone', 'projector', 'predictor'} of the online network.
    batch_stats: its running BatchNorm statistics.
    target_params: {'backbone', 'projector'} of the target (momentum) network.
    target_batch_stats: the target's own statistics, of its own batches.
    opt_state: of the optimizer.
    past_keys: float32 [K, D], the newest first, where the objective keeps a
      queue of keys; zeros are none yet. () where it does not.
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
  """The parts of a training step; all of them are functions.

  Attributes:
    model: the network.
    objective: the loss, and whether it has a target network.
    optimizer: the optax chain; it ends with the learning rate.
    augment: (uint8 images, key) -> views [B, 2, S, S, C].
    learning_rate, momentum: schedules; the first is only logged here.
    monitor: what a step logs of its layers.
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
  """Initialises everything; the target starts as a copy of the encoder.

  Args:
    method: the parts.
    key: of the initialisation.
    image_shape: (S, S, C) of a view.
  """
  views = jnp.zeros((2, 2, *image_shape))
  variables = method.model.init(key, views, train=True)
  params, batch_stats = variables['params'], statistics(variables)
  queue = method.objective.queue
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      # Copies, since donated buffers must not alias.
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
  """Shapes and dtypes of what `init_state` makes; nothing is computed."""
  return jax.eval_shape(
      lambda: init_state(method, jax.random.key(0), image_shape)
  )


def encoder(tree: PyTree) -> PyTree:
  """Returns the part of parameters or statistics that the target shares."""
  return {name: sub for name, sub in tree.items() if name != 'predictor'}


def statistics(variables: PyTree) -> PyTree:
  """Returns the running statistics; {} in a network without BatchNorm."""
  return variables['batch_stats'] if 'batch_stats' in variables else {}


def encode_target(
    method: Method, params: PyTree, batch_stats: PyTree, views: jax.Array
) -> tuple[Embeddings | None, PyTree]:
  """Returns the target's embeddings, and statistics of its own batches.

  Of an objective without a target network: None. Its parameters are averaged
  all the same, and can be evaluated.
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
  """Returns m * target + (1 - m) * params, such that equal stays equal."""
  return jax.tree.map(
      lambda t, p: t + (1 - momentum).astype(t.dtype) * (p - t), target, params
  )


def train_step(
    method: Method, key: jax.Array, state: TrainState, images: jax.Array
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
  """Takes one step of the paper's Algorithm 1, in its order.

  Args:
    method: the parts.
    key: of the run's augmentation; the step is folded in here.
    state: donated by the caller.
    images: uint8 [B, H, W, C], or crops [B, V, S, S, C]; B the global batch.

  Returns:
    The next state; float32 scalar metrics of this step; and the features of
    both views, [B, 2, dim], for a monitor to use. Those that nobody uses cost
    nothing once the step is jitted.
  """
  views = method.augment(images, jax.random.fold_in(key, state.step))
  # The target moves before the online network does, and then makes the keys.
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
  """Returns the parameters and the optimizer's state after one update."""
  updates, opt_state = method.optimizer.update(
      grads, state.opt_state, state.params
  )
  return optax.apply_updates(state.params, updates), opt_state


def step_metrics(
    method: Method, step: jax.Array, loss: jax.Array, grads: PyTree,
    features: jax.Array,
) -> dict[str, jax.Array]:
  """Returns what a study of stability needs to see at every step (paper s4)."""
  return {
      'train/loss': loss,
      'train/lr': method.learning_rate(step),
      'train/momentum': method.momentum(step),
      'train/feature_std': feature_std(features[:, 0]),
      'grad_norm/global': optax.tree.norm(grads),
  }
