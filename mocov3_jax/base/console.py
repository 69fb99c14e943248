"""What a command says while it works: on stderr, results go to stdout."""

import contextlib
import os
import subprocess
import sys

# What libjpeg and libtiff print of a damaged image.
DECODERS = (
    r'^(Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|'
    r'Invalid SOS|Unknown Adobe|Warning: unknown JFIF|_?TIFF[A-Za-z]*:|'
    r'[A-Za-z0-9]*Decode[A-Za-z0-9]*:|tempfile\.tif:|libpng (warning|error))'
)


def say(text: str) -> None:
  """Prints lines at once; what would steer a terminal is spelled out."""
  text = '\n'.join(map(shown, text.split('\n')))
  print(text, file=sys.stderr, flush=True)


def shown(text: str) -> str:
  """Returns a text that others chose, such as a name, as one printable line.

  Line ends, escapes, marks of direction and the like become \\n, \\x1b, ...
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
  """Keeps what decoders print of damaged images from stderr, for this process.

  They do not say of which image, and a run names those that cannot be read.
  They are C libraries and write to descriptor 2, which is led through grep: a
  process of its own, so that nothing is lost of what a crash prints last.
  Python's `sys.stderr` is not led through it.
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
  """Prints what another process has said, as it is."""
  sys.stderr.write(text)
  sys.stderr.flush()
