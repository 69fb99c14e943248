"""Finds runs, and reads what they have written to their workdirs."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

from etils import epath

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import knobs, training
from mocov3_jax.runs import locks, metrics
from mocov3_jax.runs import workdir as workdir_lib

SWEEP = 'sweep.json'
# Config fields that every run has, in all versions.
NEEDED = 'batch_size', 'data.source', 'seed'


@dataclasses.dataclass(frozen=True)
class Run:
  """A pre-training run, as read from its workdir.

  Attributes:
    folder: the workdir.
    config: config.json as a flat dictionary, {'optimizer.lr_per_256': 1e-4}.
    rows: the rows of metrics.jsonl; empty if they were not asked for.
    status: see `status`.
    result: the content of result.json; empty until the run is done.
    evaluations: the lines of results.jsonl, in the order they were written.
    data: the content of data.json, such as 'images' and 'classes' of the
      training set.
    environment: versions and devices from environment.json; empty if the run
      recorded none.
  """

  folder: epath.Path
  config: dict[str, Any]
  rows: list[dict[str, Any]]
  status: str
  result: dict[str, Any]
  evaluations: list[dict[str, Any]]
  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  environment: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(folder: epath.Path, rows: bool = True) -> Run:
  """Reads one run, of this version or an earlier one.

  Args:
    folder: the workdir.
    rows: whether to read the metrics of all steps, too.

  Raises:
    UserError: if the folder is not the workdir of a pre-training run.
  """
  files.require_plain(folder)
  config = workdir_lib.read_config(folder)
  workdir_lib.refuse_evaluation(config, folder)
  flat = knobs.flatten(config.to_dict())
  lacking = [field for field in NEEDED if field not in flat]
  if lacking:
    raise UserError(
        f'{folder / "config.json"} is damaged: it lacks {", ".join(lacking)}.'
    )
  try:
    knobs.check_types(training.schema(), flat)
    knobs.require('batch_size', flat['batch_size'], knobs.AT_LEAST_ONE)
  except UserError as e:
    raise UserError(f'{folder}: {e}') from e
  data = files.read_object(folder / 'data.json')
  result = files.read_object(folder / 'result.json')
  for path, found, fields in (
      ('data.json', data, ('images', 'classes')),
      ('result.json', result, ('step', 'knn/top1')),
  ):
    for field in fields:
      if field in found and not knobs.is_finite(found[field]):
        raise UserError(
            f'{folder / path} is damaged: {field} is not a number.'
        )
  if result and 'step' not in result:
    raise UserError(f'{folder / "result.json"} is damaged: it lacks step.')
  environment = files.read_object(folder / 'environment.json')
  return Run(
      folder=folder,
      config=flat,
      rows=metrics.read_metrics(folder / 'metrics.jsonl') if rows else [],
      status=status(folder),
      result=result,
      evaluations=[
          line for line in metrics.read_lines(folder / 'results.jsonl')
          if _is_evaluation(line)
      ],
      data=data,
      # Only entries that a run writes there; others are ignored.
      environment={
          name: value for name, value in environment.items()
          if name in workdir_lib.ENVIRONMENT
          and isinstance(value, (str, int)) and len(str(value)) <= 200
      },
  )


def _is_evaluation(line: dict[str, Any]) -> bool:
  """Returns whether a line of results.jsonl has the format of `evaluate`."""
  try:
    return (
        isinstance(line['checkpoint_step'], int)
        and all(
            isinstance(line[name], str)
            for name in ('workdir', 'protocol', 'encoder')
        )
        and isinstance(line['settings']['data']['labels_per_class'], int)
        and knobs.is_finite(line[f'{line["protocol"]}/top1'])
    )
  except (KeyError, TypeError):
    return False


def status(folder: epath.Path) -> str:
  """Returns the status of the run in a folder.

  Returns:
    'absent' (not begun), 'running' (a process holds the folder), 'done',
    'diverged' (a metric became NaN or infinite), or 'stopped' (can be
    continued).
  """
  if not (folder / 'config.json').exists():
    return 'absent'
  if locks.is_held(folder):
    return 'running'
  if (folder / 'result.json').exists():
    return 'done'
  last = metrics.read_last(folder / 'metrics.jsonl')
  return 'diverged' if 'train/diverged' in last else 'stopped'


def find(paths: Iterable[str]) -> list[epath.Path]:
  """Finds runs, in order.

  Args:
    paths: workdirs, or folders that contain workdirs, such as a sweep.

  Returns:
    The workdirs, without duplicates.

  Raises:
    UserError: if a path is neither.
  """
  return list(dict.fromkeys(
      run for path in paths
      for run in sorted(_folders(path, files.run_path(path)))
  ))


def _folders(path: str, folder: epath.Path) -> Iterator[epath.Path]:
  if (folder / 'config.json').exists():
    yield folder
    return
  inside = [
      p for p in files.entries(folder)
      if (p / 'config.json').exists() and (p / 'metrics.jsonl').exists()
      and not _is_evaluations(p)
  ]
  if not inside:
    raise UserError(
        f'{path!r} is neither a run nor a folder of runs. Use the workdir of '
        'a run, or a folder that holds runs, such as that of a sweep.'
    )
  yield from inside


def _is_evaluations(folder: epath.Path) -> bool:
  # The workdirs of evaluations may be in the same folder as the runs.
  try:
    return 'protocol' in workdir_lib.read_config(folder)
  except UserError:
    return False  # Reading it will report the error.


def aligned(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs with None for each config field that only others have.

  Runs of different versions can have different fields.
  """
  none = dict.fromkeys(field for run in runs for field in run.config)
  return [
      dataclasses.replace(run, config=none | run.config) for run in runs
  ]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
  """Returns the fields in which `aligned` runs differ, with their values."""
  columns = {
      field: [run.config[field] for run in runs]
      for run in runs[:1] for field in run.config
  }
  return {
      field: values for field, values in columns.items()
      if any(value != values[0] for value in values)
  }
