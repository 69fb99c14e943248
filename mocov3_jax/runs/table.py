"""Summarises the runs of a grid: one row per grid point, over its seeds."""

from collections.abc import Iterable, Sequence
import json
import statistics
from typing import Any

from etils import epath

from mocov3_jax.config import knobs, training
from mocov3_jax.runs import history as runs_lib

MONITOR = 'knn/top1'
COUNTS = ('seeds', 'done', 'diverged', 'unfinished')
KNOBS = knobs.flatten(training.schema())
Row = dict[str, Any]


def aggregate(
    runs: Iterable[runs_lib.Run], fields: Sequence[str]
) -> list[Row]:
  """Averages over runs that differ only in their seed.

  Args:
    runs: the runs of the grid.
    fields: the config fields that span the grid, without the seed.

  Returns:
    One row per grid point, in the order of their first runs, with these keys:
    - each field, with its value;
    - 'seeds', the number of runs; and how many of them are 'done', 'diverged'
      or neither ('unfinished');
    - 'METRIC_mean' and 'METRIC_sd' of each metric, over the done runs that have
      it. Metrics are accuracies from 0 to 1: 'knn/top1', the last value of the
      run's kNN monitor (absent in runs without labels), and those of
      `evaluated`. The standard deviation is that of a sample; None for a
      single run.
  """
  points: dict[str, list[runs_lib.Run]] = {}
  for run in runs:
    values = [run.config[field] for field in fields]
    points.setdefault(json.dumps(values), []).append(run)
  return [
      {field: members[0].config[field] for field in fields} | _row(members)
      for members in points.values()
  ]


def _row(members: list[runs_lib.Run]) -> Row:
  statuses = [run.status for run in members]
  done, diverged = statuses.count('done'), statuses.count('diverged')
  row: Row = {
      'seeds': len(members), 'done': done, 'diverged': diverged,
      'unfinished': len(members) - done - diverged,
  }
  found: dict[str, list[float]] = {}
  for run in members:
    if run.status == 'done':
      for name, value in measured(run).items():
        found.setdefault(name, []).append(value)
  for name, values in found.items():
    row[f'{name}_mean'] = statistics.mean(values)
    row[f'{name}_sd'] = statistics.stdev(values) if len(values) > 1 else None
  return row


def measured(run: runs_lib.Run) -> dict[str, float]:
  """Returns the accuracies of a done run: its last kNN, and its evaluations."""
  own = {MONITOR: run.result[MONITOR]} if MONITOR in run.result else {}
  return own | evaluated(run)


def evaluated(run: runs_lib.Run) -> dict[str, float]:
  """Returns the newest value of each of a run's `evaluations`."""
  return {name: values[-1] for name, values in evaluations(run).items()}


def evaluations(run: runs_lib.Run) -> dict[str, list[float]]:
  """Returns the top-1 accuracies of the evaluations of a run's last step.

  Returns:
    Accuracies by name. If the evaluation's folder is inside the run's, as in a
    sweep, its name is part of the key: {'eval_linear_small/top1': [...]}.
    Otherwise the key is 'eval_PROTOCOL/top1', and evaluations of the target
    network or with few labels are left out.
  """
  found: dict[str, dict[tuple[str, float], float]] = {}
  for line in run.evaluations:
    if run.result and line['checkpoint_step'] != run.result['step']:
      continue
    folder = epath.Path(line['workdir'])
    # Compared by name only, so that runs can be moved.
    inside = folder.parent.name == run.folder.name
    few = line['settings']['data']['labels_per_class']
    if not inside and (few or line['encoder'] != 'query'):
      continue
    name = folder.name if inside else f'eval_{line["protocol"]}'
    top1 = line[f'{line["protocol"]}/top1']
    # A kill may have written one result twice.
    found.setdefault(f'{name}/top1', {})[line['workdir'], top1] = top1
  return {name: list(values.values()) for name, values in found.items()}


def metrics_of(rows: Iterable[Row]) -> list[str]:
  """Returns the metrics that have a mean in any row, the monitor's first."""
  ending = '_mean'
  names = dict.fromkeys(
      key.removesuffix(ending) for row in rows for key in row
      if key.endswith(ending)
  )
  return sorted(names, key=lambda name: (name != MONITOR, name))


def as_text(rows: Sequence[Row], names: dict[str, str]) -> str:
  """Returns the rows of `aggregate` as an aligned table, in per cent.

  Args:
    rows: from `aggregate`.
    names: {field: column heading}.
  """
  metrics = metrics_of(rows)
  table = [[*names.values(), *COUNTS[1:], *metrics]]
  for row in rows:
    table.append(
        [show_field(field, row[field]) for field in names]
        + [str(row[count]) for count in COUNTS[1:]]
        + [_mean_and_sd(row, metric) for metric in metrics]
    )
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return '\n'.join(
      '  '.join(
          cell.ljust(width) for cell, width in zip(line, widths, strict=True)
      ).rstrip()
      for line in table
  )


def show_value(value: Any) -> str:
  """Returns a value as a user would type it: 0.0001, (0.3,0.5), frozen."""
  if isinstance(value, (list, tuple)):
    comma = ',' if len(value) == 1 else ''
    return f'({",".join(map(show_value, value))}{comma})'
  return repr(value) if isinstance(value, float) else str(value)


def show_field(field: str, value: Any) -> str:
  """Returns a field's value as text; for a 0 with a meaning, that meaning.

  Args:
    field: the dotted name of the field.
    value: the value in the config of a pre-training run.
  """
  knob = KNOBS[field] if field in KNOBS else None
  if knob is not None and knob.zero and value == 0:
    return knob.zero
  return show_value(value)


def _mean_and_sd(row: Row, metric: str) -> str:
  if f'{metric}_mean' not in row:
    return '-'
  text = f'{100 * row[f"{metric}_mean"]:.2f}'
  sd = row[f'{metric}_sd']
  return f'{text} %' if sd is None else f'{text} ± {100 * sd:.2f} %'
