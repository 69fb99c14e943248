"""Collects the facts and curves of the runs of a report. Draws nothing."""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os
from typing import Any

import numpy as np

from mocov3_jax.config.training import FREE_ON_RESUME
from mocov3_jax.reports.thinning import Curve
from mocov3_jax.runs import history
from mocov3_jax.runs import table as sweep_table
from mocov3_jax.training import stability

KNN, RANK, RATE, MFU = (
    'knn/top1', 'features/effective_rank', 'train/images_per_second',
    'train/mfu',
)
ALIGNMENT, UNIFORMITY = 'features/alignment', 'features/uniformity'
LOSS, CHANCE = 'train/loss', 'train/loss_chance'
CONTRAST = 'train/contrast_accuracy'
# Metrics that are reported by their last value. Those of the features are
# logged for runs without labels.
LAST_VALUES = (
    RANK, ALIGNMENT, UNIFORMITY, LOSS, CHANCE, CONTRAST,
)
PATCH = 'model.patch_embed'
FIRST, LAST = 'patch_embed', 'last_block'
LAYERS = {FIRST: 'patch projection', LAST: 'last block'}
# Safe for the colour-blind: the palette of Okabe and Ito without its black and
# yellow. The light colours are darkened until each has a contrast of at least 3
# against both white and the page's dark background.
COLORS = (
    '#0072b2', '#d55e00', '#009e73', '#c45f99', '#a87b00', '#3a96d0',
    '#8a6ff0', '#7d7d7d',
)
# Lengths of dashes and gaps in pixels. They are used in this order when the
# colours repeat.
DASHES = ('', '8,3,2,3', '2,3', '9,4', '14,4', '14,3,2,3')
# A setting that is given by more fields than this is named after its runs.
TOLD = 3
# What `facts` returns besides the name, the config and the evaluations.
FACTS = (
    'status', 'collapsed', 'stuck', 'step', 'knn/top1_init', 'knn/top1',
    'knn/top1_best', 'knn/best_step', *LAST_VALUES, 'dips', 'dip_deepest',
    'fall', 'fall_start',
    'spikes', 'leader', 'leader_steps', RATE, MFU,
)


@dataclasses.dataclass(frozen=True)
class ReportedRun:
  """A run as a report shows it.

  Attributes:
    name: a short name that no other run of the report has.
    record: the run as it was read, but with only the last of its rows.
    analysis: the instabilities that were found in it.
    color, dash: the style of its curves, from COLORS and DASHES.
    curves: the finite values of each metric.
  """

  name: str
  record: history.Run
  analysis: stability.Analysis
  color: str
  dash: str
  curves: dict[str, Curve]

  def curve(self, metric: str) -> Curve:
    """Returns the curve of a metric; empty if it was not logged."""
    if metric in self.curves:
      return self.curves[metric]
    return np.empty(0, np.int64), np.empty(0)

  @property
  def steps_per_epoch(self) -> int | None:
    """The steps of an epoch; None if the run has not recorded its images."""
    data = self.record.data
    if 'images' not in data:
      return None
    return data['images'] // self.record.config['batch_size'] or None

  @property
  def chance(self) -> float | None:
    """The accuracy of guessing; None if the number of classes is not known."""
    data = self.record.data
    classes = data['classes'] if 'classes' in data else 0
    return 1 / classes if classes else None

  @property
  def layers(self) -> list[str]:
    """The layers with logged gradients, the patch projection first."""
    return sorted(
        self.analysis.spikes, key=lambda name: (name != FIRST, name == LAST)
    )

  @property
  def layer_curves(self) -> int:
    """The number of per-layer curves: of gradients and of updates."""
    return len(self.layers) + sum(
        len(self.curve(f'update_rms/{layer}')[0]) > 0 for layer in self.layers
    )


@dataclasses.dataclass(frozen=True)
class Report:
  """Runs side by side.

  Attributes:
    runs: the runs.
    fields: the config fields in which the runs differ, each with its value in
      every run.
    grid: the fields that define a setting: `fields` without the seed and
      without those that may change when a run is resumed.
  """

  runs: list[ReportedRun]
  fields: dict[str, list[Any]]
  grid: list[str]


def make(read: Iterable[history.Run]) -> Report:
  """Analyses the runs, and gives each a name and a colour.

  Args:
    read: the runs, one after another. Rows take much memory as dicts, so only
      the last row of each run is kept.
  """
  runs, found = [], []
  for run in read:
    found.append((stability.analyse(run.rows), stability.all_series(run.rows)))
    runs.append(dataclasses.replace(run, rows=run.rows[-1:]))
  runs = history.aligned(runs)
  fields = history.differing(runs)
  grid = [
      field for field in fields
      if field != 'seed' and field not in FREE_ON_RESUME
  ]
  names = _names(runs)
  styles = _styles(runs, names, grid)
  return Report(
      [
          ReportedRun(name, run, analysis, *style, curves)
          for name, run, style, (analysis, curves) in zip(
              names, runs, styles, found, strict=True
          )
      ],
      fields, grid,
  )


def _names(runs: Sequence[history.Run]) -> list[str]:
  # Absolute paths, so that runs in a bucket (gs://...) have a common path too.
  folders = ['/' + str(run.folder).lstrip('/') for run in runs]
  above = os.path.commonpath([os.path.dirname(path) for path in folders])
  return [_printable(os.path.relpath(path, above)) for path in folders]


def _printable(name: str) -> str:
  # A folder may have almost any name, but the page must be valid UTF-8.
  name = name.encode(errors='replace').decode()
  return ''.join(c if c.isprintable() else '?' for c in name)


def _styles(
    runs: Sequence[history.Run], names: list[str], grid: list[str]
) -> list[tuple[str, str]]:
  # Seeds of one setting look alike. As in the paper, the dash shows how patches
  # are embedded, since stability depends on that (paper s4.2).
  telling = [field for field in grid if field != PATCH] or grid
  keys = [
      json.dumps([run.config[field] for field in telling]) if telling else name
      for run, name in zip(runs, names, strict=True)
  ]
  order = list(dict.fromkeys(keys))
  # Frozen is always solid and learned always dash-dotted, whatever other kinds
  # there are.
  kinds = [''] if PATCH not in grid else sorted(
      {str(run.config[PATCH]) for run in runs} | {'frozen', 'learned'},
      key=lambda kind: (kind != 'frozen', kind != 'learned', kind),
  )
  styles = []
  for run, key in zip(runs, keys, strict=True):
    again, color = divmod(order.index(key), len(COLORS))
    kind = kinds.index(str(run.config[PATCH])) if PATCH in grid else 0
    dash = (again * len(kinds) + kind) % len(DASHES)
    styles.append((COLORS[color], DASHES[dash]))
  return styles


def chances(report: Report) -> list[float | None]:
  """Returns the chance accuracy of each run, or None if it is not to be drawn.

  It is not drawn if it is unknown, or so far below the curves (digits: 10 %,
  and curves from 83 to 97 %) that they would look like flat lines.
  """
  values = [value for run in report.runs for value in run.curve(KNN)[1]]
  if not values:
    return [None] * len(report.runs)
  least = 2 * min(values) - max(values)
  return [
      chance if chance is not None and chance > least else None
      for chance in (run.chance for run in report.runs)
  ]


def layer_name(layer: str) -> str:
  """Returns the name of a layer in words."""
  return LAYERS[layer] if layer in LAYERS else layer.replace('_', ' ')


def facts(run: ReportedRun, fields: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the facts of a run for the table; unknown ones are left out.

  Args:
    run: the run.
    fields: config fields to include as well.
  """
  record, found = run.record, run.analysis
  row: dict[str, Any] = {'run': run.name}
  row |= {field: record.config[field] for field in fields}
  row |= {
      'status': record.status, 'collapsed': found.collapsed is not None,
      'stuck': found.stuck is not None,
      'step': record.rows[-1]['step'] if record.rows else 0,
  }
  steps, knn = run.curve(KNN)
  if len(knn):
    best = int(np.argmax(knn))
    row |= {
        'knn/top1_init': float(knn[0]), 'knn/top1': float(knn[-1]),
        'knn/top1_best': float(knn[best]), 'knn/best_step': int(steps[best]),
    }
  for metric in LAST_VALUES:
    values = run.curve(metric)[1]
    if len(values):
      row[metric] = float(values[-1])
  row['dips'] = len(found.dips)
  if found.dips:
    row['dip_deepest'] = max(dip.depth for dip in found.dips)
  if found.fall is not None:
    row |= {'fall': found.fall.depth, 'fall_start': found.fall.start}
  row['spikes'] = sum(map(len, found.spikes.values()))
  if found.lead.first is not None:
    row['leader'] = found.lead.first
    if LAST in found.lead.lags:
      row['leader_steps'] = found.lead.lags[LAST]
  for metric in RATE, MFU:
    values = run.curve(metric)[1]
    values = values[values > 0]  # The first step compiles; it has 0.
    if metric in record.result:
      row[metric] = record.result[metric]
    elif len(values):
      row[metric] = float(np.median(values))
  return row | sweep_table.evaluated(record)


def columns(report: Report) -> list[str]:
  """Returns the names of all facts that any run has, in a fixed order."""
  known = dict.fromkeys(key for row in table(report) for key in row)
  # Outcomes come first, then settings.
  outcomes = [name for name in ('run', *FACTS) if name in known]
  others = sorted(
      name for name in known
      if name not in FACTS and name not in report.fields and name != 'run'
  )
  return outcomes + others + list(report.fields)


def table(report: Report) -> list[dict[str, Any]]:
  """Returns a row of facts for each run."""
  return [facts(run, report.fields) for run in report.runs]


def counts(report: Report) -> dict[str, int]:
  """Counts the runs, and the events in them."""
  rows = table(report)
  return {
      'runs': len(rows),
      'diverged': sum(row['status'] == 'diverged' for row in rows),
      'dips': sum(row['dips'] for row in rows),
      'falls': sum('fall' in row for row in rows),
      'spikes': sum(row['spikes'] for row in rows),
  }


def varied(report: Report) -> str | None:
  """Returns the numeric field of the grid that has the most values.

  Returns None if there is no such field, or if several have equally many
  values, since no single axis shows the sweep then. Also returns None if the
  runs are on different images.
  """
  if not comparable(report):
    return None
  sizes = {
      field: len(set(report.fields[field])) for field in report.grid
      if all(
          isinstance(value, (int, float)) and not isinstance(value, bool)
          for value in report.fields[field]
      )
  }
  most = [field for field in sizes if sizes[field] == max(sizes.values())]
  return most[0] if len(most) == 1 else None


def comparable(report: Report) -> bool:
  """Returns whether the runs are on the same images, as far as is known."""
  first, *others = (run.record for run in report.runs)
  return all(
      _same(first.data, run.data) if first.data and run.data else
      first.config['data.source'] == run.config['data.source']
      for run in others
  )


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
  return all(one[name] == other[name] for name in one.keys() & other.keys())


def settings(report: Report) -> dict[str, list[int]]:
  """Returns the settings that a sweep compares over its varied field.

  Returns:
    The indices of each setting's runs, by the label of the setting. The label
    gives the other fields of the grid, or, if these are more than TOLD, the
    names of runs.
  """
  field = varied(report)
  others = [name for name in report.grid if name != field]
  return {
      label(report.runs[numbers[0]].record.config, others)
      if len(others) <= TOLD else called(report, numbers): numbers
      for numbers in grouped(report, others)
  }


def grouped(report: Report, fields: Sequence[str]) -> list[list[int]]:
  """Groups the indices of runs that have the same values of these fields.

  Groups are in the order of their first runs, as in `table.aggregate`.
  """
  found: dict[str, list[int]] = {}
  for number, run in enumerate(report.runs):
    values = json.dumps([run.record.config[field] for field in fields])
    found.setdefault(values, []).append(number)
  return list(found.values())


def called(report: Report, numbers: Sequence[int]) -> str:
  """Returns a name for a setting, made from the names of its runs."""
  first, *others = (report.runs[number].name for number in numbers)
  return first + (f' and {len(others)} more' if others else '')


def short(fields: Sequence[str]) -> list[str]:
  """Returns field names without their group, where that is unambiguous."""
  last = [field.rsplit('.', 1)[-1] for field in fields]
  return [
      name if last.count(name) == 1 else field
      for name, field in zip(last, fields, strict=True)
  ]


def label(row: dict[str, Any], fields: Sequence[str]) -> str:
  """Labels a grid point, such as 'patch_embed frozen, lr_per_256 0.03'."""
  return ', '.join(
      f'{name} {sweep_table.show_field(field, row[field])}'
      for name, field in zip(short(fields), fields, strict=True)
  )
