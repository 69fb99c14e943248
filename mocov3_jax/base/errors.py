"""Exceptions that commands turn into exit codes, and kinds of other errors."""

from collections.abc import Iterable
import difflib
import errno
import re
import textwrap
import traceback


class UserError(Exception):
  """Bad input: a config field, path, data set or checkpoint. Exit code 2.

  The message stands alone: it names the field or file, what was given, and
  what is allowed. Commands print it without a traceback.
  """


class Preempted(Exception):
  """Stopped by SIGTERM or Ctrl-C after a complete save. Exit code 143."""


def unknown(field: str, given: str, allowed: Iterable[str]) -> UserError:
  """Returns the error for an unknown name, with the nearest allowed name."""
  allowed = sorted(allowed)
  near = difflib.get_close_matches(given, allowed, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return UserError(
      f'{field}={given!r} is not known.{hint} Allowed: {", ".join(allowed)}.'
  )


def first_line(error: BaseException) -> str:
  """Returns an error's type and the first line of its message, shortened."""
  lines = str(error).strip().splitlines() or ['']
  text = textwrap.shorten(lines[0], 160, placeholder=' ...')
  return f'{type(error).__name__}: {text}'


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether the host or a device ran out of memory."""
  return isinstance(error, MemoryError) or not is_disk_full(error) and bool(
      re.search('RESOURCE_EXHAUSTED|[Oo]ut of memory', str(error))
  )


def is_disk_full(error: BaseException) -> bool:
  """Returns whether a disk is full or a quota is exceeded."""
  # TensorStore reports this only in its message; its status is the same as for
  # a lack of memory.
  return isinstance(error, OSError) and error.errno in (
      errno.ENOSPC, errno.EDQUOT
  ) or bool(re.search('No space left|[Qq]uota exceeded', str(error)))


def is_no_backend(error: BaseException) -> bool:
  """Returns whether JAX finds no device of the requested kind."""
  if isinstance(error, AssertionError) and error.__traceback__:
    # With JAX_PLATFORMS=cuda but no CUDA, JAX raises this without a message.
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.endswith('xla_bridge.py')
  return bool(re.search(
      'nable to initialize backend|[Uu]nknown backend', str(error)
  ))


# Modules whose errors concern a bucket (access, network, quota), and patterns
# of TensorStore's messages about one.
OF_BUCKETS = (
    'aiohttp.', 'fsspec.', 'gcsfs.', 'google.api_core.', 'google.auth.',
    'google.cloud.', 'requests.',
)
REFUSED = 'PERMISSION_DENIED|UNAUTHENTICATED'
PASSING = 'ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|retry attempts failed'


def is_of_bucket(error: BaseException) -> bool:
  """Returns whether a bucket, or the connection to it, failed."""
  text = str(error)
  return (
      type(error).__module__.startswith(OF_BUCKETS)
      # gcsfs raises this for status 403.
      or type(error) is OSError and text.startswith('Forbidden')
      or 'gs://' in text and bool(re.search(f'{REFUSED}|{PASSING}', text))
  )


def may_pass(error: BaseException) -> bool:
  """Returns whether a failed access to a bucket may succeed later."""
  text = str(error)
  return is_of_bucket(error) and not (
      text.startswith('Forbidden')
      # These will be refused again: 4xx, except 429 (too many requests).
      or re.search(rf', 4(?!29)\d\d$|{REFUSED}|[Cc]redentials', text)
  )


def is_of_environment(error: BaseException) -> bool:
  """Returns whether the environment failed, and not the data being read."""
  return (
      is_of_bucket(error) or is_out_of_memory(error) or is_disk_full(error)
      or is_no_backend(error)
      or isinstance(error, OSError) and error.errno in (
          errno.EMFILE, errno.ENFILE, errno.EIO
      )
  )
