"""Files of weights: PyTorch's, read without running code, and safetensors."""

import argparse
from collections.abc import Mapping
import dataclasses
import pickle
from typing import Any
import warnings

from etils import epath
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from mocov3_jax.errors import UserError

TORCH_SUFFIXES = ('.pth.tar', '.pth', '.pt')
SAFETENSORS = '.safetensors'
SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS)


@dataclasses.dataclass(frozen=True)
class File:
  """What a file of weights holds.

  Attributes:
    tensors: the state_dict, without the prefix 'module.'.
    optimizer: its state by the number of the parameter; empty if none.
    extra: names of what else is there.
    metadata: of a safetensors file.
  """

  tensors: dict[str, np.ndarray]
  optimizer: dict[int, dict[str, Any]]
  extra: tuple[str, ...]
  metadata: dict[str, str]


def read(path: epath.Path) -> File:
  """Reads a file of weights.

  Raises:
    UserError: if it is none, is damaged, or wants to run code.
  """
  if not path.is_file():
    raise UserError(f'--from={path} is no file. Allowed: a file or a run.')
  if path.name.endswith(SAFETENSORS):
    return _read_safetensors(path)
  return _read_torch(path)


def _read_safetensors(path: epath.Path) -> File:
  try:
    tensors = safetensors_numpy.load_file(path)
    with safetensors.safe_open(path, 'numpy') as file:
      metadata = file.metadata() or {}
  except (safetensors.SafetensorError, TypeError, KeyError) as e:
    raise UserError(f'--from={path} cannot be read as safetensors: {e}') from e
  tensors = {
      name: x.astype(np.float32) if x.dtype.itemsize < 4 else x
      for name, x in tensors.items()
  }
  return File(tensors, {}, (), metadata)


def _read_torch(path: epath.Path) -> File:
  torch = import_torch()
  try:
    # Tensors and plain containers only; nothing in the file is executed.
    # DeiT's training saves its arguments as well, a harmless namespace.
    with warnings.catch_warnings(), torch.serialization.safe_globals(
        [argparse.Namespace]
    ):
      warnings.simplefilter('ignore')  # The error says it all.
      content = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as e:
    raise UserError(
        f'--from={path} is refused: it is damaged, or holds more than tensors '
        f'and plain values, which could run code ({str(e).splitlines()[0]}). '
        'Allowed: a file that torch.load(..., weights_only=True) reads.'
    ) from e
  except Exception as e:  # PyTorch raises many kinds for damaged files.
    raise UserError(
        f'--from={path} cannot be read as a PyTorch file: '
        f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
    ) from e
  if not isinstance(content, dict):
    raise UserError(
        f'--from={path} holds a {type(content).__name__}. Allowed: a dict '
        'with a state_dict.'
    )
  found = [k for k in ('state_dict', 'model') if _holds_dict(content, k)]
  state = content[found[0]] if found else content
  optimizer = {}
  if _holds_dict(content, 'optimizer') and 'state' in content['optimizer']:
    optimizer = {
        index: {slot: _array(x) for slot, x in slots.items()}
        for index, slots in content['optimizer']['state'].items()
    }
  tensors = {
      str(name).removeprefix('module.'): _array(x)
      for name, x in state.items() if isinstance(x, torch.Tensor)
  }
  return File(tensors, optimizer, tuple(content) if found else (), {})


def _holds_dict(content: dict[str, Any], key: str) -> bool:
  return key in content and isinstance(content[key], dict)


def _array(x: Any) -> np.ndarray:
  torch = import_torch()
  if not isinstance(x, torch.Tensor):
    return np.asarray(x)
  # NumPy has no bfloat16; half precisions widen to float32 without loss.
  half = x.is_floating_point() and x.element_size() < 4
  return (x.float() if half else x).numpy()


def write_safetensors(
    path: epath.Path, tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
  """Writes a safetensors file, whole or not at all."""
  part = _part(path)
  safetensors_numpy.save_file(dict(tensors), part, dict(metadata))
  part.replace(path)


def write_torch(path: epath.Path, content: dict[str, Any]) -> None:
  """Writes a PyTorch file, whole or not at all; arrays become tensors.

  Args:
    path: of the file.
    content: nested dicts and lists of plain values and numpy arrays.
  """
  torch = import_torch()

  def convert(x):
    if isinstance(x, dict):
      return {key: convert(value) for key, value in x.items()}
    return torch.tensor(x) if isinstance(x, np.ndarray) else x

  part = _part(path)
  torch.save(convert(content), part)
  part.replace(path)


def _part(path: epath.Path) -> epath.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  return path.with_name(path.name + '.part')


def import_torch() -> Any:
  """Imports PyTorch, which only these files need.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import torch
  except ImportError as e:
    raise UserError(
        '.pth and .pth.tar files need PyTorch, which is not installed. '
        'Allowed: pip install torch --index-url '
        'https://download.pytorch.org/whl/cpu; or .safetensors files.'
    ) from e
  return torch
