"""Draws the panels of a report as one matplotlib figure, for papers."""

import dataclasses
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

from mocov3_jax.reports import data, panels
from mocov3_jax.reports.data import Report, ReportedRun
from mocov3_jax.reports.panels import Level, Line, Marks, Panel
from mocov3_jax.reports.thinning import CURVE_POINTS

WIDTH, DPI = 1600, 100
TOP, ROW = 4.6, 2.5  # Heights of the first row and of the others, inches.
MOST_ROWS = 4  # The most runs whose gradients are drawn.
LEGEND = 12  # A legend with more entries than this is left out.
# Letters that fit into a line of a legend, and how many of them the piece of
# curve before an entry takes up.
LETTERS, HANDLE = 180, 8
LINE = 0.2  # The height of a legend's line, inches.
STROKE = 0.9  # Line width in points, per pixel of line width on the page.
GREY = '#767676'
SYMBOLS = {'triangle-down': 'v', 'x': 'X', 'circle': 'o', 'circle-open': 'o'}
STYLE = {
    'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'grid.alpha': 0.3, 'axes.titlesize': 12,
    'axes.titlelocation': 'left', 'legend.fontsize': 9,
    'text.parse_math': False,  # Names of runs may have a $.
}


def png(report: Report) -> bytes:
  """Returns the figure as a PNG file, 1600 pixels wide."""
  with rc_context(STYLE):
    figure = _figure(report)
    file = io.BytesIO()
    # Without matplotlib's version in it, the same runs give the same bytes.
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Glyph')  # Names in other scripts.
      figure.savefig(file, format='png', dpi=DPI, metadata={'Software': None})
  return file.getvalue()


def _figure(report: Report) -> Figure:
  top, rows = _top(report), _rows(report)
  runs, columns = _run_legend(report)
  settings = _setting_legend(report, top[-1], LETTERS // len(top) - HANDLE)
  # Long legends make the figure taller, rather than the panels shorter.
  lines = max(0, -(-len(runs) // columns) - 2) + max(0, len(settings) - 2)
  height = TOP + LINE * lines
  figure = Figure(
      (WIDTH / DPI, height + ROW * len(rows)), dpi=DPI, layout='constrained',
      facecolor='white',
  )
  FigureCanvasAgg(figure)
  grid = GridSpec(
      1 + len(rows), 1, figure, height_ratios=[height] + [ROW] * len(rows)
  )
  for panel, place in zip(top, grid[0].subgridspec(1, len(top)), strict=True):
    axes = figure.add_subplot(place)
    _draw(axes, panel)
  if settings:  # The legend is below the last panel, clear of its curves.
    axes.legend(
        handles=settings, frameon=False, loc='upper left',
        bbox_to_anchor=(0, -0.22),
    )
  for number, panel in enumerate(rows, 1):
    axes = figure.add_subplot(grid[number])
    _draw(axes, panel)
    axes.legend(frameon=False, loc='upper right', ncols=2)
    if number < len(rows):
      axes.set_xlabel('')
  if runs:
    figure.legend(
        handles=runs, loc='outside upper left', ncols=columns, frameon=False
    )
  return figure


def _top(report: Report) -> list[Panel]:
  """Returns the panels of the first row; a sweep's panel is the last."""
  build = lambda name: panels.BUILDERS[name](report, CURVE_POINTS)
  monitors = [panel for panel in map(build, panels.MONITORS) if panel.items]
  sweep = build('sweep')
  return [
      *(monitors or [build('knn')]), build('loss'),
      *([sweep] if sweep.items else []),
  ]


def _rows(report: Report) -> list[Panel]:
  """Returns a gradient panel for each of the most unstable runs."""
  panel = panels.gradients(report, CURVE_POINTS, data.LAYERS)
  numbers = sorted({item.runs[0] for item in panel.items})
  worst = sorted(
      numbers, key=lambda number: _unrest(report.runs[number]), reverse=True
  )[:MOST_ROWS]
  return [
      dataclasses.replace(
          panel, items=[item for item in panel.items if number in item.runs],
          caption=f'{_fit(report.runs[number].name, LETTERS // 2)}: '
          f'{panel.caption}',
      ) for number in sorted(worst)
  ]


def _unrest(run: ReportedRun) -> tuple[int, int]:
  found = run.analysis
  falls = len(found.dips) + (found.fall is not None)
  return falls, sum(map(len, found.spikes.values()))


def _run_legend(report: Report) -> tuple[list[Line2D], int]:
  """Returns a legend handle for each run, and the number of columns.

  There are no handles for a single run or for more than LEGEND runs.
  """
  if not 1 < len(report.runs) <= LEGEND:
    return [], 1
  names = [_fit(run.name, LETTERS // 2 - HANDLE) for run in report.runs]
  columns = min(LEGEND // 2, LETTERS // (max(map(len, names)) + HANDLE))
  return [
      Line2D([], [], label=name, **_look(run.color, run.dash))
      for name, run in zip(names, report.runs, strict=True)
  ], columns


def _setting_legend(
    report: Report, panel: Panel, letters: int
) -> list[Line2D]:
  """Returns legend handles for a sweep's lines; none if more than LEGEND."""
  names = _setting_names(report, letters) if panel.legend else {}
  if len(names) > LEGEND:
    return []
  return [
      Line2D([], [], label=name, marker='o', **_look(panel.legend[label]))
      for label, name in names.items()
  ]


def _setting_names(report: Report, letters: int) -> dict[str, str]:
  """Returns the legend's names for the settings that have a kNN accuracy.

  The name of a setting is its label. If any label has more than `letters`
  letters, every setting is named after its first run instead.
  """
  found = {}
  for label, numbers in data.settings(report).items():
    runs = [report.runs[number] for number in numbers]
    names = [run.name for run in runs if len(run.curve(data.KNN)[0])]
    if names:
      found[label] = names
  if max(map(len, found), default=0) <= letters:
    return dict(zip(found, found, strict=True))
  called = {}
  for label, names in found.items():
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    called[label] = _fit(names[0], letters - len(more)) + more
  return called


def _fit(name: str, letters: int) -> str:
  """Cuts the middle out of a long name, since names differ at their ends."""
  if len(name) <= letters:
    return name
  half = (letters - 1) // 2
  return f'{name[:half]}…{name[-half:]}'


def _draw(axes: Any, panel: Panel) -> None:
  """Draws a panel; without items, it says that nothing was logged."""
  axes.set(title=panel.caption, xlabel=panel.x_title)
  for item in panel.items:
    if isinstance(item, Line):
      _line(axes, item)
    elif isinstance(item, Marks):
      _marks(axes, item)
    else:
      _level(axes, item)
  if not panel.items:
    axes.text(
        0.5, 0.5, 'not logged', transform=axes.transAxes, ha='center',
        color=GREY,
    )
    axes.set(xticks=[], yticks=[])
    return
  if panel.from_zero:
    axes.set_ylim(bottom=0)
  if panel.y_kind == 'share':
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 1))
  if panel.y_kind == 'multiple':
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}×'))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_minor_formatter(NullFormatter())
  if panel.x_log:
    axes.set_xscale('log')
    # Matplotlib's own labels are formulas, which STYLE leaves unparsed.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())
  if panel.x_ticks:
    axes.set_xticks(panel.x_ticks, list(map(str, panel.x_ticks)))
    axes.set_xticks([], minor=True)


def _line(axes: Any, line: Line) -> None:
  look = _look(line.color, line.dash, line.width)
  if line.errors is None:
    axes.plot(line.x, line.y, label=line.name, **look)
  else:
    axes.errorbar(line.x, line.y, line.errors, marker='o', capsize=3, **look)


def _look(color: str, dash: str = '', width: float = 1.8) -> dict[str, Any]:
  # Matplotlib takes the lengths of dashes as multiples of the width.
  lengths = tuple(float(length) / width for length in dash.split(',') if length)
  return {'color': color, 'lw': STROKE * width, 'ls': (0, lengths or None)}


def _marks(axes: Any, marks: Marks) -> None:
  hollow = marks.symbol == 'circle-open'
  look = {'ms': 6, 'alpha': 0.5} if marks.faint else {'ms': 8, 'mec': 'white'}
  axes.plot(
      marks.x, marks.y, SYMBOLS[marks.symbol], color=marks.color,
      mfc='none' if hollow else marks.color, clip_on=False, **look,
  )


def _level(axes: Any, level: Level) -> None:
  axes.axhline(level.value, color=GREY, ls=':', lw=1.4)
  axes.annotate(
      'chance', (1, level.value), xycoords=('axes fraction', 'data'),
      ha='right', xytext=(0, 3), textcoords='offset points', color=GREY,
  )
