"""Paths that users give, and files that are there whole or not at all."""

from collections.abc import Iterator
import contextlib
import json
import os
from typing import Any, BinaryIO

from etils import epath

from mocov3_jax.base.errors import UserError


def absolute(path: str, field: str = 'the path') -> epath.Path:
  """Returns the absolute path, which Orbax wants.

  Args:
    path: as given.
    field: what it is, for the message.

  Raises:
    UserError: for a URL; only local (or mounted) folders work so far.
  """
  if not path:
    raise UserError(f'{field} is empty. Allowed: a path.')
  if '://' in path:
    raise UserError(
        f'{field}: {path!r} is a URL. Allowed: a path of this machine, or a '
        'mounted one.'
    )
  return epath.Path(os.path.abspath(os.path.expanduser(path)))


def user_cache(name: str) -> epath.Path | None:
  """Returns a folder for what can be made again; None for a user without one.

  It lies below XDG_CACHE_HOME, or else ~/.cache.
  """
  cache = os.getenv('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):
    home = os.path.expanduser('~')
    if not os.path.isabs(home):  # No HOME, and no entry in the passwd file.
      return None
    cache = os.path.join(home, '.cache')
  return epath.Path(cache) / 'mocov3_jax' / name


def new_output(path: str, suffix: str, field: str = '--out') -> epath.Path:
  """Returns the absolute path of a file that a command is to make.

  Args:
    path: as given.
    suffix: that the name must have, such as '.png'.
    field: what it is, for the message.

  Raises:
    UserError: if the name ends otherwise, or the file is there.
  """
  found = absolute(path, field)
  if found.suffix != suffix or found.exists():
    what = 'exists' if found.exists() else f'does not end with {suffix}'
    raise UserError(
        f'{field}={path} {what}. Allowed: a new file that ends with {suffix}.'
    )
  return found


@contextlib.contextmanager
def open_whole(
    path: epath.Path, field: str = '', parents: bool = False
) -> Iterator[BinaryIO]:
  """Opens a file to be written whole: it appears once all is written.

  A file that was there is replaced then, and kept if something fails before.

  Args:
    path: of the file.
    field: the flag that named the file; with it, errors of the file system
      become UserError.
    parents: whether to make the folders that it lies in.

  Yields:
    A binary file.

  Raises:
    UserError: if the file that `field` names cannot be written.
  """
  # Several processes may write one file at once, such as a listing.
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  try:
    if parents:
      path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, 'wb') as file:
      yield file
      # Or a crash of the machine could leave an empty file by that name.
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  except OSError as e:
    if not field:
      raise
    raise UserError(
        f'{field}={path} cannot be written: {e.strerror or e}. Allowed: a '
        'place this user may write to.'
    ) from e


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON value, indented, whole or not at all."""
  with open_whole(path) as file:
    file.write((json.dumps(value, indent=2) + '\n').encode())


def read_object(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object that a run wrote; empty if there is no file.

  Raises:
    UserError: if the file holds none.
  """
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
      raise ValueError(f'it holds {type(found).__name__}, no object')
  except ValueError as e:
    raise UserError(
        f'{path} is damaged: {e}. Allowed: the JSON object that a run wrote; '
        'or no such file, if it cannot be had.'
    ) from e
  return found
