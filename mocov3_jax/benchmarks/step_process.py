"""Training steps in processes of their own, for `benchmark step`.

Each framework gets a process: neither shares the other's memory, threads or
settings. The parent sends functions of the step, the child answers with what
they return.
"""

from collections.abc import Callable, Iterator
import contextlib
import multiprocessing
import os
import pathlib
import re
import time
from typing import Any

from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError, is_out_of_memory
from mocov3_jax.benchmarks.jax_step import JaxStep

Ask = Callable[..., Any]


class OutOfMemory(Exception):
  """The batch does not fit."""


@contextlib.contextmanager
def stepper(build: Callable[[], Any]) -> Iterator[Ask]:
  """Yields ask(f, *arguments) -> f(step, *arguments), done by a process.

  Args:
    build: makes the step there: `jax_step` or `torch_step`, as a partial.

  Raises:
    UserError: from `ask`, if the process refuses the config.
    OutOfMemory: from `ask`, if the batch does not fit.
  """
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe()
  process = context.Process(target=_serve, args=(theirs, build), daemon=True)
  process.start()
  theirs.close()

  def ask(function, *arguments):
    try:
      ours.send((function, arguments))
      failure, value = ours.recv()
    except (EOFError, ConnectionError):
      process.join()
      # Where memory is short, the system kills the largest process.
      killed = process.exitcode == -9
      failure = OutOfMemory if killed else RuntimeError
      value = f'the process of {build} ended with code {process.exitcode}'
    if failure:
      raise failure(value)
    return value

  try:
    yield ask
  finally:
    ours.close()  # The child ends with its input.
    process.join(timeout=30)
    process.kill()
    process.join()


def _serve(connection, build: Callable[[], Any]) -> None:
  with contextlib.suppress(EOFError):
    step = None
    while True:
      function, arguments = connection.recv()
      try:
        step = step or build()
        connection.send((None, function(step, *arguments)))
      except UserError as e:
        connection.send((UserError, str(e)))
      except Exception as e:
        if not is_out_of_memory(e):
          raise
        connection.send((OutOfMemory, str(e).splitlines()[0]))


def jax_step(config: ConfigDict, memory_share: float, alone: bool) -> Any:
  """Builds a `JaxStep`; it may have that share of a GPU's memory."""
  # Read when the device is first used.
  os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] = str(memory_share)

  return JaxStep(config, alone)


def torch_step(config: ConfigDict, compiled: bool) -> Any:
  """Builds a `TorchStep`.

  Raises:
    UserError: without PyTorch and timm.
  """
  try:
    from mocov3_jax.benchmarks.torch_step import TorchStep
  except ImportError as e:
    raise UserError(
        f'--against needs PyTorch and timm ({e}). Use: pip install '
        '"mocov3_jax[torch]", or in a clone pip install -e ".[torch]"; or '
        '--against=none.'
    ) from e
  return TorchStep(config, compiled)


def whole(result: Any) -> Any:
  """Returns what was built, as it is."""
  return result


def warm_up(step: Any) -> float:
  """Takes the first steps; returns the seconds of the first, compiling."""
  start = time.perf_counter()
  advance(step, 1)
  seconds = time.perf_counter() - start
  advance(step, 2)
  # Of the process from here on, not of what compiling needed.
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return seconds


def advance(step: Any, count: int) -> None:
  """Takes steps, and waits for the last of them."""
  for _ in range(count):
    step()
  step.wait()


def peak_memory(step: Any) -> int | None:
  """Returns the most bytes used, on the device or by the process on a CPU."""
  on_device = step.memory()
  if on_device is not None:
    return on_device
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return None
  return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])


def profile(step: Any, folder: str, count: int) -> None:
  """Writes a profile of so many steps into a folder, for TensorBoard."""
  with step.profiled(folder):
    advance(step, count)


def about(step: Any) -> dict[str, Any]:
  """Returns what `JaxStep.about` says of device and network."""
  return step.about()
