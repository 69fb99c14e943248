"""Messages of a running command. They go to stderr, results to stdout."""

import contextlib
import os
import subprocess
import sys

# Messages of image decoders (libjpeg, libtiff, libpng) about damaged images.
DECODERS = (
    r'^(Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|'
    r'Invalid SOS|Unknown Adobe|Warning: unknown JFIF|_?TIFF[A-Za-z]*:|'
    r'[A-Za-z0-9]*Decode[A-Za-z0-9]*:|tempfile\.tif:|libpng (warning|error))'
)


def say(text: str) -> None:
  """Prints lines immediately, with control characters escaped."""
  text = '\n'.join(map(shown, text.split('\n')))
  print(text, file=sys.stderr, flush=True)


def shown(text: str) -> str:
  """Returns untrusted text, such as a file name, as one printable line.

  Line ends, escapes, direction marks and the like become \\n, \\x1b, ...
  """
  if text.isprintable():
    return text
  return ''.join(
      c if c.isprintable() or c == '\t' else repr(c)[1:-1] for c in text
  )


def say_in_handler(text: str) -> None:
  """Prints a line from a signal handler, which may have interrupted a print."""
  os.write(sys.stderr.fileno(), f'{text}\n'.encode())


def hide_decoders() -> None:
  """Removes the messages of image decoders from this process's stderr.

  The messages do not say which image is damaged, and a run names the images
  that it cannot read anyway. The decoders are C libraries that write to file
  descriptor 2, so this is piped through grep. Grep is a process of its own, so
  the last output of a crash is not lost. Python's `sys.stderr` bypasses it.
  """
  with contextlib.suppress(OSError):  # No grep, or no stderr.
    direct = os.dup(2)
    filtering = subprocess.Popen(
        ['grep', '--line-buffered', '-avE', DECODERS], stdin=subprocess.PIPE,
        stdout=direct, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    sys.stderr = open(  # Line by line, as before.
        direct, 'w', buffering=1, encoding=sys.stderr.encoding,
        errors=sys.stderr.errors,
    )
    os.dup2(filtering.stdin.fileno(), 2)
    filtering.stdin.close()


def pass_on(text: str) -> None:
  """Prints the output of another process unchanged."""
  sys.stderr.write(text)
  sys.stderr.flush()
