"""Exit codes, and the signals that end a command."""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading

import jax

from mocov3_jax.base import console

UNREACHABLE, BAD_INPUT, INTERRUPTED, PREEMPTED = 1, 2, 130, 143


def exit_at_once() -> None:
  """Ends the process as interrupted."""
  # Skips Python's own exit, which can crash while XLA compiles in a thread.
  console.say('interrupted')
  os._exit(INTERRUPTED)


class StopRequest:
  """Records SIGTERM and Ctrl-C while they are `caught`, for code that polls."""

  def __init__(self):
    """Starts without a request."""
    self._noted: list[int] = []

  def __call__(self) -> bool:
    """Returns whether one of the signals was received."""
    return bool(self._noted)

  @contextlib.contextmanager
  def caught(
      self, then: str = 'after this step, then saving'
  ) -> Iterator[None]:
    """Records the signals; a second Ctrl-C ends the process at once.

    Args:
      then: when the command will stop, for the message after Ctrl-C.
    """
    def note(number, _):
      if number == signal.SIGINT:
        if self._noted:
          exit_at_once()
        console.say_in_handler(
            f'\nstopping {then} (press Ctrl-C again to stop at once)'
        )
      self._noted.append(number)

    signals = signal.SIGTERM, signal.SIGINT
    before = {s: signal.signal(s, note) for s in signals}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def leave_at_ctrl_c() -> Iterator[None]:
  """Lets Ctrl-C end the process at once, even while it waits in native code.

  Python runs signal handlers only between its own instructions, so after such a
  wait. But it writes to the wakeup descriptor as soon as a signal arrives.
  """
  reading, writing = os.pipe()
  os.set_blocking(writing, False)

  def watch():
    if os.read(reading, 1) == bytes([signal.SIGINT]):
      exit_at_once()

  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  descriptor = signal.set_wakeup_fd(writing)
  handler = signal.signal(signal.SIGINT, lambda *_: None)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
    signal.set_wakeup_fd(descriptor)
    os.close(writing)  # Ends the watcher.
    watcher.join()
    os.close(reading)


def leave_saved(code: int) -> None:
  """Exits after a complete save."""
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.distributed.is_initialized():
    sys.exit(code)  # The other processes of the run leave as well.
  # Exit at once: a thread may still wait for a file that never comes.
  os._exit(code)


def leave(code: int) -> None:
  """Exits; without a shutdown handshake if the run has several processes."""
  sys.stdout.flush()
  sys.stderr.flush()
  # This query does not initialise the devices, so a mistyped command ends fast.
  if jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)
