"""Locks on files, where the file system has any."""

import errno
import fcntl
from typing import IO

# What file systems without locks answer: Lustre without -o flock, some FUSE
# mounts, NFS without its lock daemon.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def lock(file: IO[str], shared: bool = False, wait: bool = False) -> bool:
  """Locks an open file until it is closed.

  The kernel drops the lock with the process, however that ends.

  Args:
    file: open.
    shared: whether others may hold such a lock as well.
    wait: whether to wait for those who hold it.

  Returns:
    Whether it is locked; False where the file system has no locks.

  Raises:
    BlockingIOError: if another process holds it, without `wait`.
  """
  kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno not in NO_LOCKS:
      raise
    return False
  return True
