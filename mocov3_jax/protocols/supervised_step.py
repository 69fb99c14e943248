"""One pure step of fine-tuning."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocov3_jax.method.optimizers import Schedule
from mocov3_jax.method.train_step import PyTree, ema, statistics


@flax.struct.dataclass
class SupervisedState:
  """All that fine-tuning carries from step to step.

  Attributes:
    step: int32 scalar, number of updates done.
    params: {'backbone', 'head'}.
    batch_stats: running BatchNorm statistics.
    opt_state: state of the optimizer.
    average: moving averages of 'params' and 'batch_stats'; or empty.
  """

  step: jax.Array
  params: PyTree
  batch_stats: PyTree
  opt_state: optax.OptState
  average: PyTree


@flax.struct.dataclass
class Supervised:
  """The parts of a supervised step; all of them are functions.

  Attributes:
    model: images and `train` -> logits; draws from the rng 'drop_path'.
    optimizer: the optax chain; it ends with the learning rate.
    augment: (uint8 images, labels, key) -> images [B, S, S, C] and targets
      [B, classes], rows that sum to 1, or to 0 where there is no label.
    loss: (logits, targets) -> scalar.
    learning_rate: the schedule; only logged here.
    average_decay: decay of the moving averages, if the state has them.
  """

  model: Any
  optimizer: optax.GradientTransformation
  augment: Callable[..., tuple[jax.Array, jax.Array]]
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  learning_rate: Schedule
  average_decay: float


def supervised_step(
    method: Supervised, key: jax.Array, state: SupervisedState,
    images: jax.Array, labels: jax.Array,
) -> tuple[SupervisedState, dict[str, jax.Array]]:
  """Takes one step of fine-tuning.

  Args:
    method: the parts of the step.
    key: random key of the run; the step is folded in here.
    state: donated by the caller.
    images: uint8 [B, H, W, C], or crops [B, V, S, S, C]; B is the global batch
      size.
    labels: int [B], -1 for images without a label.

  Returns:
    The next state and float32 scalar metrics of this step.
  """
  view_key, drop_key = jax.random.split(jax.random.fold_in(key, state.step))
  views, targets = method.augment(images, labels, view_key)

  def loss_fn(params):
    logits, stats = method.model.apply(
        {'params': params, 'batch_stats': state.batch_stats}, views,
        train=True, mutable=['batch_stats'], rngs={'drop_path': drop_key},
    )
    return method.loss(logits, targets), stats

  (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = method.optimizer.update(
      grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  now = {'params': params, 'batch_stats': statistics(stats)}
  decay = jnp.asarray(method.average_decay)
  return SupervisedState(
      step=state.step + 1, opt_state=opt_state, **now,
      average=state.average and ema(state.average, now, decay),
  ), {
      'train/loss': loss,
      'train/loss_chance': jnp.log(jnp.asarray(targets.shape[-1], float)),
      'train/lr': method.learning_rate(state.step),
      'grad_norm/global': optax.tree.norm(grads),
  }
