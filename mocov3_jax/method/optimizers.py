"""Optimizer chains, what they leave alone, and the two schedules."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from mocov3_jax.base.errors import UserError, unknown

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, start: float = 0.0,
    end: float = 0.0,
) -> Schedule:
  """Returns linear warm-up from `start` to `peak`, then half a cosine to `end`.

  Paper s5: from exactly 0 at step 0, and to 0. The value at `total_steps` would
  be `end`; the last step is one before. (optax.warmup_cosine_decay_schedule
  rounds otherwise in float32, and refuses a training that is all warm-up.)
  """

  def schedule(step):
    step = jnp.asarray(step, float)  # float64 where that is enabled.
    rise = start + (peak - start) * step / max(warmup_steps, 1)
    # With no step after the warm-up, the cosine is never reached.
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    fall = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, rise, fall)

  return schedule


def constant_momentum(start: float, total_steps: int) -> Schedule:
  """Returns a constant momentum of the target (paper s6.2)."""
  del total_steps
  return lambda step: jnp.full_like(step, start, dtype=float)


def cosine_momentum(start: float, total_steps: int) -> Schedule:
  """Returns half a cosine from `start` to 1 for the target (paper App. A)."""

  def schedule(step):
    step = jnp.asarray(step, float)
    return 1 - 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps)) * (1 - start)

  return schedule


MOMENTUM_SCHEDULES = {'constant': constant_momentum, 'cosine': cosine_momentum}


def build_momentum(objective: ConfigDict, total_steps: int) -> Schedule:
  """Returns the momentum schedule that `config.objective` names.

  Raises:
    UserError: for a name that is not in the table.
  """
  name = objective.momentum_schedule
  if name not in MOMENTUM_SCHEDULES:
    raise unknown('objective.momentum_schedule', name, MOMENTUM_SCHEDULES)
  return MOMENTUM_SCHEDULES[name](objective.momentum, total_steps)


def cosine_by_epochs(
    peak: float, steps_per_epoch: int, total_steps: int
) -> Schedule:
  """Returns half a cosine from `peak` to 0, constant throughout an epoch.

  The linear probe of the paper's PyTorch release.
  """

  def schedule(step):
    epoch = step // steps_per_epoch
    progress = epoch * steps_per_epoch / jnp.asarray(total_steps, float)
    return peak * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  return schedule


def is_matrix(params: PyTree) -> PyTree:
  """Marks the tensors with more than one axis."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def is_kernel(params: PyTree) -> PyTree:
  """Marks the weights of linear layers and convolutions, by their name."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key == 'kernel', params
  )


DECAY_MASKS = {'all': None, 'matrices': is_kernel}


def _decay_mask(c: ConfigDict) -> Callable[[PyTree], PyTree] | None:
  if c.decay_mask not in DECAY_MASKS:
    raise unknown('optimizer.decay_mask', c.decay_mask, DECAY_MASKS)
  return DECAY_MASKS[c.decay_mask]


def adamw(
    c: ConfigDict, learning_rate: Schedule
) -> optax.GradientTransformation:
  """Returns AdamW; it decays every trainable tensor, as PyTorch's does.

  With `c.update_clip`, the rate of each tensor is divided by its RMS_t over
  that bound, where it is above 1: StableAdamW (Wortsman et al. 2023, arXiv
  2304.13013, algorithm 2), whose bound is 1.
  """
  chain = optax.chain(
      optax.scale_by_adam(c.b1, c.b2, c.eps),
      optax.add_decayed_weights(c.weight_decay, _decay_mask(c)),
      optax.scale_by_learning_rate(learning_rate),
  )
  if not c.update_clip:
    return chain

  def update(grads, state, params):
    updates, state = chain.update(grads, state, params)
    adam = state[0]
    _, square = unbiased(c, adam.mu, adam.nu, adam.count)

    def slower(update, squares):
      rms = jnp.sqrt(jnp.mean(squares))
      return update / jnp.maximum(1.0, rms / c.update_clip)

    squares = relative_squares(c, grads, square)
    return jax.tree.map(slower, updates, squares), state

  return optax.GradientTransformation(chain.init, update)


def unbiased(
    c: ConfigDict, mu: PyTree, nu: PyTree, count: jax.Array
) -> tuple[PyTree, PyTree]:
  """Returns AdamW's moments without their bias towards 0, after `count`."""
  return (
      optax.tree.bias_correction(mu, c.b1, count),
      optax.tree.bias_correction(nu, c.b2, count),
  )


def relative_squares(c: ConfigDict, grads: PyTree, square: PyTree) -> PyTree:
  """Returns g^2 / v, about 1 where gradients are what they have been.

  The root of its mean over a tensor is RMS_t of Wortsman et al. 2023.

  Args:
    c: `config.optimizer`.
    grads: of a step.
    square: the second moment after it, without bias.
  """
  least = max(c.eps**2, float(jnp.finfo(jnp.float32).tiny))
  return jax.tree.map(lambda g, v: g**2 / jnp.maximum(v, least), grads, square)


def adam_step(c: ConfigDict, mean: PyTree, square: PyTree) -> PyTree:
  """Returns AdamW's update before decay and rate, of unbiased moments."""
  return jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v) + c.eps), mean, square
  )


def decayed(c: ConfigDict, params: PyTree) -> PyTree:
  """Returns the parameters that decay, and zeros for the others."""
  mask = _decay_mask(c)
  if mask is None:
    return params
  return jax.tree.map(lambda p, m: p * m, params, mask(params))


def lars(
    c: ConfigDict, learning_rate: Schedule
) -> optax.GradientTransformation:
  """Returns LARS (You et al. 2017) as MoCo v3 uses it for ResNets.

  Not `optax.lars`, which scales by the learning rate before the momentum
  buffer: the two differ once the rate changes. Decay and trust ratio apply to
  tensors with more than one axis.
  """
  return optax.chain(
      optax.add_decayed_weights(c.weight_decay, is_matrix),
      optax.masked(
          optax.scale_by_trust_ratio(trust_coefficient=c.trust_coefficient),
          is_matrix,
      ),
      optax.trace(c.momentum),
      optax.scale_by_learning_rate(learning_rate),
  )


def lamb(
    c: ConfigDict, learning_rate: Schedule
) -> optax.GradientTransformation:
  """Returns LAMB (You et al. 2020, arXiv 1904.00962), which paper s4.1 studies.

  AdamW's update, scaled for each tensor to the norm of that tensor.
  """
  return optax.lamb(
      learning_rate, c.b1, c.b2, c.eps,
      weight_decay=c.weight_decay, mask=_decay_mask(c),
  )


OPTIMIZERS = {'adamw': adamw, 'lars': lars, 'lamb': lamb}


def is_in(*names: str) -> Callable[[PyTree], PyTree]:
  """Returns what marks these parts of the backbone."""
  return functools.partial(
      jax.tree_util.tree_map_with_path,
      lambda path, _: path[0].key == 'backbone' and path[1].key in names,
  )


def layer_scales(params: PyTree, depth: int, decay: float) -> PyTree:
  """Returns factors of the rate: each block learns slower than the next.

  Bao et al. 2022 (arXiv 2106.08254): decay^0 for the head and the final norm,
  decay^1 for the last block, ..., decay^(depth + 1) for what comes before the
  first one.

  Args:
    params: with 'backbone', of a network with heads or a classifier.
    depth: blocks of its backbone.
    decay: 1 = all alike.
  """

  def scale(path, _):
    names = [key.key for key in path]
    above = 0
    if names[0] == 'backbone':
      if names[1].startswith('blocks_'):
        above = depth - int(names[1].removeprefix('blocks_'))
      elif names[1] != 'norm':
        above = depth + 1
    return decay**above

  return jax.tree_util.tree_map_with_path(scale, params)


def by_layer(depth: int, decay: float) -> optax.GradientTransformation:
  """Returns what scales updates by `layer_scales`."""
  def scaled(updates, params):
    scales = layer_scales(params, depth, decay)
    return jax.tree.map(lambda u, s: u * s, updates, scales)

  return optax.stateless(scaled)


def is_backbone(params: PyTree) -> PyTree:
  """Marks the backbone."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[0].key == 'backbone', params
  )


def after(steps: int) -> optax.GradientTransformation:
  """Returns what lets updates through from the step `steps` on."""
  return optax.scale_by_schedule(
      lambda step: jnp.where(step < steps, 0.0, 1.0)
  )


def patch_embed_clip(c: ConfigDict) -> optax.GradientTransformation:
  """Returns what shortens the patch projection's gradient (paper s4.2)."""
  return optax.masked(
      optax.clip_by_global_norm(c.patch_embed_clip), is_in('patch_embed')
  )


def clipped(c: ConfigDict, grads: PyTree) -> PyTree:
  """Returns gradients after `patch_embed_clip`."""
  clip = patch_embed_clip(c)
  return clip.update(grads, clip.init(grads))[0]


def build(
    c: ConfigDict, learning_rate: Schedule, frozen: Sequence[str] = (),
    clip_patch_embed: bool = False, depth: int = 0, frozen_steps: int = 0,
) -> optax.GradientTransformation:
  """Returns the optimizer that `config.optimizer` names.

  Args:
    c: `config.optimizer`.
    learning_rate: the rate as a function of the step.
    frozen: parts of the backbone that are kept out of the update. The
      gradient stops there anyway, but weight decay would still move them.
    clip_patch_embed: scale its gradient down to at most a norm of
      `c.patch_embed_clip` (paper s4.2).
    depth: blocks of the backbone, for `c.layer_decay`.
    frozen_steps: at the start, in which the backbone is not updated. The
      moments of its gradient are taken all the same, so that its first updates
      are no larger than later ones.

  Raises:
    UserError: for a name that is not in the table, or a bound of the update
      of another optimizer than AdamW.
  """
  if c.name not in OPTIMIZERS:
    raise unknown('optimizer.name', c.name, OPTIMIZERS)
  if c.update_clip and c.name != 'adamw':
    raise UserError(
        f'optimizer.update_clip={c.update_clip} is of AdamW, and '
        f'optimizer.name is {c.name!r}. Allowed: 0.'
    )
  optimizer = OPTIMIZERS[c.name](c, learning_rate)
  if clip_patch_embed:
    optimizer = optax.chain(patch_embed_clip(c), optimizer)
  if c.layer_decay != 1:
    optimizer = optax.chain(optimizer, by_layer(depth, c.layer_decay))
  if frozen_steps:
    optimizer = optax.chain(
        optimizer, optax.masked(after(frozen_steps), is_backbone)
    )
  if not frozen:
    return optimizer
  return optax.partition(
      {True: optax.set_to_zero(), False: optimizer}, is_in(*frozen)
  )
