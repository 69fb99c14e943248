"""Per-layer metrics of a training step: gradients and parameter updates.

A stability study looks at them step by step (paper s4). Wortsman et al. 2023
(arXiv 2304.13013) find that AdamW's update of the patch embedding is too large
some steps before the loss rises: its second moment has forgotten, or not yet
seen, gradients of that size.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from mocov3_jax.base.errors import UserError
from mocov3_jax.method import optimizers

PyTree = Any
Metrics = dict[str, jax.Array]
# (step, gradients, optimizer state after the update, parameters before the
# update) -> metrics.
Monitor = Callable[[jax.Array, PyTree, optax.OptState, PyTree], Metrics]
# Paths in the parameter tree, by the names of the layers in the metrics.
Layers = dict[str, tuple[str, ...]]
# Avoids division by zero.
TINY = 1e-30


def layers_of(backbone: Any, every: bool) -> Layers:
  """Returns the layers to log, with their paths in the parameter tree.

  Args:
    backbone: the network's backbone.
    every: whether to add the other blocks and both heads to the first layer
      and the last block.
  """
  found = {
      'patch_embed': ('backbone', backbone.first_layer),
      'last_block': ('backbone', backbone.blocks[-1]),
  }
  if every:
    found |= {
        f'block_{i}': ('backbone', name)
        for i, name in enumerate(backbone.blocks[:-1])
    } | {name: (name,) for name in ('projector', 'predictor')}
  return found


def _parts(tree: PyTree, layers: Layers) -> dict[str, PyTree]:
  """Returns the subtree of each layer that the tree contains."""
  found = {}
  for name, path in layers.items():
    part = tree
    for key in path:
      part = part[key] if part is not None and key in part else None
    if part is not None and jax.tree.leaves(part):
      found[name] = part
  return found


def gradients(layers: Layers) -> Monitor:
  """Returns a monitor of each layer's largest gradient (paper, Fig. 4).

  A frozen patch projection has exactly 0, because no gradient reaches it.
  """
  def measure(step, grads, opt_state, params):
    del step, opt_state, params
    return {
        f'grad_max/{name}': max_abs(part)
        for name, part in _parts(grads, layers).items()
    }

  return measure


def updates(
    c: ConfigDict, layers: Layers, clip: Callable[[PyTree], PyTree]
) -> Monitor:
  """Returns a monitor of how AdamW or LAMB updates each layer.

  It logs three metrics for each layer that is not frozen:
    update_rms: the square root of the mean of g^2 / v (RMS_t of Wortsman et
      al.), near 1 while gradients keep their usual size.
    update_decay: the norm of the weight decay, as a fraction of the sum of that
      norm and the norm of the rest of the update.
    weight_norm: the norm of the layer's parameters.

  Args:
    c: `config.optimizer`.
    layers: the layers to log.
    clip: the clipping of gradients before they enter the optimizer's moments.

  Raises:
    UserError: if the optimizer has no second moment.
  """
  if c.name not in ('adamw', 'lamb'):
    raise UserError(
        'log.updates=True needs an optimizer with a second moment, and '
        f'optimizer.name={c.name!r} has none. Allowed: log.updates=False; '
        'optimizer.name=adamw or lamb.'
    )

  def measure(step, grads, opt_state, params):
    grads = clip(grads)
    parts = functools.partial(_parts, layers=layers)
    others = list(map(parts, (
        grads, _moment(opt_state, 'mu'), params, optimizers.decayed(c, params)
    )))
    found = {}
    for name, nu in parts(_moment(opt_state, 'nu')).items():
      g, mu, weights, decayed = (part[name] for part in others)
      mean, square = optimizers.unbiased(c, mu, nu, step + 1)
      squares = jax.tree.leaves(optimizers.relative_squares(c, g, square))
      moved = optax.tree.norm(optimizers.adam_step(c, mean, square))
      decay = c.weight_decay * optax.tree.norm(decayed)
      found |= {
          f'update_rms/{name}': jnp.sqrt(
              sum(map(jnp.sum, squares)) / sum(x.size for x in squares)
          ),
          f'update_decay/{name}': decay / jnp.maximum(decay + moved, TINY),
          f'weight_norm/{name}': optax.tree.norm(weights),
      }
    return found

  return measure


def _moment(opt_state: optax.OptState, name: str) -> PyTree:
  [(_, found)] = optax.tree.get_all_with_path(opt_state, name)
  return found


def nothing(*of_step: Any) -> Metrics:
  """Logs nothing."""
  del of_step
  return {}


def both(*monitors: Monitor) -> Monitor:
  """Returns a monitor that logs what all the given monitors log."""
  def measure(*of_step):
    found = {}
    for monitor in monitors:
      found |= monitor(*of_step)
    return found

  return measure


def max_abs(tree: PyTree) -> jax.Array:
  """Returns the largest absolute value in a tree, as a scalar."""
  leaves = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]
  return jnp.max(jnp.stack(leaves))
