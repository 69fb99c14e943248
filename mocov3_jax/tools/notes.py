"""What a command says while it works: on stderr, results go to stdout."""

import sys

import numpy as np

from mocov3_jax.data.sources import Source


def say(text: str) -> None:
  """Says it at once."""
  print(text, file=sys.stderr, flush=True)


def say_unreadable(source: Source, readable: np.ndarray) -> None:
  """Names the images of a source that are not among those places."""
  for index in np.setdiff1d(np.arange(len(source)), readable).tolist():
    say(f'unreadable: {source.name(index)}')
