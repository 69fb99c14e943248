"""Runs in a bucket, gs://BUCKET/FOLDER: what objects have otherwise than files.

An object appears once it is written, whole, and cannot grow. It has no lock;
but of several who create one of a name, exactly one succeeds.

`etils.epath` reads and writes objects by gcsfs, which is an extra.
"""

import importlib.util
import logging
import os
import re
from typing import Any

from etils import epath

from mocov3_jax.base.errors import UserError

PREFIX = 'gs://'
# A bucket, and the names of folders in it. The letters left out are those by
# which gcsfs would look for many objects, and those of no printable name.
NAME = r'gs://[a-z0-9][a-z0-9._-]+(/[^/*?\[\]#\x00-\x1f\x7f]+)+'


def is_in_bucket(path: os.PathLike[str] | str) -> bool:
  """Returns whether a path is that of an object, or of a prefix of objects."""
  return os.fspath(path).startswith(PREFIX)


def path_of(url: str, field: str) -> epath.Path:
  """Returns the path of a folder in a bucket.

  Args:
    url: gs://BUCKET/FOLDER.
    field: what it is, for the message.

  Raises:
    UserError: if it is none, or what reads buckets is not installed.
  """
  url = url.rstrip('/')
  if not re.fullmatch(NAME, url) or {'.', '..'} & set(url.split('/')):
    raise UserError(
        f'{field}: {url!r} is no folder in a bucket. Use gs://BUCKET/FOLDER, '
        'without the signs * ? [ ] #, and without . and .. as names.'
    )
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(
        f'{field}: {url!r} is in a bucket, and gcsfs is not installed. Use: '
        "pip install 'mocov3-jax[gcs]'"
    )
  import fsspec.config

  # Listings that are kept would hide what other processes write meanwhile, and
  # give objects the length that they had before.
  for name in 'gs', 'gcs':
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  # It warns of each renaming that it does in two steps.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  return epath.Path(url)


def create(path: epath.Path, data: bytes) -> bool:
  """Creates an object; returns False if there is one of that name."""
  try:
    _file_system().pipe_file(os.fspath(path), data, mode='create')
  except FileExistsError:
    return False
  return True


def read(path: epath.Path) -> bytes | None:
  """Reads an object in one request, as it is; None if there is none.

  One that is opened and read may be replaced by a longer one in between.
  """
  try:
    return _file_system().cat_file(os.fspath(path))
  except FileNotFoundError:
    return None


def move(folder: epath.Path, target: epath.Path) -> None:
  """Moves all objects of a folder, one after the other."""
  _file_system().mv(os.fspath(folder), os.fspath(target), recursive=True)


def size(folder: epath.Path) -> int:
  """Returns the bytes of all objects of a folder."""
  return _file_system().du(os.fspath(folder))


def _file_system() -> Any:
  import fsspec

  # As etils.epath asks for it, so that it is the same object.
  return fsspec.filesystem('gs', finalize_on_close=True)
