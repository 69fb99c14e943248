"""Weights as one flat dict, and their places in a PyTorch state_dict."""

from collections.abc import Mapping
import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.models import vit
from mocov3_jax.runs import network
from mocov3_jax.runs.network import ENCODERS, FIELDS, Path
from mocov3_jax.weights import torch_names
from mocov3_jax.weights.torch_names import COUNTER

SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a file or a checkpoint holds.

  Attributes:
    config: the run's config; its model, head and data.image_size describe the
      network.
    step: the number of updates done.
    flat: arrays in our layout by path. A path begins with a field of
      TrainState, or with an optax slot: 'mu', 'nu' or 'trace'.
    names: what the source calls each array.
    assumed: what was assumed because the source does not specify it, in words.
  """

  config: ConfigDict
  step: int
  flat: dict[Path, np.ndarray]
  names: dict[Path, str]
  assumed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor of a state_dict belongs.

  Attributes:
    path: path in our tree.
    shape: shape in PyTorch's layout.
  """

  path: Path
  shape: tuple[int, ...]


def require_finite(source: str, weights: Weights) -> None:
  """Raises UserError with the first tensor that is not finite.

  Args:
    source: where the weights are from, for the message.
    weights: what was read.
  """
  for path, array in weights.flat.items():
    # Other types cannot be NaN or infinite.
    if jnp.issubdtype(array.dtype, jnp.inexact):
      if not np.isfinite(array).all():
        raise UserError(
            f'{source}: {weights.names[path]} holds values that are NaN '
            'or infinite. Use weights that are finite, such as those of '
            'an earlier checkpoint.'
        )


def head_name(config: ConfigDict) -> str:
  """Returns what PyTorch calls the projector or classifier of this model."""
  return 'fc' if config.model.name in models.RESNETS else 'head'


def _require_names(config: ConfigDict) -> None:
  if config.model.patch_embed in ('batch_norm', 'weight_norm'):
    raise UserError(
        f'model.patch_embed={config.model.patch_embed!r} has no place in the '
        'checkpoints of the release and of timm. Use a patch projection '
        'without a normalisation.'
    )


def full_places(config: ConfigDict) -> dict[str, Place]:
  """Returns the places of the release's state_dict: encoders and predictor.

  Raises:
    UserError: for a network that the release has no names for.
  """
  _require_names(config)
  if config.head.prototypes:
    raise UserError(
        f'head.prototypes={config.head.prototypes} has no counterpart in a '
        'checkpoint of the release. Use .pth or .safetensors for only a '
        'backbone.'
    )
  places = {}
  for path, leaf in network.network_shapes(config).items():
    collection, *rest = path
    name = torch_names.torch_name(tuple(rest), head_name(config))
    shape = torch_names.torch_shape(leaf.shape, path)
    if rest[0] == 'predictor':
      places[name] = Place(path, shape)
      continue
    for owner, fields in FIELDS.items():
      ours = (fields[collection], *rest)
      places[f'{owner}.{name}'] = Place(ours, shape)
  return _sorted(places)


def backbone_places(
    config: ConfigDict, encoder: str, classes: int = 0
) -> dict[str, Place]:
  """Returns the places of a backbone's state_dict, as in timm.

  Args:
    config: config of the run.
    encoder: 'query' or 'momentum'.
    classes: number of outputs of the linear classifier; 0 = there is none.

  Raises:
    UserError: for a backbone that timm has no names for.
  """
  _require_names(config)
  fields, head = FIELDS[ENCODERS[encoder]], head_name(config)
  places, shapes = {}, network.network_shapes(config)
  for path, leaf in shapes.items():
    collection, *rest = path
    if rest[0] == 'backbone':
      name = torch_names.torch_name(tuple(rest), head)
      shape = torch_names.torch_shape(leaf.shape, path)
      places[name] = Place((fields[collection], *rest), shape)
  if classes:
    # The projector's input is the features, too.
    width = shapes['params', 'projector', 'linear_0', 'kernel'].shape[0]
    for leaf, shape in ('kernel', (classes, width)), ('bias', (classes,)):
      path = ('params', 'classifier', leaf)
      places[torch_names.torch_name(path[1:], head)] = Place(path, shape)
  return _sorted(places)


def _sorted(places: dict[str, Place]) -> dict[str, Place]:
  return {name: places[name] for name in torch_names.in_order(places)}


def constants(
    config: ConfigDict, places: Mapping[str, Place], step: int
) -> dict[str, np.ndarray]:
  """Returns the tensors of a state_dict that hold no weights.

  These are the fixed position tables, and each BatchNorm's count of the batches
  that it has seen: two per step.
  """
  result = {}
  for name in places:
    owner, _, leaf = name.rpartition('.')
    if leaf == 'running_mean':
      result[f'{owner}.{COUNTER}'] = np.asarray(2 * step, np.int64)
    if name.endswith('blocks.0.norm1.weight') and (
        config.model.positions == 'sincos'
    ):
      prefix = name.removesuffix('blocks.0.norm1.weight')
      result[f'{prefix}pos_embed'] = position_table(config)
  return result


def position_table(config: ConfigDict) -> np.ndarray:
  """Returns the fixed positions, [1, T, D]."""
  backbone = models.build_backbone(config.model, config.data.image_size)
  side = config.data.image_size // backbone.patch_size
  table = vit.sincos_positions(side, side, backbone.dim)
  return table if backbone.readout == 'cls' else table[:, 1:]


def from_torch(
    source: str,
    tensors: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    known: Mapping[str, np.ndarray],
    rounding: float,
) -> dict[Path, np.ndarray]:
  """Puts tensors in their places; there must be one tensor for each place.

  Args:
    source: file name, for messages.
    tensors: a state_dict.
    places: the places that it should fill.
    known: tensors that may be there but are not needed.
    rounding: relative rounding error of the file's values.

  Returns:
    Arrays in our layout by our paths, float32.

  Raises:
    UserError: for tensors that are missing, left over, or of another shape or
      type, and for positions other than the fixed ones; lists the first of
      each.
  """
  problems = _listed('missing', [n for n in places if n not in tensors])
  problems += _listed(
      'left over', [n for n in tensors if n not in places and n not in known]
  )
  problems += _listed('of another shape', [
      f'{n} {tensors[n].shape} instead of {place.shape}'
      for n, place in places.items()
      if n in tensors and tensors[n].shape != place.shape
  ])
  problems += _listed('not the fixed sine-cosine table', [
      n for n, table in known.items()
      if n in tensors and n.endswith('pos_embed')
      and not is_table(tensors[n], table, rounding)
  ])
  problems += _listed('not of a floating-point type', [
      f'{n} ({tensors[n].dtype})' for n in places
      if n in tensors and tensors[n].dtype.kind != 'f'
  ])
  if problems:
    raise UserError(
        f'{source} does not fit the network:\n  ' + '\n  '.join(problems)
        + '\nUse exactly the tensors of the architecture. Name those to '
        'leave out in --ignore, and the architecture by --config.'
    )
  return {
      place.path: torch_names.to_our_layout(
          tensors[name].astype(np.float32), place.path
      )
      for name, place in places.items()
  }


def is_table(
    array: np.ndarray, table: np.ndarray, rounding: float
) -> bool:
  """Returns whether positions are the fixed table, up to rounding."""
  return array.shape == table.shape and np.allclose(
      array, table, atol=max(1e-5, rounding)
  )


def _listed(problem: str, names: list[str]) -> list[str]:
  if not names:
    return []
  more = f', ... ({len(names)} in all)' if len(names) > SHOWN else ''
  return [f'{problem}: {", ".join(names[:SHOWN])}{more}']


def to_torch(
    weights: Weights, places: Mapping[str, Place]
) -> dict[str, np.ndarray]:
  """Returns the state_dict with these places, in PyTorch's order.

  Raises:
    UserError: if the weights lack one of them.
  """
  missing = [
      '/'.join(place.path) for place in places.values()
      if place.path not in weights.flat
  ]
  if missing:
    raise UserError(
        'the source lacks something that the target needs; '
        + _listed('missing', missing)[0]
        + '. Use .pth or .safetensors for only a backbone; --encoder=query if '
        'there is no momentum encoder.'
    )
  tensors = constants(weights.config, places, weights.step)
  for name, place in places.items():
    tensors[name] = torch_names.to_torch_layout(
        weights.flat[place.path], place.path
    )
  return {name: tensors[name] for name in torch_names.in_order(tensors)}
