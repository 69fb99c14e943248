"""Trains a grid of runs, or prints it as shell lines."""

from collections.abc import Callable, Iterable, Sequence
import os
import shlex
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from mocov3_jax.base import console
from mocov3_jax.base import files as files_lib
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.config import checks, knobs
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.runs import history
from mocov3_jax.runs import table as sweep_table
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.sweeps import folder as sweep_folder
from mocov3_jax.sweeps import grid as sweep_grid
from mocov3_jax.sweeps import running as sweeping
from mocov3_jax.sweeps.grid import Grid, Point
from mocov3_jax.training import pretrain

# Stands for the schedule of a run whose data is not on this machine.
SOME_PLAN = config_lib.Plan(1, 2, 1, 1.0)
PRINT = 'commands'
# Former values of --print.
FORMER_PRINTS = ('slurm', 'jobset')


def check_points(points: Sequence[Point], data_is_here: bool) -> None:
  """Checks all runs before one of them costs time.

  Checks that depend on the number of devices are left to the run.

  Args:
    points: the runs of the grid.
    data_is_here: whether the data is on this machine and is checked, too.

  Raises:
    UserError: for the first run that is wrong.
  """
  sizes: dict[Any, int] = {}
  for point in points:
    c = point.config
    try:
      checks.validate(c)
      plan = SOME_PLAN
      if data_is_here:
        data = c.data.source, c.data.labels, tuple(c.data.mean)
        if data not in sizes:
          sizes[data] = len(pretrain.load_splits(c).train)
        plan = config_lib.plan(c, sizes[data])
      build_method(c, plan)
    except UserError as e:
      raise UserError(f'{point.title}: {e}') from e


def check_protocols(files: Sequence[str]) -> dict[str, str]:
  """Reads and checks the recipes of the evaluations.

  Args:
    files: the recipes, each FILE[:argument].

  Returns:
    {name of the evaluation's folder: FILE[:argument]}.

  Raises:
    UserError: if one is not a protocol, or two would share a folder.
  """
  named = {}
  for file in files:
    c = sweep_grid.load_config('evaluate', file)
    try:
      checks.validate_eval(c, 1)
    except UserError as e:
      raise UserError(f'--evaluate={file}: {e}') from e
    path, *argument = file.split(':', 1)
    stem = os.path.splitext(os.path.basename(path))[0].removeprefix('eval_')
    name = sweep_grid.folder_name(['_'.join(['eval', stem, *argument])])
    if name in named:
      raise UserError(
          f'--evaluate={named[name]} and --evaluate={file} would share the '
          f'folder {name}. Use files of different names.'
      )
    named[name] = file
  return named


def check_print(how: str) -> None:
  """Checks the value of --print.

  Raises:
    UserError: unless it is PRINT; for a former value, says what to do instead.
  """
  if how in FORMER_PRINTS:
    raise UserError(
        f'--print={how} does not exist any more. Use --print={PRINT} '
        'with the other flags as they are, and a script that runs its lines:\n'
        f'  python -m mocov3_jax.sweep ... --print={PRINT} >commands.txt\n'
        '  sbatch --array="0-$(($(wc -l <commands.txt) - 1))%4" '
        'launch/sweep_array.sbatch commands.txt\n'
        'On Kubernetes an Indexed Job runs the same script; the comments at '
        'its top say how.'
    )
  if how != PRINT:
    raise unknown('--print', how, [PRINT])


def shell_line(commands: Iterable[Sequence[str]]) -> str:
  """Joins commands to one shell line; each needs the one before to succeed."""
  return ' && '.join(shlex.join(command) for command in commands)


def make_jobs(
    points: Sequence[Point], protocols: dict[str, str], path: str
) -> list[sweeping.Job]:
  """Returns the job of each run, with commands for this Python interpreter.

  Args:
    points: the runs of the grid.
    protocols: {name of the evaluation's folder: FILE[:argument]}.
    path: the sweep's workdir.
  """
  python = sys.executable
  jobs = []
  for point in points:
    run = os.path.join(path, point.name)
    command = [python, '-m', 'mocov3_jax.train', *point.flags]
    jobs.append(sweeping.Job(
        title=point.title,
        folder=files_lib.run_path(run),
        train=[*command, f'--workdir={run}'],
        evaluations={
            files_lib.run_path(run) / name: [
                python, '-m', 'mocov3_jax.evaluate', f'--config={file}',
                f'--config.checkpoint={run}',
                f'--workdir={os.path.join(run, name)}',
            ] for name, file in protocols.items()
        },
    ))
  return jobs


def summarise(
    points: Sequence[Point], path: str, fields: Sequence[str]
) -> tuple[list[history.Run], list[sweep_table.Row]]:
  """Reads all runs back; returns them, and one table row per grid point."""
  found = []
  for point in points:
    folder = files_lib.run_path(path) / point.name
    if (folder / 'config.json').exists():
      found.append(history.read(folder, rows=False))
    else:  # It failed before it began.
      c = knobs.flatten(workdir_lib.to_json(point.config))
      found.append(history.Run(folder, c, [], 'absent', {}, []))
  return found, sweep_table.aggregate(found, fields)


def sweep(
    grid: Grid, base: ConfigDict, path: str, files: Sequence[str],
    children: Callable[[], Any] = sweeping.Children,
) -> dict[str, Any]:
  """Trains and evaluates what is left of a grid.

  Args:
    grid: the grid of the sweep.
    base: the config that all runs start from.
    path: the workdir.
    files: the recipes of the evaluations, each FILE[:argument].
    children: makes the object that starts processes, see `sweeping.Children`.

  Returns:
    The number of runs by how they ended, and the table.

  Raises:
    UserError: for bad input, before anything is written; or if runs failed,
      once all others are done.
    Preempted: after SIGTERM or Ctrl-C, once the run is saved.
  """
  protocols = check_protocols(files)
  points = sweep_grid.points(grid, base)
  sweep_folder.require_same_sweep(path, grid, points)
  check_points(points, data_is_here=True)
  jobs = make_jobs(points, protocols, path)
  lines = [shell_line([job.train]) for job in jobs]
  sweep_folder.keep(path, grid, points, lines)
  with children() as child:
    failed = sweeping.run_all(jobs, child.start, child.pause)
  found, rows = summarise(points, path, list(grid.axes))
  names = {field: grid.names[field] for field in grid.axes}
  console.say(sweep_table.as_text(rows, names))
  if failed:
    raise UserError(
        f'{len(failed)} of {len(points)} runs failed:\n  '
        + '\n  '.join(f'{title}: {why}' for title, why in failed.items())
        + '\nThe same command tries them again.'
    )
  statuses = [run.status for run in found]
  return {
      'workdir': str(files_lib.run_path(path)), 'runs': len(found),
      'done': statuses.count('done'), 'diverged': statuses.count('diverged'),
      'table': rows,
  }


def print_sweep(
    grid: Grid, base: ConfigDict, path: str, files: Sequence[str]
) -> None:
  """Prints a shell line for each run that is left; writes nothing.

  Args:
    grid: the grid of the sweep.
    base: the config that all runs start from.
    path: the workdir.
    files: the recipes of the evaluations, each FILE[:argument].

  Raises:
    UserError: for bad input.
  """
  protocols = check_protocols(files)
  points = sweep_grid.points(grid, base)
  sweep_folder.require_same_sweep(path, grid, points)
  check_points(points, data_is_here=False)
  left = [job.commands() for job in make_jobs(points, protocols, path)]
  lines = [shell_line(commands.values()) for commands in left if commands]
  if lines:
    print('\n'.join(lines))
  else:
    console.say(f'all {len(points)} runs are complete')


def main(
    grid: Grid, base: ConfigDict, path: str, files: Sequence[str],
    how: str | None,
) -> dict[str, Any] | None:
  """Runs the grid, or prints it.

  Args:
    grid: the grid of the sweep.
    base: the config that all runs start from.
    path: the workdir.
    files: the recipes of the evaluations, each FILE[:argument].
    how: PRINT = print the runs; None = run them.

  Returns:
    What `sweep` returns, or None after printing.

  Raises:
    UserError: for bad input, and as `sweep` does.
    Preempted: as `sweep` does.
  """
  # Accelerators are for the runs: checks must not take their memory.
  jax.config.update('jax_platforms', 'cpu')
  if how is None:
    return sweep(grid, base, path, files)
  check_print(how)
  return print_sweep(grid, base, path, files)
