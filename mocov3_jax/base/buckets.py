"""Runs in a bucket, gs://BUCKET/FOLDER, where objects differ from files.

An object appears only once it is completely written, and cannot grow. It has no
lock, but if several processes create an object of the same name, exactly one
succeeds.

`etils.epath` reads and writes objects by gcsfs, an optional dependency.
"""

import importlib.util
import logging
import os
import re
from typing import Any

from etils import epath

from mocov3_jax.base.errors import UserError

PREFIX = 'gs://'
# A bucket and the names of folders in it. Excluded are the wildcard characters
# of gcsfs and unprintable characters.
NAME = r'gs://[a-z0-9][a-z0-9._-]+(/[^/*?\[\]#\x00-\x1f\x7f]+)+'


def is_in_bucket(path: os.PathLike[str] | str) -> bool:
  """Returns whether a path is in a bucket."""
  return os.fspath(path).startswith(PREFIX)


def path_of(url: str, field: str) -> epath.Path:
  """Returns the path of a folder in a bucket.

  Args:
    url: gs://BUCKET/FOLDER.
    field: the flag or field that has the path, for error messages.

  Raises:
    UserError: if it is not a folder in a bucket, or gcsfs is not installed.
  """
  url = url.rstrip('/')
  if not re.fullmatch(NAME, url) or {'.', '..'} & set(url.split('/')):
    raise UserError(
        f'{field}: {url!r} is not a folder in a bucket. Use '
        'gs://BUCKET/FOLDER, without the characters * ? [ ] #, and without . '
        'and .. as names.'
    )
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(
        f'{field}: {url!r} is in a bucket, and gcsfs is not installed. Use: '
        "pip install 'mocov3-jax[gcs]'"
    )
  import fsspec.config

  # Cached listings would hide what other processes write, and give objects an
  # outdated length.
  for name in 'gs', 'gcs':
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  # gcsfs warns each time it renames in two steps.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  return epath.Path(url)


def create(path: epath.Path, data: bytes) -> bool:
  """Creates an object; returns False if one of that name exists."""
  try:
    _file_system().pipe_file(os.fspath(path), data, mode='create')
  except FileExistsError:
    return False
  return True


def read(path: epath.Path) -> bytes | None:
  """Reads an object in one request; None if there is none.

  With separate requests to open and to read it, the object might be replaced by
  a longer one in between.
  """
  try:
    return _file_system().cat_file(os.fspath(path))
  except FileNotFoundError:
    return None


def move(folder: epath.Path, target: epath.Path) -> None:
  """Moves all objects of a folder, one by one."""
  _file_system().mv(os.fspath(folder), os.fspath(target), recursive=True)


def size(folder: epath.Path) -> int:
  """Returns the total size of all objects of a folder in bytes."""
  return _file_system().du(os.fspath(folder))


def _file_system() -> Any:
  import fsspec

  # The same arguments as in etils.epath, so that it is the same instance.
  return fsspec.filesystem('gs', finalize_on_close=True)
