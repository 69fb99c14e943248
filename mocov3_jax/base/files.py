"""Paths that users give, and files that are written whole."""

import json
import os
from typing import Any

from etils import epath

from mocov3_jax.base.errors import UserError


def read_object(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON object; empty if there is no file.

  Raises:
    UserError: if it is none.
  """
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as e:
    raise UserError(
        f'{path} is damaged: {e}. Allowed: the JSON object that a run wrote.'
    ) from e


def absolute(path: str, field: str = 'the path') -> epath.Path:
  """The absolute path, which Orbax wants.

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


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file that is there whole or not at all."""
  part = path.with_name(path.name + '.part')
  part.write_text(text)
  part.replace(path)
