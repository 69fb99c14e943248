"""Reads back what runs have left in their workdirs."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

from etils import epath

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import knobs
from mocov3_jax.runs import locks, metrics
from mocov3_jax.runs import workdir as workdir_lib

SWEEP = 'sweep.json'


@dataclasses.dataclass(frozen=True)
class Run:
  """A pre-training run, as its workdir tells it.

  Attributes:
    folder: the workdir.
    config: flat, 'optimizer.lr_per_256': 1e-4, as config.json has it.
    rows: of metrics.jsonl, where they were asked for.
    status: see `status`.
    result: of result.json; empty until the run is done.
    evaluations: the lines of results.jsonl, in the order they were made.
    data: of data.json: 'images' and 'classes' of the training set.
    environment: of environment.json: versions and devices; empty where the
      run recorded none.
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
    rows: whether to read the metrics of all steps as well.

  Raises:
    UserError: if the folder is not the workdir of a pre-training run.
  """
  config = workdir_lib.read_config(folder)
  workdir_lib.refuse_evaluation(config, folder)
  return Run(
      folder=folder,
      config=knobs.flatten(config.to_dict()),
      rows=metrics.read_metrics(folder / 'metrics.jsonl') if rows else [],
      status=status(folder),
      result=files.read_object(folder / 'result.json'),
      evaluations=metrics.read_lines(folder / 'results.jsonl'),
      data=files.read_object(folder / 'data.json'),
      environment=files.read_object(folder / 'environment.json'),
  )


def status(folder: epath.Path) -> str:
  """Returns what has become of the run in a folder.

  Returns:
    'absent' (not begun), 'running' (a process holds it), 'done', 'diverged'
    (a metric became NaN or infinite), or 'stopped' (to be continued).
  """
  if not (folder / 'config.json').exists():
    return 'absent'
  if in_use(folder):
    return 'running'
  if (folder / 'result.json').exists():
    return 'done'
  last = metrics.read_last(folder / 'metrics.jsonl')
  return 'diverged' if 'train/diverged' in last else 'stopped'


def in_use(folder: epath.Path) -> bool:
  """Returns whether a process has claimed the workdir (`workdir.claimed`)."""
  path = folder / '.lock'
  if not path.exists():
    return False
  with open(path) as file:
    try:
      # Shared, so that two who ask do not take each other for the run.
      locks.lock(file, shared=True)
    except BlockingIOError:
      return True
  return False


def find(paths: Iterable[str]) -> list[epath.Path]:
  """Finds runs: workdirs, or folders of them (a sweep), in order.

  Returns:
    Their workdirs, each once.

  Raises:
    UserError: for a path that is neither.
  """
  return list(dict.fromkeys(
      run for path in paths
      for run in sorted(_folders(path, files.absolute(path)))
  ))


def _folders(path: str, folder: epath.Path) -> Iterator[epath.Path]:
  if (folder / 'config.json').exists():
    yield folder
    return
  inside = [
      p for p in (folder.iterdir() if folder.is_dir() else ())
      if (p / 'config.json').exists() and (p / 'metrics.jsonl').exists()
      # Evaluations may lie beside the runs.
      and 'protocol' not in workdir_lib.read_config(p)
  ]
  if not inside:
    raise UserError(
        f'{path!r} is no run, and no folder of runs. Allowed: the workdir of '
        'a run, or a folder that holds some, such as that of a sweep.'
    )
  yield from inside


def aligned(runs: Sequence[Run]) -> list[Run]:
  """Returns the same runs, with None for each field that only others have.

  Those of another version have other fields.
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
