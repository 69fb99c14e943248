"""The tables of the report's page, as HTML."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
import json
from typing import Any

from mocov3_jax.reports import data, verdict
from mocov3_jax.reports.data import Report, ReportedRun
from mocov3_jax.runs import table as sweep_table

NONE = '–'
# Config fields beyond this number are shown only below the charts.
FIELDS_IN_TABLE = 6


def _dips(row: dict[str, Any]) -> str:
  if not row['dips']:
    return '0'
  return f'{row["dips"]:,} ({verdict.points(row["dip_deepest"])})'


def _layer_and_lag(row: dict[str, Any]) -> str:
  text = data.layer_name(row['leader'])
  if 'leader_steps' not in row:
    return text
  return f'{text} (last block {row["leader_steps"]:+g} steps)'


# (heading, the fact it needs, how to format it, whether it is a number).
COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str], bool], ...] = (
    ('steps', 'step', lambda r: f'{r["step"]:,}', True),
    (
        'first kNN', 'knn/top1_init',
        lambda r: verdict.percent(r['knn/top1_init']), True,
    ),
    ('last kNN', 'knn/top1', lambda r: verdict.percent(r['knn/top1']), True),
    (
        'best kNN', 'knn/top1_best',
        lambda r: verdict.percent(r['knn/top1_best']), True,
    ),
    (
        'loss (chance)', data.CHANCE,
        lambda r: f'{r[data.LOSS]:.3g} ({r[data.CHANCE]:.3g})', True,
    ),
    (
        'own key found', data.CONTRAST,
        lambda r: verdict.percent(r[data.CONTRAST]), True,
    ),
    ('rank', data.RANK, lambda r: f'{r[data.RANK]:.1f}', True),
    ('alignment', data.ALIGNMENT, lambda r: f'{r[data.ALIGNMENT]:.3f}', True),
    (
        'uniformity', data.UNIFORMITY,
        lambda r: f'{r[data.UNIFORMITY]:.2f}', True,
    ),
    ('dips (deepest)', 'dips', _dips, True),
    (
        'fall without recovery', 'fall',
        lambda r: f'{verdict.points(r["fall"])} from step {r["fall_start"]:,}',
        True,
    ),
    ('spikes', 'spikes', lambda r: f'{r["spikes"]:,}', True),
    ('spikes begin in', 'leader', _layer_and_lag, False),
    ('img/s', data.RATE, lambda r: f'{r[data.RATE]:,.0f}', True),
    ('MFU', data.MFU, lambda r: verdict.percent(r[data.MFU]), True),
)


def runs(report: Report) -> str:
  """Returns the table of the runs' outcomes, with checkboxes to hide runs."""
  rows = data.table(report)
  fields = list(report.fields)[:FIELDS_IN_TABLE]
  results = [sweep_table.evaluations(run.record) for run in report.runs]
  evaluations = dict.fromkeys(name for found in results for name in found)
  columns = [c for c in COLUMNS if any(c[1] in row for row in rows)]
  # The settings come last, since the names of a sweep's runs contain them.
  head = ['run', 'status', *(c[0] for c in columns)]
  numeric = [n for n, c in enumerate(columns, 2) if c[3]]
  numeric += range(len(head), len(head) + len(evaluations))
  head += [_evaluation(name) for name in evaluations]
  head += data.short(fields)
  body = []
  for number, row in enumerate(rows):
    cells = [_box(number, report.runs[number])]
    said = [row['status'], *(w for w in ('collapsed', 'stuck') if row[w])]
    cells.append(f'<span class="{row["status"]}">{", ".join(said)}</span>')
    cells += [escape(c[2](row)) if c[1] in row else NONE for c in columns]
    cells += [
        _newest(results[number][name]) if name in row else NONE
        for name in evaluations
    ]
    cells += [_value(field, row[field]) for field in fields]
    body.append(cells)
  buttons = ''.join(
      f'<button type="button" data-all="{value}">{text}</button>'
      for value, text in (('1', 'Show all'), ('0', 'Hide all'))
  ) if len(rows) > 1 else ''
  return (
      '<h2>Runs</h2><p class="about">A run whose box is not ticked is left '
      f'out of the charts.</p><div class="controls">{buttons}</div>'
      + table('Runs', map(escape, head), body, numeric)
  )


def _evaluation(name: str) -> str:
  # As in the CSV, 'knn' is the monitor, and 'eval_knn' is an evaluation.
  return name.removesuffix('/top1')


def _newest(values: list[float]) -> str:
  text = verdict.percent(values[-1])
  return text if len(values) == 1 else f'{text} (newest of {len(values)})'


def _box(number: int, run: ReportedRun) -> str:
  return (
      f'<label class="run" for="run-{number}"><input type="checkbox" checked '
      f'id="run-{number}" data-run="{number}">{swatch(run)}</label>'
  )


def swatch(run: ReportedRun) -> str:
  """Returns a piece of a run's curve, and the run's name."""
  # The names of a sweep's runs are long. They are best broken between fields.
  name = escape(run.name).replace(',', ',<wbr>')
  return f'{stroke(run.color, run.dash)}<span>{name}</span>'


def stroke(color: str, dash: str = '') -> str:
  """Returns a short piece of a curve, as SVG."""
  return (
      '<svg class="swatch" width="32" height="10" aria-hidden="true">'
      f'<line x1="0" y1="5" x2="32" y2="5" stroke="{color}" '
      f'stroke-width="3" stroke-dasharray="{dash}"/></svg>'
  )


def table(
    name: str, head: Iterable[str], rows: Iterable[Sequence[str]],
    numeric: Iterable[int] = (), wrap: bool = False,
) -> str:
  """Returns a table in a box that scrolls.

  Args:
    name: the name of the table, for screen readers.
    head: the HTML of the column headings.
    rows: the HTML of the cells; the first cell of a row is its heading.
    numeric: the indices of the columns of numbers.
    wrap: whether the text of long cells is wrapped.
  """
  right = set(numeric)
  kind = lambda n: (
      ' class="number"' if n in right else ' class="wrap"' if wrap else ''
  )
  text = ''.join(
      f'<th scope="col"{kind(n)}>{cell}</th>' for n, cell in enumerate(head)
  )
  body = ''.join(
      f'<tr><th scope="row">{first}</th>' + ''.join(
          f'<td{kind(n)}>{cell}</td>' for n, cell in enumerate(rest, 1)
      ) + '</tr>\n'
      for first, *rest in rows
  )
  return (
      f'<div class="scroll" tabindex="0" role="region" '
      f'aria-label="{escape(name)}"><table><thead><tr>{text}</tr></thead>'
      f'<tbody>{body}</tbody></table></div>'
  )


def sweep(report: Report) -> str:
  """Returns the means over the seeds of each setting; '' for a single run."""
  if len(report.runs) == 1:
    return ''
  rows = sweep_table.aggregate([run.record for run in report.runs], report.grid)
  metrics = sweep_table.metrics_of(rows)
  counts = ['seeds', 'done', 'diverged']
  # A few fields identify the setting. Of many fields, only the first are shown,
  # in the last columns.
  few = len(report.grid) <= data.TOLD
  told = report.grid if few else report.grid[:FIELDS_IN_TABLE]
  groups = data.grouped(report, report.grid)
  head = [*(data.short(told) if few else ['setting']), *counts]
  first = len(head) - len(counts)
  for metric in metrics:
    head += [f'{_evaluation(metric)}, mean', 'sd']
  numeric = range(first, len(head))
  head += [] if few else data.short(told)
  body = []
  for numbers, row in zip(groups, rows, strict=True):
    values = [_value(field, row[field]) for field in told]
    cells = [*values] if few else [escape(data.called(report, numbers))]
    cells += [str(row[name]) for name in counts]
    for metric in metrics:
      known = f'{metric}_mean' in row
      sd = row[f'{metric}_sd'] if known else None
      cells.append(verdict.percent(row[f'{metric}_mean']) if known else NONE)
      cells.append(NONE if sd is None else verdict.percent(sd))
    body.append(cells if few else cells + values)
  return (
      '<h2>Settings</h2><p class="about">Mean and standard deviation over the '
      'seeds, of the runs that are done.</p>'
      + table('Settings', map(escape, head), body, numeric)
  )


def configs(report: Report) -> str:
  """Returns the config fields that differ, the others, and the environments."""
  parts = ['<h2>Config and environment</h2>']
  if report.fields:
    parts += [
        '<h3>Fields that differ</h3>',
        table(
            'Fields that differ',
            ['field', *(escape(run.name) for run in report.runs)],
            [
                [escape(field), *(_value(field, value) for value in values)]
                for field, values in report.fields.items()
            ],
        ),
    ]
  common = [
      [escape(field), _value(field, value)]
      for field, value in report.runs[0].record.config.items()
      if field not in report.fields
  ]
  of = 'all runs have' if len(report.runs) > 1 else 'the run has'
  parts.append(
      f'<details><summary>Config that {of} ({len(common)} fields)</summary>'
      + table('Common config', ['field', 'value'], common, wrap=True)
      + '</details><h3>Environment</h3>' + _environments(report)
  )
  return ''.join(parts)


def _value(field: str, value: Any) -> str:
  return escape(sweep_table.show_field(field, value))


def _environments(report: Report) -> str:
  # Most often, all runs have the same environment.
  found: dict[str, list[str]] = {}
  for run in report.runs:
    key = json.dumps(run.record.environment, sort_keys=True)
    found.setdefault(key, []).append(run.name)
  kinds = [json.loads(key) for key in found]
  names = sorted({name for kind in kinds for name in kind})
  if not names:
    return '<p class="about">Not recorded.</p>'
  rows = [['runs', *(escape(', '.join(those)) for those in found.values())]]
  if len(kinds) == 1:
    rows = []
  rows += [
      [escape(name)] + [
          escape(str(kind[name])) if name in kind else 'not recorded'
          for kind in kinds
      ]
      for name in names
  ]
  head = ['name', *('value' for _ in kinds)]
  return table('Environment', head, rows, wrap=True)
