"""The report as one figure of matplotlib, for papers and slides."""

import functools
import io
from typing import Any
import warnings

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  NullFormatter,
  PercentFormatter,
)

from mocov3_jax.reports import charts as report_charts
from mocov3_jax.reports import data as data_lib
from mocov3_jax.reports import thinning as report_curves
from mocov3_jax.reports.data import FIRST, LAST, Report, Shown
from mocov3_jax.runs import table as sweep_table

WIDTH, DPI = 1600, 100
TOP, ROW = 4.6, 2.5  # Heights of the first row and of the others, inches.
MOST_ROWS = 4  # Runs whose gradients are drawn.
LEGEND = 12  # More curves than this have none.
LETTERS, HANDLE = 180, 8  # In a line of it; for the piece of curve.
LINE = 0.2  # The height of one, inches.
POINTS = 2000
GREY = '#767676'
STYLE = {
    'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'grid.alpha': 0.3, 'axes.titlesize': 12,
    'axes.titlelocation': 'left', 'legend.fontsize': 9,
    'text.parse_math': False,  # Names of runs may have a $.
}


def png(report: Report) -> bytes:
  """The figure as a PNG file, 1600 pixels wide."""
  with rc_context(STYLE):
    figure = _figure(report)
    file = io.BytesIO()
    # Without the version of matplotlib, the same runs give the same bytes.
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # Names in other scripts.
      figure.savefig(file, format='png', dpi=DPI, metadata={'Software': None})
  return file.getvalue()


def _figure(report: Report) -> Figure:
  runs = [item for item in report.shown if _gradients_of(item)]
  runs.sort(key=_unrest, reverse=True)
  # The worst of many, but in the order of the report.
  runs = [item for item in report.shown if item in runs[:MOST_ROWS]]
  monitors = report_charts.monitors(report)
  panels = [PANELS[name] for name in monitors or ['knn']] + [_loss]
  settings = {}
  if 'knn' in monitors and data_lib.varied(report) is not None:
    settings = _settings(report, LETTERS // (len(panels) + 1) - HANDLE)
    panels.append(functools.partial(_sweep, settings=settings))
  handles, columns = _legend(report)
  # Long legends make the figure higher, not the panels lower.
  lines = max(0, -(-len(handles) // columns) - 2)
  if len(settings) <= LEGEND:
    lines += max(0, len(settings) - 2)
  top = TOP + LINE * lines
  figure = Figure(
      (WIDTH / DPI, top + ROW * len(runs)), dpi=DPI, layout='constrained',
      facecolor='white',
  )
  FigureCanvasAgg(figure)
  rows = GridSpec(
      1 + len(runs), 1, figure, height_ratios=[top] + [ROW] * len(runs)
  )
  places = rows[0].subgridspec(1, len(panels))
  for place, draw in zip(places, panels, strict=True):
    draw(figure.add_subplot(place), report)
  if handles:
    figure.legend(
        handles=handles, loc='outside upper left', ncols=columns, frameon=False
    )
  for number, item in enumerate(runs, 1):
    _gradients(figure.add_subplot(rows[number]), item, number == len(runs))
  return figure


def _legend(report: Report) -> tuple[list[Line2D], int]:
  """A piece of each run's curve, none of many; and in how many columns."""
  if not 1 < len(report.shown) <= LEGEND:
    return [], 1
  names = [_fit(item.name, LETTERS // 2 - HANDLE) for item in report.shown]
  columns = min(LEGEND // 2, LETTERS // (max(map(len, names)) + HANDLE))
  return [
      Line2D([], [], label=name, **_style(item))
      for name, item in zip(names, report.shown, strict=True)
  ], columns


def _fit(name: str, letters: int) -> str:
  """Without its middle, where it is too long: names differ at their ends."""
  if len(name) <= letters:
    return name
  half = (letters - 1) // 2
  return f'{name[:half]}…{name[-half:]}'


def _unrest(item: Shown) -> tuple[int, int]:
  found = item.analysis
  return len(found.dips), sum(map(len, found.spikes.values()))


def _gradients_of(item: Shown) -> dict[str, report_curves.Curve]:
  """Of the first and the last layer, relative; frozen ones left out."""
  curves = {}
  for layer in data_lib.LAYERS:
    steps, values = item.curve(f'grad_max/{layer}')
    steps, values = steps[values > 0], values[values > 0]
    if len(values):
      curves[layer] = steps, report_curves.relative(values)
  return curves


def _style(item: Shown) -> dict[str, Any]:
  lengths = [float(x) / 1.8 for x in item.dash.split(',') if x]
  return {
      'color': item.color, 'lw': 1.6,
      'ls': (0, tuple(lengths)) if lengths else '-',
  }


def _curves(axes: Any, report: Report, metric: str) -> None:
  drawn = False
  for item in report.shown:
    steps, values = report_curves.thin(*item.curve(metric), POINTS)
    if len(values):
      axes.plot(steps, values, label=item.name, **_style(item))
      drawn = True
  if not drawn:
    axes.text(
        0.5, 0.5, 'not logged', transform=axes.transAxes, ha='center',
        color=GREY,
    )
    axes.set(xticks=[], yticks=[])
  axes.set_xlabel('step')


def _level(axes: Any, level: float | None) -> None:
  if level is not None:
    axes.axhline(level, color=GREY, ls=':', lw=1.4)
    axes.annotate(
        'chance', (1, level), xycoords=('axes fraction', 'data'), ha='right',
        xytext=(0, 3), textcoords='offset points', color=GREY,
    )


def _knn(axes: Any, report: Report) -> None:
  _curves(axes, report, data_lib.KNN)
  for item in report.shown:
    lows = [dip.low for dip in item.analysis.dips]
    axes.plot(
        lows, report_curves.at(item.curve(data_lib.KNN), lows), 'v',
        color=item.color, ms=8, mec='white', ls='none',
    )
  for chance in set(data_lib.chances(report)):
    _level(axes, chance)
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.set_title('kNN accuracy (triangles: dips)')


def _rank(axes: Any, report: Report) -> None:
  _curves(axes, report, data_lib.RANK)
  axes.set_title('effective rank of the features')


# Of what watches a run.
PANELS = {'knn': _knn, 'rank': _rank}


def _loss(axes: Any, report: Report) -> None:
  _curves(axes, report, 'train/loss')
  levels = [item.curve('train/loss_chance')[1] for item in report.shown]
  for level in sorted({float(those[-1]) for those in levels if len(those)}):
    _level(axes, level)
  axes.set_title('loss')


def _gradients(axes: Any, item: Shown, last: bool) -> None:
  colors = {
      FIRST: report_charts.FIRST_COLOR, LAST: report_charts.LAST_COLOR,
  }
  for layer, (steps, ratios) in _gradients_of(item).items():
    color = colors[layer]
    axes.plot(
        *report_curves.thin(steps, ratios, POINTS), color=color, lw=1.1,
        label=data_lib.layer_name(layer),
    )
    spikes = [spike.step for spike in item.analysis.spikes[layer]]
    axes.plot(
        spikes, report_curves.at((steps, ratios), spikes), 'X', color=color,
        ms=8, mec='white', ls='none',
    )
  axes.set_yscale('log')
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}×'))
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
  axes.yaxis.set_minor_formatter(NullFormatter())
  name = _fit(item.name, LETTERS // 2)
  axes.set_title(f'{name}: gradient / running median (crosses: spikes)')
  axes.legend(frameon=False, loc='upper right', ncols=2)
  if last:
    axes.set_xlabel('step')


def _settings(report: Report, letters: int) -> dict[str, str]:
  """What the legend calls each setting of the sweep that has a kNN.

  That is its label; or, where any label has more letters than these, the name
  of its first run.
  """
  others = report_charts.others_than_varied(report)
  found: dict[str, list[str]] = {}
  for item in report.shown:
    if len(item.curve(data_lib.KNN)[0]):
      label = data_lib.label(item.run.config, others)
      found.setdefault(label, []).append(item.name)
  if max(map(len, found)) <= letters:
    return dict(zip(found, found, strict=True))
  called = {}
  for label, names in found.items():
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    called[label] = _fit(names[0], letters - len(more)) + more
  return called


def _sweep(axes: Any, report: Report, settings: dict[str, str]) -> None:
  field = data_lib.varied(report)
  styles = report_charts.settings(report)
  others = report_charts.others_than_varied(report)
  rows = sweep_table.aggregate([i.run for i in report.shown], report.grid)
  rows = [row for row in rows if f'{data_lib.KNN}_mean' in row]
  rows.sort(key=lambda row: row[field])
  for item in report.shown:
    values = item.curve(data_lib.KNN)[1]
    if len(values):
      name = data_lib.label(item.run.config, others)
      status = item.run.status
      axes.plot(
          item.run.config[field], values[-1], color=styles[name], alpha=0.5,
          marker='x' if status == 'diverged' else 'o', ls='none',
          mfc=styles[name] if status == 'done' else 'none',
      )
  for name, called in settings.items():
    own = [row for row in rows if data_lib.label(row, others) == name]
    axes.errorbar(
        [row[field] for row in own],
        [row[f'{data_lib.KNN}_mean'] for row in own],
        [row[f'{data_lib.KNN}_sd'] or 0 for row in own],
        color=styles[name], lw=2, marker='o', capsize=3, label=called,
    )
  if report_charts.spans_decades(report.fields[field]):
    axes.set_xscale('log')
    # Matplotlib's own are formulas, and these are not parsed.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())
  values = sorted(set(report.fields[field]))
  if len(values) <= report_charts.MOST_TICKS:
    axes.set_xticks(values, list(map(str, values)))
    axes.set_xticks([], minor=True)
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set(xlabel=field)
  axes.set_title('last kNN accuracy, mean and sd')
  if others and len(settings) <= LEGEND:  # Below, where no curve is.
    axes.legend(frameon=False, loc='upper left', bbox_to_anchor=(0, -0.22))
