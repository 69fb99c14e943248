"""What a command says while it works: on stderr, results go to stdout."""

import sys


def say(text: str) -> None:
  """Says it at once."""
  print(text, file=sys.stderr, flush=True)
