"""Carries out the runs of a sweep, each in a child process, one after another.

Several sweeps may share one folder. Which runs are in progress and what is left
to do is read only from the folders of the runs (`history.status`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import datetime
import os
import signal
import subprocess
import sys
import time
from typing import Any

from etils import epath

from mocov3_jax.base import console, exits
from mocov3_jax.base.errors import Preempted
from mocov3_jax.parallel import processes
from mocov3_jax.runs import history, locks
from mocov3_jax.runs import table as sweep_table

# Seconds between two checks of runs that other processes hold.
POLL = 5.0
HELD = 'is in use by another process'
STOPPED = 'the sweep was stopped; the same command continues it'
# A program that asks Linux (PR_SET_PDEATHSIG, 1) to send it SIGTERM as soon as
# the sweep is gone, even by SIGKILL, and then becomes the command that follows.
# So no run goes on unseen. The same call between fork and exec (preexec_fn)
# might deadlock, since JAX has threads. A run that watched its parent itself
# would no longer be the same run.
_BOUND = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
  sys.exit(143)  # The sweep was gone before.
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class Job:
  """A run and its commands.

  Attributes:
    title: what sets it apart from the other runs, for people.
    folder: folder of the run.
    train: the training command.
    evaluations: {folder: command} of the evaluations once the run is done.
  """

  title: str
  folder: epath.Path
  train: list[str]
  evaluations: dict[epath.Path, list[str]]

  def commands(self) -> dict[epath.Path, list[str]]:
    """Returns the commands that are left to run, according to the folders."""
    status = history.status(self.folder)
    if status == 'diverged':
      return {}
    train = {} if status == 'done' else {self.folder: self.train}
    return train | {
        folder: command for folder, command in self.evaluations.items()
        if not (folder / 'result.json').exists()
    }


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a child process ended.

  Attributes:
    code: its exit code; -N if signal N ended it.
    said: the error on its stderr, or else the last line there.
  """

  code: int
  said: str


class Children:
  """Starts child processes, one at a time, and forwards signals to them.

  Within this context, SIGTERM and a first Ctrl-C are forwarded to the child as
  SIGTERM, upon which it saves. A second Ctrl-C is forwarded as SIGINT, upon
  which it ends at once. The child has its own session, so that Ctrl-C in the
  terminal does not reach it twice.
  """

  def __init__(self):
    self._child: subprocess.Popen | None = None
    self._noted: list[int] = []
    self._before: dict[int, Any] = {}

  def __enter__(self):
    self._before = {
        number: signal.signal(number, self._note)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def start(self, command: list[str]) -> Ended:
    """Runs a command to its end; its stderr passes through.

    Raises:
      Preempted: if a signal came before the command started.
    """
    self._check()
    if sys.platform == 'linux':
      command = [
          sys.executable, '-c', _BOUND, str(os.getpid()), *command
      ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors='replace',
        start_new_session=True, env=processes.environment_alone(),
    ) as child:
      self._child = child
      try:
        if self._noted:  # Since the check above.
          child.terminate()
        said = _pass_on(child.stderr)
        code = child.wait()
      finally:
        self._child = None
        if child.poll() is None:
          child.terminate()
    return Ended(code, said)

  def pause(self) -> None:
    """Waits for other processes.

    Raises:
      Preempted: if a signal came.
    """
    time.sleep(POLL)
    self._check()

  def _check(self) -> None:
    if self._noted:
      raise Preempted(STOPPED)

  def _note(self, number, _) -> None:
    again = number == signal.SIGINT and bool(self._noted)
    self._noted.append(number)
    child = self._child
    if number == signal.SIGINT and not again:
      console.say_in_handler(
          '\nstopping once the run has saved (press Ctrl-C again to stop at '
          'once)'
      )
    if child is not None:
      child.send_signal(signal.SIGINT if again else signal.SIGTERM)
    elif again:
      raise KeyboardInterrupt


def _pass_on(stream) -> str:
  """Copies lines to stderr; returns the error among them, or the last line."""
  last, error = '', []
  for line in stream:
    console.pass_on(line)
    if line.startswith('error: '):
      error = []
    if error or line.startswith('error: '):
      error.append(line.strip())
    last = line.strip() or last
  return ' '.join(error).removeprefix('error: ').strip() or last


def run_all(
    jobs: Sequence[Job], start: Callable[[list[str]], Ended],
    pause: Callable[[], None],
) -> dict[str, str]:
  """Runs what is left of the jobs; those that other processes hold come last.

  Args:
    jobs: in order.
    start: runs a command to its end; see `Children.start`.
    pause: waits a little; see `Children.pause`.

  Returns:
    {title: why} of the jobs that failed. A run that diverged has not failed.

  Raises:
    Preempted: if a child was stopped.
    KeyboardInterrupt: if a child was interrupted.
  """
  failed: dict[str, str] = {}
  seconds: list[float] = []
  left = [(i, job) for i, job in enumerate(jobs, 1) if job.commands()]
  console.say(f'{len(jobs)} runs, {len(jobs) - len(left)} of them complete')
  waiting = len(left)
  shown: list[str] = []
  while left:
    held = []
    for i, job in left:
      place = f'[{i}/{len(jobs)}]'
      if not job.commands():
        waiting -= 1
        status = history.status(job.folder)
        console.say(f'{place} {job.title}: {status}, by another process')
        continue
      before = time.monotonic()
      outcome, why = _attend(job, place, start)
      if outcome == 'held':
        held.append((i, job))
        continue
      waiting -= 1
      if why:
        failed[job.title] = why
      seconds.append(time.monotonic() - before)
      console.say(_progress(place, job, outcome, seconds, waiting))
    titles = [job.title for _, job in held]
    if held and len(held) == len(left):
      if titles != shown:
        names = '; '.join(titles)
        console.say(f'waiting for other processes, which hold: {names}')
      shown = titles
      pause()
    left = held
  return failed


def _attend(
    job: Job, place: str, start: Callable[[list[str]], Ended]
) -> tuple[str, str]:
  """Runs what is left of one job.

  Returns:
    ('done' | 'diverged' | 'held', ''), or ('failed', why).
  """
  for folder, command in job.commands().items():
    if locks.is_held(folder):
      return 'held', ''
    what = '' if command is job.train else f'  {command[2].split(".")[-1]}'
    console.say(f'{place} {job.title}{what}')
    ended = start(command)
    if ended.code in (exits.PREEMPTED, -signal.SIGTERM):
      raise Preempted(STOPPED)
    if ended.code in (exits.INTERRUPTED, -signal.SIGINT):
      raise KeyboardInterrupt
    if ended.code == exits.BAD_INPUT and HELD in ended.said:
      return 'held', ''
    if ended.code and history.status(job.folder) == 'diverged':
      return 'diverged', ''
    if ended.code:
      return 'failed', _why(ended)
  if history.status(job.folder) != 'done':
    return 'failed', 'exit code 0, but there is no result.json'
  return 'done', ''


def _why(ended: Ended) -> str:
  if ended.code >= 0:
    return f'exit code {ended.code}: {ended.said[:500]}'
  name = signal.Signals(-ended.code).name
  hint = ' (out of memory?)' if -ended.code == signal.SIGKILL else ''
  return f'killed by {name}{hint}: {ended.said[:500]}'


def _progress(
    place: str, job: Job, outcome: str, seconds: list[float], waiting: int
) -> str:
  text = f'{place} {outcome} in {_clock(seconds[-1])}'
  if outcome == 'done':
    result = history.read(job.folder, rows=False).result
    if sweep_table.MONITOR in result:
      text += f', kNN {100 * result[sweep_table.MONITOR]:.1f} %'
  if waiting:
    mean = sum(seconds) / len(seconds)
    text += f'; {waiting} to go, about {_clock(waiting * mean)}'
  return text


def _clock(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))
