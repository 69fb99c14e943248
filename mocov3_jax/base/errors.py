"""The exceptions that a command turns into an exit code."""

from collections.abc import Iterable
import difflib
import re


class UserError(Exception):
  """Bad input: a config field, path, data set or checkpoint. Exit code 2.

  The message stands alone: it names the field or file, what was given, and
  what is allowed. Commands print it without a traceback.
  """


class Preempted(Exception):
  """Stopped by SIGTERM or Ctrl-C after a complete save. Exit code 143."""


def unknown(field: str, given: str, allowed: Iterable[str]) -> UserError:
  """Returns the error for a name outside a fixed set, with the nearest one."""
  allowed = sorted(allowed)
  near = difflib.get_close_matches(given, allowed, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return UserError(
      f'{field}={given!r} is not known.{hint} Allowed: {", ".join(allowed)}.'
  )


def is_out_of_memory(error: Exception) -> bool:
  """Returns whether memory ran out, of the host or of a device."""
  return isinstance(error, MemoryError) or bool(
      re.search('RESOURCE_EXHAUSTED|[Oo]ut of memory', str(error))
  )
