"""Optimizers, parameter masks, and schedules of learning rate and momentum."""

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

  In the paper (s5), `start` and `end` are 0. The schedule reaches `end` at
  `total_steps`, one step after the last one that is taken.
  (optax.warmup_cosine_decay_schedule rounds differently in float32, and rejects
  a training run that is all warm-up.)
  """

  def schedule(step):
    step = jnp.asarray(step, float)  # float64 if that is enabled.
    rise = start + (peak - start) * step / max(warmup_steps, 1)
    # With no step after the warm-up, the cosine is never reached.
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    fall = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, rise, fall)

  return schedule


def constant_momentum(start: float, total_steps: int) -> Schedule:
  """Returns a constant momentum for the target network (paper s6.2)."""
  del total_steps
  return lambda step: jnp.full_like(step, start, dtype=float)


def cosine_momentum(start: float, total_steps: int) -> Schedule:
  """Returns a half-cosine momentum from `start` to 1 (paper App. A)."""

  def schedule(step):
    step = jnp.asarray(step, float)
    return 1 - 0.5 * (1 + jnp.cos(jnp.pi * step / total_steps)) * (1 - start)

  return schedule


MOMENTUM_SCHEDULES = {'constant': constant_momentum, 'cosine': cosine_momentum}


def build_momentum(objective: ConfigDict, total_steps: int) -> Schedule:
  """Returns the momentum schedule that `config.objective` names.

  Raises:
    UserError: if the name is not in the table.
  """
  name = objective.momentum_schedule
  if name not in MOMENTUM_SCHEDULES:
    raise unknown('objective.momentum_schedule', name, MOMENTUM_SCHEDULES)
  return MOMENTUM_SCHEDULES[name](objective.momentum, total_steps)


def cosine_by_epochs(
    peak: float, steps_per_epoch: int, total_steps: int
) -> Schedule:
  """Returns half a cosine from `peak` to 0, constant within each epoch.

  This is the schedule of the linear probe in the paper's PyTorch release.
  """

  def schedule(step):
    epoch = step // steps_per_epoch
    progress = epoch * steps_per_epoch / jnp.asarray(total_steps, float)
    return peak * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  return schedule


def is_matrix(params: PyTree) -> PyTree:
  """Returns a mask of the tensors that have more than one axis."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def is_kernel(params: PyTree) -> PyTree:
  """Returns a mask of the kernels of linear and convolutional layers."""
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
  """Returns AdamW.

  Weight decay applies to the tensors that `c.decay_mask` selects; with 'all',
  that is every trainable tensor, as in PyTorch.

  If `c.update_clip` is not 0, the update of each tensor is divided by
  max(1, RMS_t / c.update_clip). With a bound of 1 this is StableAdamW (Wortsman
  et al. 2023, arXiv 2304.13013, algorithm 2).
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
  """Returns AdamW's bias-corrected moments after `count` updates."""
  return (
      optax.tree.bias_correction(mu, c.b1, count),
      optax.tree.bias_correction(nu, c.b2, count),
  )


def relative_squares(c: ConfigDict, grads: PyTree, square: PyTree) -> PyTree:
  """Returns g^2 / v, about 1 while gradients keep their usual size.

  The square root of its mean over a tensor is RMS_t of Wortsman et al. 2023.

  Args:
    c: `config.optimizer`.
    grads: the gradients of a step.
    square: the bias-corrected second moment after that step.
  """
  least = max(c.eps**2, float(jnp.finfo(jnp.float32).tiny))
  return jax.tree.map(lambda g, v: g**2 / jnp.maximum(v, least), grads, square)


def adam_step(c: ConfigDict, mean: PyTree, square: PyTree) -> PyTree:
  """Returns AdamW's update from bias-corrected moments.

  Weight decay and learning rate are not applied.
  """
  return jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v) + c.eps), mean, square
  )


def decayed(c: ConfigDict, params: PyTree) -> PyTree:
  """Returns the parameters with zeros in place of those without decay."""
  mask = _decay_mask(c)
  if mask is None:
    return params
  return jax.tree.map(lambda p, m: p * m, params, mask(params))


def lars(
    c: ConfigDict, learning_rate: Schedule
) -> optax.GradientTransformation:
  """Returns LARS (You et al. 2017) as MoCo v3 uses it for ResNets.

  It differs from `optax.lars`, which scales by the learning rate before the
  momentum buffer; the results differ once the rate changes. Weight decay and
  trust ratio apply only to tensors with more than one axis.
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

  It is AdamW's update, rescaled for each tensor to the norm of that tensor.
  """
  return optax.lamb(
      learning_rate, c.b1, c.b2, c.eps,
      weight_decay=c.weight_decay, mask=_decay_mask(c),
  )


OPTIMIZERS = {'adamw': adamw, 'lars': lars, 'lamb': lamb}


def is_in(*names: str) -> Callable[[PyTree], PyTree]:
  """Returns a function that masks the backbone parts with these names."""
  return functools.partial(
      jax.tree_util.tree_map_with_path,
      lambda path, _: path[0].key == 'backbone' and path[1].key in names,
  )


def layer_scales(params: PyTree, depth: int, decay: float) -> PyTree:
  """Returns factors of the learning rate that decay from the last layer down.

  Bao et al. 2022 (arXiv 2106.08254): decay^0 for the heads and the final norm,
  decay^1 for the last block, ..., decay^(depth + 1) for everything before the
  first block.

  Args:
    params: parameters with an entry 'backbone', and heads or a classifier.
    depth: the number of blocks of the backbone.
    decay: the factor from one layer to the layer before; 1 = no decay.
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
  """Returns a transformation that scales updates by `layer_scales`."""
  def scaled(updates, params):
    scales = layer_scales(params, depth, decay)
    return jax.tree.map(lambda u, s: u * s, updates, scales)

  return optax.stateless(scaled)


def is_backbone(params: PyTree) -> PyTree:
  """Returns a mask of the backbone."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[0].key == 'backbone', params
  )


def after(steps: int) -> optax.GradientTransformation:
  """Returns a transformation that zeroes the updates before step `steps`."""
  return optax.scale_by_schedule(
      lambda step: jnp.where(step < steps, 0.0, 1.0)
  )


def patch_embed_clip(c: ConfigDict) -> optax.GradientTransformation:
  """Returns a transformation that clips the patch projection's gradient.

  It limits the norm to `c.patch_embed_clip` (paper s4.2).
  """
  return optax.masked(
      optax.clip_by_global_norm(c.patch_embed_clip), is_in('patch_embed')
  )


def clipped(c: ConfigDict, grads: PyTree) -> PyTree:
  """Returns the gradients after `patch_embed_clip`."""
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
    frozen: parts of the backbone that are never updated. No gradient reaches
      them anyway, but weight decay would still change them.
    clip_patch_embed: whether to clip the norm of the patch projection's
      gradient to `c.patch_embed_clip` (paper s4.2).
    depth: the number of blocks of the backbone, for `c.layer_decay`.
    frozen_steps: the number of steps at the start in which the backbone is not
      updated. The moments of its gradient are tracked from the first step on,
      so that its first updates are no larger than later ones.

  Raises:
    UserError: if the name is not in the table, or `c.update_clip` is set for
      an optimizer other than AdamW.
  """
  if c.name not in OPTIMIZERS:
    raise unknown('optimizer.name', c.name, OPTIMIZERS)
  if c.update_clip and c.name != 'adamw':
    raise UserError(
        f'optimizer.update_clip={c.update_clip} applies only to AdamW, and '
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
