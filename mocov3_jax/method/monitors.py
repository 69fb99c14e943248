"""What a step logs of its layers: gradients, and the updates made of them.

A study of stability looks at them step by step (paper s4). Wortsman et al. 2023
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
# (step, gradients, optimizer's state after them, parameters before them) ->
# metrics.
Monitor = Callable[[jax.Array, PyTree, optax.OptState, PyTree], Metrics]
# Layers by their names in the metrics.
Layers = dict[str, tuple[str, ...]]
# A norm that is none.
TINY = 1e-30


def layers_of(backbone: Any, every: bool) -> Layers:
  """Returns where the layers that are logged lie in the parameters.

  Args:
    backbone: of the network.
    every: all blocks; else the first layer and the last block alone.
  """
  found = {
      'patch_embed': ('backbone', backbone.first_layer),
      'last_block': ('backbone', backbone.blocks[-1]),
  }
  if every:
    found |= {
        f'block_{i}': ('backbone', name)
        for i, name in enumerate(backbone.blocks)
    } | {name: (name,) for name in ('projector', 'predictor')}
  return found


def _parts(tree: PyTree, layers: Layers) -> dict[str, PyTree]:
  """Returns the part of each layer that the tree has."""
  found = {}
  for name, path in layers.items():
    part = tree
    for key in path:
      part = part[key] if part is not None and key in part else None
    if part is not None and jax.tree.leaves(part):
      found[name] = part
  return found


def gradients(layers: Layers) -> Monitor:
  """Returns what logs the largest gradient of each layer (paper, Fig. 4).

  It is exactly 0 where the projection is frozen: no gradient reaches it.
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
  """Returns what logs how AdamW moves each layer.

  update_rms: the root of the mean of g^2 / v, near 1 as long as gradients are
  what they were; the RMS_t of Wortsman et al. update_decay: the norm of the
  decay as a share of the sum of its norm and that of the rest of the update.
  weight_norm: of the layer. A layer that is frozen has none of them.

  Args:
    c: `config.optimizer`.
    layers: to log.
    clip: what the gradients go through before the optimizer's moments.

  Raises:
    UserError: for an optimizer without a second moment.
  """
  if c.name not in ('adamw', 'lamb'):
    raise UserError(
        f'log.updates=True is of the second moment, which optimizer.name='
        f'{c.name!r} has not. Allowed: False, or adamw, lamb.'
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
  """Returns what logs all that these do."""
  def measure(*of_step):
    found = {}
    for monitor in monitors:
      found |= monitor(*of_step)
    return found

  return measure


def max_abs(tree: PyTree) -> jax.Array:
  """Returns the largest absolute value in a tree, a scalar."""
  leaves = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]
  return jnp.max(jnp.stack(leaves))
