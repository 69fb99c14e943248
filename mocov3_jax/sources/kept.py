"""What was found of a source at a cost, kept as arrays in a file of the user.

It may be made again at any time, and is read with care: others may have written
it.
"""

import io
import os
import stat
import zipfile
import zlib

from etils import epath
import numpy as np

from mocov3_jax.base import files

# Bytes of what is kept, at most: some ten million images.
MOST_BYTES = 2**30
# What numpy raises for a damaged archive.
DAMAGED = (
    ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error
)


def load(file: epath.Path) -> dict[str, np.ndarray] | None:
  """Returns the arrays that `store` has kept; None if there are none.

  Raises:
    UserError, OSError, or one of DAMAGED: for anything else.
  """
  data = files.read_own(file, MOST_BYTES)
  # Where anybody may write, anybody may have written it.
  if data is None or os.stat(file.parent).st_mode & stat.S_IWOTH:
    return None
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
      raise ValueError('it is larger than what is kept')
  with np.load(io.BytesIO(data), allow_pickle=False) as saved:
    return {name: saved[name] for name in saved.files}


def store(file: epath.Path, **arrays: np.ndarray) -> None:
  """Keeps arrays, where that is possible."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  try:
    # Paths are nobody else's business, and what is kept here is read.
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.open_whole(file) as whole:
      whole.write(buffer.getvalue())
  except OSError:
    pass  # Only a convenience; the workdir itself tells what is wrong.
