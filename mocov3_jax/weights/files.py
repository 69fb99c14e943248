"""Files of weights: safetensors, and PyTorch's, read without running code."""

import argparse
from collections.abc import Iterable, Mapping
import dataclasses
import pickle
import re
from typing import Any
import warnings
import zipfile

from etils import epath
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError

TORCH_SUFFIXES = ('.pth.tar', '.pth', '.pt')
SAFETENSORS = '.safetensors'
SUFFIXES = (*TORCH_SUFFIXES, SAFETENSORS)
# The key under which files of this project describe their architecture.
DESCRIPTION = 'mocov3_jax'
# The keys under which a PyTorch file may hold its state_dict.
STATES = ('state_dict', 'model')
# What wrappers put before the names of a state_dict: DistributedDataParallel,
# torch.compile, and trainers (of DINO, say) that hold a backbone and a head.
WRAPPERS = re.compile(r'^((module|_orig_mod|backbone)\.)+')
# Relative rounding error of the half-precision types.
HALVES = {'float16': 2.0**-11, 'bfloat16': 2.0**-8}


@dataclasses.dataclass(frozen=True)
class File:
  """What a file of weights holds.

  Attributes:
    tensors: the state_dict, without prefixes of wrappers ('module.').
    optimizer: state of the optimizer by parameter index; empty if there is
      none, or one of another form than PyTorch's optimizers save.
    extra: names of the file's top-level entries; empty for a bare state_dict.
    description: JSON in which a file of this project describes itself; '' if
      there is none.
    rounding: relative rounding error of the coarsest tensor.
  """

  tensors: dict[str, np.ndarray]
  optimizer: dict[int, dict[str, Any]]
  extra: tuple[str, ...]
  description: str
  rounding: float


def read(
    path: epath.Path, source: str, ignore: tuple[str, ...] = ()
) -> File:
  """Reads a file of weights.

  Args:
    path: path of the file.
    source: what messages call it, such as '--from=FILE'.
    ignore: names of state_dicts in it that are not wanted.

  Raises:
    UserError: if there is no such file, it is damaged, or it would run code.
  """
  if not path.is_file():
    raise UserError(
        f'{source} does not exist. Use a file of weights, or the '
        'workdir of a run.'
    )
  try:
    if path.name.endswith(SAFETENSORS):
      return _read_safetensors(path, source)
    return _read_torch(path, source, ignore)
  except UserError:
    raise
  except pickle.UnpicklingError as e:
    found = re.search(r'(?:Unsupported|GLOBAL) \S.*?(?=\. |\n|$)', str(e))
    raise UserError(
        f'{source} is refused: it is damaged, or holds more than tensors '
        f'and plain values, which could run code '
        f'({found[0] if found else "not a checkpoint"}). Use a file that '
        'torch.load(..., weights_only=True) reads.'
    ) from e
  except Exception as e:  # The libraries raise many kinds for damaged files.
    text = (str(e).splitlines() or [''])[0][:160]
    kind = (
        'safetensors' if path.name.endswith(SAFETENSORS) else 'a PyTorch file'
    )
    raise UserError(
        f'{source} cannot be read as {kind} ({type(e).__name__}: {text}). '
        f'Use an undamaged file of weights.'
    ) from e


def _read_safetensors(path: epath.Path, source: str) -> File:
  found = safetensors_numpy.load_file(path)
  with safetensors.safe_open(path, 'numpy') as file:
    metadata = file.metadata() or {}
  names = _unwrapped(source, found)
  tensors = {names[name]: _widened(x) for name, x in found.items()}
  description = metadata[DESCRIPTION] if DESCRIPTION in metadata else ''
  rounding = max(map(_rounding, found.values()), default=0.0)
  return File(tensors, {}, (), description, rounding)


def _unwrapped(source: str, names: Iterable[str]) -> dict[str, str]:
  """Maps the names of a state_dict to names without prefixes of wrappers.

  Raises:
    UserError: if two names become the same.
  """
  found = {name: WRAPPERS.sub('', str(name)) for name in names}
  both = {}
  for name, short in found.items():
    if short in both:
      raise UserError(
          f'{source} holds {short} twice, as {both[short]} and {name}. '
          'Use a file with one network.'
      )
    both[short] = name
  return found


def _widened(x: np.ndarray) -> np.ndarray:
  # Widens half precision to float32, without loss.
  return x.astype(np.float32) if _rounding(x) > 1e-6 else x


def _rounding(x: np.ndarray) -> float:
  return HALVES[x.dtype.name] if x.dtype.name in HALVES else 0.0


def _read_torch(
    path: epath.Path, source: str, ignore: tuple[str, ...]
) -> File:
  torch = import_torch()
  _check_archive(path, source)
  # Tensors and plain containers only; nothing in the file is executed.
  # DeiT's training saves its arguments as well, a harmless namespace.
  with warnings.catch_warnings(), torch.serialization.safe_globals(
      [argparse.Namespace]
  ):
    warnings.simplefilter('ignore')  # The error says it all.
    content = torch.load(path, map_location='cpu', weights_only=True)
  if not isinstance(content, dict):
    raise UserError(
        f'{source} holds a {type(content).__name__}. Use a dict '
        'with a state_dict.'
    )
  states = {
      str(name): value for name, value in content.items()
      if isinstance(value, dict) and name != 'optimizer'
      and any(isinstance(x, torch.Tensor) for x in value.values())
  }
  wanted = [name for name in states if name not in ignore]
  chosen = next((name for name in STATES if name in wanted), None)
  if chosen is None and len(wanted) == 1:
    chosen = wanted[0]
  others = [name for name in wanted if name != chosen]
  if others:
    keep = chosen or wanted[-1]
    drop = ','.join(name for name in wanted if name != keep)
    raise UserError(
        f'{source} holds weights under {", ".join(map(repr, states))}. '
        f'Name those to leave out: --ignore={drop} takes {keep!r}.'
    )
  state = content if chosen is None else states[chosen]
  raw = {n: x for n, x in state.items() if isinstance(x, torch.Tensor)}
  size = path.stat().length
  for name, x in raw.items():
    if x.numel() * x.element_size() > size:
      raise UserError(
          f'{source} is refused: {name} has {x.numel():,} values, more '
          'than the file holds.'
      )
  names = _unwrapped(source, raw)
  tensors = {names[name]: _array(x) for name, x in raw.items()}
  extra = () if chosen is None else tuple(map(str, content))
  described = DESCRIPTION in content
  dtypes = {str(x.dtype).removeprefix('torch.') for x in raw.values()}
  return File(
      tensors, _optimizer(content), extra,
      str(content[DESCRIPTION]) if described else '',
      max((HALVES[name] for name in dtypes if name in HALVES), default=0.0),
  )


def _check_archive(path: epath.Path, source: str) -> None:
  """Refuses a file that would grow as it is read; torch.save writes none."""
  if not zipfile.is_zipfile(path):
    return
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
  stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
  total = sum(m.file_size for m in members)
  if not stored or total > path.stat().length:
    raise UserError(
        f'{source} is refused: it is compressed, or claims to hold more '
        f'than its {path.stat().length:,} bytes. Use a file as torch.save '
        'writes it.'
    )


def _optimizer(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
  try:
    return {
        int(index): {slot: _array(x) for slot, x in slots.items()}
        for index, slots in content['optimizer']['state'].items()
    }
  except (KeyError, TypeError, ValueError, AttributeError):
    return {}  # Of another kind, or none.


def _array(x: Any) -> np.ndarray:
  torch = import_torch()
  if not isinstance(x, torch.Tensor):
    return np.asarray(x)
  # NumPy has no bfloat16; half precisions widen to float32 without loss.
  half = x.is_floating_point() and x.element_size() < 4
  return (x.float() if half else x).detach().numpy()


def write_safetensors(
    path: epath.Path, tensors: Mapping[str, np.ndarray], description: str
) -> None:
  """Writes a safetensors file, whole or not at all."""
  metadata = {'format': 'pt', DESCRIPTION: description}
  with files.open_whole(path, '--to', parents=True) as file:
    # Its save_file leaves a file that nobody else can read.
    file.write(safetensors_numpy.save(dict(tensors), metadata))


def write_torch(
    path: epath.Path, content: dict[str, Any], description: str
) -> None:
  """Writes a PyTorch file, whole or not at all; arrays become tensors.

  Args:
    path: path of the file.
    content: nested dicts and lists of plain values and numpy arrays.
    description: JSON description of the architecture.
  """
  torch = import_torch()

  def convert(x):
    if isinstance(x, dict):
      return {key: convert(value) for key, value in x.items()}
    return torch.tensor(x) if isinstance(x, np.ndarray) else x

  with files.open_whole(path, '--to', parents=True) as file:
    torch.save(convert(content) | {DESCRIPTION: description}, file)


def import_torch() -> Any:
  """Imports PyTorch, which only these files need.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import torch
  except ImportError as e:
    raise UserError(
        'files other than .safetensors need PyTorch, which is not installed. '
        'Try pip install torch --index-url '
        'https://download.pytorch.org/whl/cpu; or .safetensors files.'
    ) from e
  return torch
