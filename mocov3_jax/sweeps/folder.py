"""The folder of a sweep: checks that it fits the sweep; writes sweep.json."""

from collections.abc import Sequence
import json
from typing import Any

from etils import epath

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import knobs
from mocov3_jax.config.training import FREE_ON_RESUME
from mocov3_jax.runs import history, locks
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.sweeps.grid import Grid, Point


def require_same_sweep(
    path: str, grid: Grid, points: Sequence[Point]
) -> None:
  """Refuses a folder that holds anything but an earlier part of this sweep.

  Args:
    path: the workdir. It may also be empty, or not exist yet.
    grid: the grid of the sweep.
    points: the runs of the grid.

  Raises:
    UserError: if another sweep, or a single run, is there; says what differs.
  """
  folder = files.run_path(path, '--workdir')
  if (folder / 'config.json').exists():
    raise UserError(
        f'--workdir={path} is the workdir of a run. Use a folder of the '
        'sweep alone.'
    )
  before = _read(folder)
  if before:
    differ = knobs.differences(
        _base(before), _base(_described(grid)),
        frozenset(f'overrides.{field}' for field in FREE_ON_RESUME),
    )
    if differ:
      raise UserError(
          f'--workdir={path} holds another sweep; the two differ in\n  '
          + '\n  '.join(differ) + '\nUse the same config and fields of '
          'the grid, with the same or more values and seeds; or another '
          'workdir.'
      )
  for point in points:
    run = folder / point.name
    if not (run / 'config.json').exists():
      continue
    differ = knobs.differences(
        workdir_lib.to_json(workdir_lib.read_training_config(run)),
        workdir_lib.to_json(point.config), FREE_ON_RESUME,
    )
    if differ:
      raise UserError(
          f'{run} was made with another {grid.config}; the two differ in\n  '
          + '\n  '.join(differ) + '\nUse the file as it was, or another '
          'workdir.'
      )


def _base(described: dict[str, Any]) -> dict[str, Any]:
  """Returns what must stay the same for a sweep to be continued."""
  return {
      'config': described['config'],
      'fields of the grid': sorted(described['axes']),
      'overrides': described['overrides'],
  }


def _described(grid: Grid) -> dict[str, Any]:
  return json.loads(json.dumps({
      'config': grid.config, 'overrides': grid.overrides, 'axes': grid.axes,
      'seeds': grid.seeds,
  }))


def _read(folder: epath.Path) -> dict[str, Any]:
  path = folder / history.SWEEP
  found = files.read_object(path)
  if not found:
    return {}
  try:
    _base(found), found['seeds'], [run['name'] for run in found['runs']]
    return found
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(
        f'{path} is damaged: {e}. Use the file that the sweep wrote, or remove '
        'it: the sweep finds its runs without it.'
    ) from e


def keep(
    path: str, grid: Grid, points: Sequence[Point], commands: Sequence[str]
) -> None:
  """Writes sweep.json: this grid, and what earlier ones had in addition.

  Args:
    path: the workdir.
    grid: the grid of the sweep.
    points: the runs of the grid.
    commands: the commands of the runs, as shell lines.

  Raises:
    UserError: if the file cannot be written.
  """
  folder = files.run_path(path, '--workdir')
  now = _described(grid)
  now['runs'] = [
      {'name': point.name, 'command': command}
      for point, command in zip(points, commands, strict=True)
  ]
  try:
    files.make_folder(folder)
    # Sweeps that share the folder may start at the same time.
    with locks.held(folder, path, wait=True):
      before = _read(folder)
      if before:
        names = {run['name'] for run in now['runs']}
        now['runs'] += [r for r in before['runs'] if r['name'] not in names]
        now['seeds'] = _union(before['seeds'], now['seeds'])
        now['axes'] = {
            field: _union(before['axes'][field], values)
            for field, values in now['axes'].items()
        }
      files.write_json(folder / history.SWEEP, now)
  except OSError as e:
    raise UserError(
        f'--workdir={path} cannot be written: {e.strerror or e}. Use a '
        'folder this user may write to.'
    ) from e


def _union(old: list[Any], new: list[Any]) -> list[Any]:
  return old + [value for value in new if value not in old]
