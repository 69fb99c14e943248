"""The TPU compiler: compiles a step, and prints what it made of it."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.planning.bundles import DUMP_FLAGS, Schedule

FLAGS = 'LIBTPU_INIT_ARGS'
# The optimised program; and the same with memory spaces, as its code was made.
OPTIMISED, CODE = 'after_optimizations', 'after_codegen'


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler made of a step.

  Attributes:
    compiled: the program.
    optimised: its optimised HLO.
    code: the same with memory spaces and asynchronous copies; '' of GPUs.
    schedule: its bundles, where they were asked for.
  """

  compiled: jax.stages.Compiled
  optimised: str
  code: str
  schedule: Schedule | None


class Compiler:
  """Compiles for chips that are not there.

  Use it from before libtpu is loaded: it reads only then what to print.
  """

  def __init__(self, bundles: pathlib.Path | None, dump: pathlib.Path | None):
    """Use `printing`."""
    self._bundles = bundles
    self._dump = dump
    self._count = 0

  def compile(self, lowered: jax.stages.Lowered) -> Program:
    """Compiles, and reads what was printed.

    jaxlib's own `as_text` fails at some of v6e's asynchronous collectives,
    which are newer than it.

    Raises:
      UserError: if there is no schedule, and it was asked for.
    """
    self._count += 1
    if self._bundles:
      for path in self._bundles.iterdir():
        path.unlink()
    with tempfile.TemporaryDirectory() as folder:
      compiled = lowered.compile(compiler_options={
          'xla_dump_to': folder, 'xla_dump_hlo_as_text': True,
      })
      paths = {}
      for kind in OPTIMISED, CODE:
        found = sorted(pathlib.Path(folder).glob(f'*.{kind}.txt'))
        if not found:
          raise UserError(
              f'this version of libtpu prints no {kind}.txt, which plan reads. '
              'Use the version that this JAX prescribes: pip install '
              '"mocov3_jax[tpu]".'
          )
        paths[kind] = found[-1]
      texts = {kind: path.read_text() for kind, path in paths.items()}
      self._keep(paths.values())
    schedule = None
    if self._bundles:
      schedule = Schedule(self._bundles)
      if not schedule.names:
        raise UserError(
            '--schedule: the compiler was loaded before it was asked to print '
            'its schedule. Use a process of its own: the command plan.'
        )
    return Program(compiled, texts[OPTIMISED], texts[CODE], schedule)

  def compile_for_gpus(self, lowered: jax.stages.Lowered) -> Program:
    """Compiles with XLA's GPU compiler, which cannot try kernels here."""
    self._count += 1
    # Triton's products would have tiles that nobody has chosen.
    options = {'xla_gpu_enable_triton_gemm': False}
    compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / f'{OPTIMISED}.txt'
      path.write_text(text)
      self._keep([path])
    return Program(compiled, text, '', None)

  def _keep(self, paths: Any) -> None:
    """Copies what was printed to the folder of `--dump`, one a program."""
    if not self._dump:
      return
    folder = self._dump / f'program_{self._count}'
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*paths, *(self._bundles.iterdir() if self._bundles else ())):
      shutil.copy(path, folder)


@contextlib.contextmanager
def printing(schedule: bool, dump: str = '') -> Iterator[Compiler]:
  """Yields a compiler; inside, libtpu can be loaded.

  Args:
    schedule: whether it prints its schedule: 0.1 GB for a ViT-B/16, and two
      thirds more time.
    dump: folder to keep in what it prints; '' = none.

  Raises:
    UserError: if `dump` cannot be made, or is not empty.
  """
  kept = pathlib.Path(files.absolute(dump, '--dump')) if dump else None
  if kept:
    try:
      kept.mkdir(parents=True, exist_ok=True)
      taken = any(kept.iterdir())
    except OSError as e:
      raise UserError(
          f'--dump={dump} cannot be made: {e.strerror or e}. Use a folder this '
          'user may write to.'
      ) from e
    if taken:
      raise UserError(f'--dump={dump} is not empty. Use a new folder.')
  with contextlib.ExitStack() as stack:
    bundles = None
    if schedule:
      bundles = pathlib.Path(
          stack.enter_context(tempfile.TemporaryDirectory())
      )
      before = os.environ[FLAGS] if FLAGS in os.environ else None
      flags = DUMP_FLAGS.format(folder=bundles)
      os.environ[FLAGS] = f'{before or ""} {flags}'.strip()
      stack.callback(_restore, before)
    yield Compiler(bundles, kept)


def _restore(before: str | None) -> None:
  if before is None:
    del os.environ[FLAGS]
  else:
    os.environ[FLAGS] = before
