"""Runs training steps in processes of their own, for `benchmark step`.

Each framework gets its own process, so that they do not share memory, threads
or settings. The parent sends functions, which the child applies to the step; it
sends back what they return.
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

from mocov3_jax.base.errors import UserError, first_line, is_out_of_memory
from mocov3_jax.benchmarks.jax_step import JaxStep

Ask = Callable[..., Any]


class OutOfMemory(Exception):
  """The batch does not fit."""


@contextlib.contextmanager
def stepper(build: Callable[[], Any]) -> Iterator[Ask]:
  """Yields ask(f, *arguments) -> f(step, *arguments), run in a new process.

  Args:
    build: makes the step in that process, such as a partial of `jax_step` or
      `torch_step`.

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
      # If memory is short, Linux kills the largest process.
      killed = process.exitcode == -9
      failure = OutOfMemory if killed else RuntimeError
      value = f'the process of {build} ended with code {process.exitcode}'
    if failure:
      raise failure(value)
    return value

  try:
    yield ask
  finally:
    ours.close()  # The child exits when its connection is closed.
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
        connection.send((OutOfMemory, first_line(e)))


def jax_step(config: ConfigDict, memory_share: float, alone: bool) -> Any:
  """Builds a `JaxStep` that may use a share of a GPU's memory.

  Args:
    config: the config of the run.
    memory_share: the share of the memory, from 0 to 1.
    alone: whether to use one device; see `JaxStep`.
  """
  # JAX reads this when a device is first used.
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
  """Returns what `build` made, unchanged."""
  return result


def warm_up(step: Any) -> float:
  """Takes three steps; returns the seconds of the first, which compiles."""
  start = time.perf_counter()
  advance(step, 1)
  seconds = time.perf_counter() - start
  advance(step, 2)
  # Resets the peak memory of the process, to leave out compilation.
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return seconds


def advance(step: Any, count: int) -> None:
  """Takes `count` steps, and waits for the last of them."""
  for _ in range(count):
    step()
  step.wait()


def peak_memory(step: Any) -> int | None:
  """Returns the peak memory in bytes, of the device or, on a CPU, the process.

  Returns None if neither is counted.
  """
  on_device = step.memory()
  if on_device is not None:
    return on_device
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return None
  return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])


def profile(step: Any, folder: str, count: int) -> None:
  """Writes a profile of `count` steps into a folder, for TensorBoard."""
  with step.profiled(folder):
    advance(step, count)


def about(step: Any) -> dict[str, Any]:
  """Returns `JaxStep.about`, on the devices and the cost of a step."""
  return step.about()
