"""Converts the state of AdamW and of the release's LARS from and to PyTorch."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mocov3_jax.base.errors import UserError
from mocov3_jax.runs.network import Path
from mocov3_jax.weights import torch_names
from mocov3_jax.weights.state_dict import Place, Weights
from mocov3_jax.weights.torch_names import COUNTER

# optax's slots by PyTorch's (AdamW's, and those of the release's LARS).
MOMENTS = {'exp_avg': 'mu', 'exp_avg_sq': 'nu', 'mu': 'trace'}


def parameter_order(names: Iterable[str]) -> list[str]:
  """Returns the parameter names of a state_dict as PyTorch orders them."""
  buffers = ('running_mean', 'running_var', COUNTER)
  return [n for n in torch_names.in_order(names) if not n.endswith(buffers)]


def read(
    source: str, state: Mapping[int, Mapping[str, Any]],
    order: list[str], places: Mapping[str, Place],
) -> dict[Path, np.ndarray]:
  """Returns the state of an optimizer in our layout, as 'mu', 'nu', 'trace'.

  Args:
    source: file name, for messages.
    state: optimizer['state'], with numpy arrays; indexed as in `order`.
    order: names of all parameters of the model.
    places: places of its tensors.

  Raises:
    UserError: for an index, slot or shape that does not fit.
  """
  flat = {}
  for index, slots in state.items():
    if not 0 <= index < len(order) or order[index] not in places:
      raise UserError(
          f'{source}: the optimizer has a state for parameter {index}, which '
          f'is none of the {len(order)} of this architecture'
      )
    name = order[index]
    for slot, value in slots.items():
      if slot == 'step':
        continue
      if slot not in MOMENTS or value.shape != places[name].shape:
        raise UserError(
            f'{source}: the optimizer slot {slot!r} of {name} has shape '
            f'{value.shape}. Allowed: {", ".join(MOMENTS)} with shape '
            f'{places[name].shape}.'
        )
      _, *rest = places[name].path
      path = (MOMENTS[slot], *rest)
      flat[path] = torch_names.to_our_layout(value, path)
  return flat


def write(
    source: Weights, tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
) -> tuple[dict[str, Any], dict[Path, str]]:
  """Returns the state of an optimizer as PyTorch saves it.

  Args:
    source: has the moments; LAMB's have no counterpart in the release.
    tensors: the state_dict.
    places: places of its tensors.

  Returns:
    What `optimizer.state_dict()` returns, and the names of the moments in it.
  """
  c = source.config.optimizer
  peak_lr = c.lr_per_256 * source.config.batch_size / 256
  group = {'lr': peak_lr, 'weight_decay': c.weight_decay}
  slots = {}  # PyTorch's name by optax's.
  if c.name == 'adamw':
    slots = {'mu': 'exp_avg', 'nu': 'exp_avg_sq'}
    group |= {
        'betas': (c.b1, c.b2), 'eps': c.eps, 'amsgrad': False,
        'maximize': False, 'foreach': None, 'capturable': False,
        'differentiable': False, 'fused': None,
        'decoupled_weight_decay': True,
    }
  elif c.name == 'lars':
    slots = {'trace': 'mu'}
    group |= {
        'momentum': c.momentum, 'trust_coefficient': c.trust_coefficient
    }
  order = parameter_order(tensors)
  state, names = {}, {}
  for index, name in enumerate(order):
    if name not in places or places[name].path[0] != 'params':
      continue
    for slot, theirs in slots.items():
      path = (slot, *places[name].path[1:])
      if path in source.flat:
        names[path] = f'{name} ({theirs})'
        entry = state.setdefault(index, {})
        entry[theirs] = torch_names.to_torch_layout(
            source.flat[path], path
        )
    if index in state and c.name == 'adamw':
      state[index]['step'] = np.asarray(source.step, np.float32)
  group['params'] = list(range(len(order)))
  return {'state': state, 'param_groups': [group]}, names
