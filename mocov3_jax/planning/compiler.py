"""Compiles a step for TPUs or GPUs, and reads what the compiler prints."""

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
# The optimised program, and the same after code generation, with memory spaces.
OPTIMISED, CODE = 'after_optimizations', 'after_codegen'


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled step.

  Attributes:
    compiled: the program.
    optimised: its optimised HLO.
    code: the same with memory spaces and asynchronous copies; '' for GPUs.
    schedule: its bundles; None unless they were asked for.
  """

  compiled: jax.stages.Compiled
  optimised: str
  code: str
  schedule: Schedule | None


class Compiler:
  """Compiles for chips that this machine lacks.

  Create it with `printing`, before libtpu is loaded: libtpu reads its print
  flags only when it is loaded.
  """

  def __init__(self, bundles: pathlib.Path | None, dump: pathlib.Path | None):
    """Use `printing` instead.

    Args:
      bundles: the folder into which libtpu prints bundles; None if it does not.
      dump: the folder to keep printed texts in; None = they are not kept.
    """
    self._bundles = bundles
    self._dump = dump
    self._count = 0

  def compile(self, lowered: jax.stages.Lowered) -> Program:
    """Compiles for TPUs, and reads the printed texts.

    The texts are read from files, since jaxlib's `as_text` fails on some of
    v6e's asynchronous collectives, which are newer than jaxlib.

    Raises:
      UserError: if libtpu printed no HLO, or no schedule where one was asked
        for.
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
    """Compiles with XLA's GPU compiler, which cannot autotune here."""
    self._count += 1
    # Without autotuning, Triton's matrix products would have arbitrary tiles.
    options = {'xla_gpu_enable_triton_gemm': False}
    compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / f'{OPTIMISED}.txt'
      path.write_text(text)
      self._keep([path])
    return Program(compiled, text, '', None)

  def _keep(self, paths: Any) -> None:
    """Copies the printed texts into `--dump`, in one folder per program."""
    if not self._dump:
      return
    folder = self._dump / f'program_{self._count}'
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*paths, *(self._bundles.iterdir() if self._bundles else ())):
      shutil.copy(path, folder)


@contextlib.contextmanager
def printing(schedule: bool, dump: str = '') -> Iterator[Compiler]:
  """Yields a compiler; load libtpu only inside of this context.

  Args:
    schedule: whether the compiler prints its schedule. For a ViT-B/16, that is
      0.1 GB, and compiling takes two thirds longer.
    dump: folder in which to keep the printed texts; '' = they are not kept.

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
