"""What a command says while it works: on stderr, results go to stdout."""

import os
import sys


def say(text: str) -> None:
  """Prints a line at once."""
  print(text, file=sys.stderr, flush=True)


def say_in_handler(text: str) -> None:
  """Prints a line from a signal handler, which may have interrupted a print."""
  os.write(2, f'{text}\n'.encode())


def pass_on(text: str) -> None:
  """Prints what another process has said, as it is."""
  sys.stderr.write(text)
  sys.stderr.flush()
