"""Caches what was costly to find out about a source, as arrays in a file.

The file can be made again at any time. It is read with care, since others may
have written it.
"""

import io
import os
import stat
import zipfile
import zlib

from etils import epath
import numpy as np

from mocov3_jax.base import files

# Maximum bytes of a cache file, enough for some ten million images.
MOST_BYTES = 2**30
# What numpy raises for a damaged archive.
DAMAGED = (
    ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error
)


def load(file: epath.Path) -> dict[str, np.ndarray] | None:
  """Returns the arrays that `store` has written; None if there are none.

  Raises:
    UserError, OSError, or one of DAMAGED: if the file cannot be used.
  """
  data = files.read_own(file, MOST_BYTES)
  # In a folder that anybody may write to, anybody may have written the file.
  if data is None or os.stat(file.parent).st_mode & stat.S_IWOTH:
    return None
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
      raise ValueError('it is larger than what is kept')
  with np.load(io.BytesIO(data), allow_pickle=False) as saved:
    return {name: saved[name] for name in saved.files}


def store(file: epath.Path, **arrays: np.ndarray) -> None:
  """Writes arrays to a cache file, if possible."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  try:
    # Only for this user: paths are private, and nobody else may write files
    # that are read later.
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.open_whole(file) as whole:
      whole.write(buffer.getvalue())
  except OSError:
    pass  # Only a cache; if the disk is bad, writing the workdir will tell.
