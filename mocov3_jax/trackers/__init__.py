"""Trackers: services that show runs side by side, such as Weights & Biases.

A tracker is one file in this folder and a line in `TRACKERS`. The rest of the
package uses only `Record`, which reports each step to the tracker once, even if
a run is killed and computes some of its steps again.
"""

from collections.abc import Callable, Iterable
import importlib.util
import re
import secrets
import time
from typing import Any, NamedTuple, Protocol

from etils import epath

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.trackers import weights_and_biases

Values = dict[str, float]
# File in the workdir with the id of the run's record and the last step
# reported.
NOTE = 'tracker.json'
ID = re.compile('[a-z0-9]{4,64}')


class Tracker(Protocol):
  """An open record of a run.

  Its methods raise ConnectionError when the service is lost.
  """

  def log(self, step: int, values: Values) -> None:
    """Adds the values of a step; steps come in order, each once."""

  def close(self, results: dict[str, Any] | None) -> None:
    """Sends the rest; `results` are given if the run is done."""


class Kind(NamedTuple):
  """A kind of tracker.

  Attributes:
    package: the package that it needs.
    extra: the extra of mocov3-jax that installs this package.
    begin: (name of the run, id of its record, config as nested dicts) -> an
      open record, continued if there is one with this id. Raises UserError
      if the service cannot be used.
  """

  package: str
  extra: str
  begin: Callable[[str, str, dict[str, Any]], Tracker]


TRACKERS = {
    'wandb': Kind('wandb', 'wandb', weights_and_biases.begin),
}


def check(name: str) -> None:
  """Checks `log.tracker`.

  Raises:
    UserError: if it is neither empty nor the name of a tracker that is
      installed.
  """
  if not name:
    return
  if name not in TRACKERS:
    raise unknown('log.tracker', name, TRACKERS)
  kind = TRACKERS[name]
  found = importlib.util.find_spec(kind.package)
  # A folder of that name, such as the one that wandb makes, is not a package.
  if found is None or found.origin is None:
    raise UserError(
        f'log.tracker={name!r} needs the package {kind.package}, which is not '
        f"installed. Use pip install 'mocov3-jax[{kind.extra}]', or "
        "log.tracker=''."
    )


class Record:
  """Reports a run to the tracker; does nothing without a tracker.

  A step is reported once a later one has come, since its training and its
  evaluation are logged separately. The workdir notes what is reported before it
  is sent, so that no step is reported twice. A step may be missing if the run
  is killed in the seconds in which it is sent. metrics.jsonl has all of them.
  """

  def __init__(
      self, name: str, workdir: epath.Path, config: dict[str, Any],
      say: Callable[[str], None],
  ):
    """Begins or continues the record of a run.

    Args:
      name: name of the tracker; '' = none.
      workdir: workdir of the run; must exist.
      config: config of the run, as nested dicts.
      say: shows a line to the user.

    Raises:
      UserError: if the service cannot be used, or the note is damaged.
    """
    self._tracker: Tracker | None = None
    self._say, self._was_lost = say, False
    if not name:
      return
    self._name, self._path = name, workdir / NOTE
    self._note = _read(self._path, name)
    if self._note['done']:
      return
    self._waiting: dict[int, Values] = {}
    self._next = time.monotonic() + files.FOLLOWED
    self._tracker = TRACKERS[name].begin(
        f'{workdir.parent.name}/{workdir.name}', self._note['id'], config
    )
    files.write_json(self._path, self._note)

  def catch_up(self, rows: Iterable[Values]) -> None:
    """Queues the rows of metrics.jsonl that have not been reported.

    Args:
      rows: rows of an earlier part of the run.
    """
    for row in rows:
      self.write(row['step'], {k: row[k] for k in row if k != 'step'})

  def write(self, step: int, values: Values) -> None:
    """Queues the values of a step, to be reported with others."""
    if self._tracker is None or step <= self._note['told']:
      return
    if step in self._waiting:
      self._waiting[step] |= values
    else:
      self._waiting[step] = dict(values)
    if time.monotonic() > self._next:
      self.flush()

  def flush(self) -> None:
    """Reports all queued steps but the last, which may get more values."""
    if self._tracker is not None:
      self._tell(sorted(self._waiting)[:-1])

  def finish(self, results: dict[str, Any]) -> None:
    """Reports the remaining steps and the results of a run that is done."""
    if self._tracker is not None:
      self.end()
      self._close(results)
      self._note['done'] = not self._was_lost
      files.write_json(self._path, self._note)

  def close(self) -> None:
    """Reports what there is of a run that is to be continued later."""
    self.flush()
    self._close(None)

  def end(self) -> None:
    """Reports all there is of a run that will not be continued."""
    if self._tracker is not None:
      self._tell(sorted(self._waiting))

  def _tell(self, steps: list[int]) -> None:
    if not steps:
      return
    told = self._note['told']
    self._note['told'] = steps[-1]
    files.write_json(self._path, self._note)
    try:
      for step in steps:
        self._tracker.log(step, self._waiting[step])
        told = step
        del self._waiting[step]
    except ConnectionError as e:
      self._note['told'] = told  # The next start reports the rest.
      files.write_json(self._path, self._note)
      self._lost(e)
    self._next = time.monotonic() + files.FOLLOWED

  def _close(self, results: dict[str, Any] | None) -> None:
    if self._tracker is not None:
      try:
        self._tracker.close(results)
      except ConnectionError as e:
        self._lost(e)
      self._tracker = None

  def _lost(self, error: ConnectionError) -> None:
    # A run of days should not end because of that.
    self._was_lost = True
    self._say(
        f'note: the connection to log.tracker={self._name!r} was lost after '
        f'step {self._note["told"]} ({str(error)[:200]}). The run goes on; '
        'metrics.jsonl is complete.'
    )
    self._tracker = None


def _read(path: epath.Path, name: str) -> dict[str, Any]:
  """Returns the note of a run, or a new one: id, last step reported, done."""
  found = files.read_object(path)
  if not found or 'tracker' in found and found['tracker'] != name:
    return {
        'tracker': name, 'id': secrets.token_hex(4), 'told': -1, 'done': False
    }
  fits = {'tracker', 'id', 'told', 'done'} == found.keys() and (
      isinstance(found['id'], str) and ID.fullmatch(found['id'])
      and type(found['told']) is int and type(found['done']) is bool
  )
  if not fits:
    raise UserError(
        f'{path} is not the file that a run with log.tracker={name!r} wrote. '
        'Use that file; or remove this one, for a new record.'
    )
  return found
