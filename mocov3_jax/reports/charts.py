"""The charts of the report's page, as plotly's JSON values."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mocov3_jax.reports import data as data_lib
from mocov3_jax.reports import thinning as report_curves
from mocov3_jax.reports import verdict
from mocov3_jax.reports.data import Report, Shown
from mocov3_jax.reports.thinning import Curve
from mocov3_jax.runs import table as sweep_table

Chart = dict[str, Any]


def line(
    item: Shown, number: int, steps: np.ndarray, values: np.ndarray,
    limit: int, name: str = '', color: str = '', width: float = 1.8,
) -> list[Chart]:
  """The curve of a run, thinned; none without values.

  Args:
    item, number: the run, and its place in the report.
    steps, values: [n], finite.
    limit: of points.
    name: of the curve; the run's if empty.
    color: of the line, which is solid then; the run's if empty.
    width: of the line, pixels.
  """
  if not len(values):
    return []
  steps, values = report_curves.thin(steps, values, limit)
  dash = '' if color else item.dash
  return as_json(go.Scatter(
      x=steps.tolist(), y=[rounded(v) for v in values], mode='lines',
      name=name or item.name, meta=meta([number], item), line={
          'color': color or item.color, 'dash': dash or 'solid', 'width': width,
      },
  ))


def marks(
    item: Shown, number: int, name: str, steps: list[int],
    values: list[float], texts: list[str], symbol: str, color: str,
) -> list[Chart]:
  """Marked points of a run, each with a text; none without steps."""
  if not steps:
    return []
  return as_json(go.Scatter(
      x=steps, y=[rounded(v) for v in values], text=texts, name=name,
      mode='markers', meta=meta([number], item),
      marker={
          'symbol': symbol, 'size': 11, 'color': color,
          'line': {'width': 1, 'color': '#ffffff'},
      },
  ))


def meta(numbers: list[int], item: Shown) -> dict[str, Any]:
  """What the page's script knows of a curve over the steps of these runs."""
  return {'runs': numbers, 'epoch': item.steps_per_epoch}


def as_json(trace: go.Scatter) -> list[Chart]:
  """The values that plotly.js reads; plotly has checked their names."""
  return [trace.to_plotly_json()]


def rounded(value: float) -> float:
  """To five digits, more than a screen can show."""
  return float(f'{value:.5g}')


def chart(
    data: list[Chart], title: str, *, zero: bool = False,
    percent: bool = False,
) -> Chart:
  """A chart over steps. Colours of text and grid are the page's.

  Args:
    data: the curves.
    title: of the vertical axis.
    zero: whether that begins at 0.
    percent: whether values are shares.
  """
  axis = {'automargin': True, 'zeroline': False}
  layout = go.Layout(
      template={}, autosize=True, showlegend=False, hovermode='closest',
      margin={'l': 8, 'r': 12, 't': 32, 'b': 8},
      paper_bgcolor='rgba(0,0,0,0)', plot_bgcolor='rgba(0,0,0,0)',
      xaxis=axis | {'title': {'text': 'step'}, 'tickformat': ',~r'},
      yaxis=axis | {
          'title': {'text': title}, 'rangemode': 'tozero' if zero else 'normal',
      } | ({'tickformat': '.3~p'} if percent else {}),
      meta={'steps': True, 'x': 'step', 'y': title, 'percent': percent},
  )
  return {'data': data, 'layout': layout.to_plotly_json()}

# Muted; on white as on dark grey.
GREY, OTHER_LAYERS = '#808080', ('#8c8c8c', '#a3a3a3', '#757575')
# More values than this have ticks where plotly.js puts them.
MOST_TICKS = 12
FIRST_COLOR, LAST_COLOR = '#0072b2', '#d55e00'
# The charts of what watches a run: with labels, and without.
MONITORS = {'knn': data_lib.KNN, 'rank': data_lib.RANK}


def charts(report: Report) -> dict[str, Chart]:
  """All charts that the runs have data for, by name."""
  limit = report_curves.points_per_curve(sum(
      6 + len(item.layers) for item in report.shown
  ))
  made = {
      'sweep': _sweep(report),
      'knn': _knn(report, limit),
      'rank': _plain(report, limit, data_lib.RANK, 'effective rank'),
      'loss': _loss(report, limit),
      'spread': _plain(
          report, limit, 'train/feature_std', 'spread of features', width=1.2
      ),
      'gradients': _gradients(report, limit),
      'lr': _plain(report, limit, 'train/lr', 'learning rate'),
      'rate': _plain(
          report, limit, data_lib.RATE, 'images per second', _calm, zero=True
      ),
      'mfu': _plain(
          report, limit, data_lib.MFU, 'MFU', _calm, zero=True, percent=True
      ),
  }
  return {name: chart for name, chart in made.items() if chart['data']}


def monitors(report: Report) -> list[str]:
  """Those of MONITORS that any run has logged; page and figure show them."""
  return [
      name for name, metric in MONITORS.items()
      if any(len(item.curve(metric)[0]) for item in report.shown)
  ]


def _plain(
    report: Report, limit: int, metric: str, title: str,
    change: Callable[[np.ndarray, np.ndarray], Curve] | None = None,
    zero: bool = False, percent: bool = False, width: float = 1.8,
) -> Chart:
  """One curve a run, of one metric."""
  data = []
  for number, item in enumerate(report.shown):
    steps, values = item.curve(metric)
    if change is not None:
      steps, values = change(steps, values)
    data += line(item, number, steps, values, limit, width=width)
  return chart(data, title, zero=zero, percent=percent)


def _calm(steps: np.ndarray, values: np.ndarray) -> Curve:
  # The first step, which compiles, is logged as 0.
  return report_curves.smoothed(steps[values > 0], values[values > 0])


def _knn(report: Report, limit: int) -> Chart:
  chart = _plain(report, limit, data_lib.KNN, 'kNN accuracy', percent=True)
  for number, item in enumerate(report.shown):
    dips = item.analysis.dips
    lows = [dip.low for dip in dips]
    chart['data'] += marks(
        item, number, f'{item.name}: dips', lows,
        report_curves.at(item.curve(data_lib.KNN), lows),
        [_describe(dip) for dip in dips], 'triangle-down', item.color,
    )
  _add_levels(
      chart, report, data_lib.chances(report), data_lib.KNN,
      lambda level: f'chance, {verdict.percent(level)}',
  )
  return chart


def _describe(dip: Any) -> str:
  width = (
      'not made good' if dip.width is None else
      f'made good {verdict.count(dip.width, "step")} after its start'
  )
  return f'dip of {verdict.points(dip.depth)} at step {dip.low:,}, {width}'


def _loss(report: Report, limit: int) -> Chart:
  chart = _plain(report, limit, 'train/loss', 'loss', width=1.2)
  levels = []
  for item in report.shown:
    chance = item.curve('train/loss_chance')[1]
    levels.append(float(chance[-1]) if len(chance) else None)
  _add_levels(
      chart, report, levels, 'train/loss',
      lambda level: f'chance, {level:.2f}',
  )
  return chart


def _add_levels(
    chart: Chart, report: Report, levels: Sequence[float | None], metric: str,
    say: Callable[[float], str],
) -> None:
  """Adds one dotted line for each level that some runs have."""
  for level in sorted({x for x in levels if x is not None}):
    runs = [
        number for number, item in enumerate(report.shown)
        if levels[number] == level and len(item.curve(metric)[0])
    ]
    if not runs:
      continue
    end = max(int(report.shown[n].curve(metric)[0][-1]) for n in runs)
    x, y = [0, max(1, end)], [rounded(level)] * 2
    chart['data'] += as_json(go.Scatter(
        x=x, y=y, name=say(level), mode='lines+text',
        text=['', 'chance'], textposition='top left',
        line={'color': GREY, 'dash': '2,4', 'width': 1.5},
        meta=meta(runs, report.shown[runs[0]]),
    ))


def _gradients(report: Report, limit: int) -> Chart:
  data = []
  for number, item in enumerate(report.shown):
    muted = 0
    for layer in item.layers:
      steps, values = item.curve(f'grad_max/{layer}')
      steps, values = steps[values > 0], values[values > 0]
      if not len(values):
        continue  # Frozen.
      color = OTHER_LAYERS[muted % len(OTHER_LAYERS)]
      if layer in data_lib.LAYERS:
        color = FIRST_COLOR if layer == data_lib.FIRST else LAST_COLOR
      else:
        muted += 1
      ratios = report_curves.relative(values)
      name = data_lib.layer_name(layer)
      main = layer in data_lib.LAYERS
      data += line(
          item, number, steps, ratios, limit, name=name,
          color=color, width=1.5 if main else 1.0,
      )
      spikes = sorted(item.analysis.spikes[layer], key=lambda s: -s.ratio)
      spikes = sorted(spikes[:limit // 2])
      data += marks(
          item, number, f'{name}: spikes', [s.step for s in spikes],
          report_curves.at((steps, ratios), [s.step for s in spikes]), [
              f'spike of {s.ratio:.3g} times the median at step {s.step:,}'
              for s in spikes
          ], 'x', color,
      )
  made = chart(data, 'gradient / running median')
  made['layout']['yaxis'] |= {
      'type': 'log', 'ticksuffix': '×', 'tickformat': '~g',
      'tickvals': [d * 10.0**e for e in range(-6, 9) for d in (1, 3)],
  }
  made['layout']['meta']['one'] = True
  return made


def _sweep(report: Report) -> Chart:
  field = data_lib.varied(report)
  if field is None:
    return {'data': []}
  others = others_than_varied(report)
  styles = settings(report)
  members: dict[str, list[int]] = {}
  for number, item in enumerate(report.shown):
    name = data_lib.label(item.run.config, others)
    members.setdefault(name, []).append(number)
  points = sweep_table.aggregate([i.run for i in report.shown], report.grid)
  metric = f'{data_lib.KNN}_mean'
  data = []
  for name, numbers in members.items():
    color = styles[name]
    rows = sorted(
        (
            row for row in points
            if data_lib.label(row, others) == name and metric in row
        ), key=lambda row: row[field],
    )
    data += _singles(report, numbers, field, name, color)
    data += as_json(go.Scatter(
        x=[row[field] for row in rows],
        y=[rounded(row[metric]) for row in rows],
        error_y={'type': 'data', 'thickness': 1.5, 'array': [
            rounded(row[f'{data_lib.KNN}_sd'] or 0.0) for row in rows
        ]},
        name=f'{name or "all runs"}: mean', mode='lines+markers',
        line={'color': color, 'width': 2}, meta={'runs': numbers},
    )) if rows else []
  made = chart(data, 'last kNN accuracy', percent=True)
  made['layout']['xaxis']['title']['text'] = field
  if spans_decades(report.fields[field]):
    made['layout']['xaxis'] |= {'type': 'log'}
  values = sorted(set(report.fields[field]))
  if len(values) <= MOST_TICKS:
    made['layout']['xaxis'] |= {
        'tickvals': values, 'ticktext': list(map(str, values)),
    }
  made['layout']['meta'] |= {'steps': False, 'x': field.rsplit('.', 1)[-1]}
  return made


def others_than_varied(report: Report) -> list[str]:
  """The fields of the grid that tell the lines of the sweep's chart apart."""
  varied = data_lib.varied(report)
  return [name for name in report.grid if name != varied]


def settings(report: Report) -> dict[str, str]:
  """The lines of the sweep's chart, and their colours."""
  others = others_than_varied(report)
  names = dict.fromkeys(
      data_lib.label(item.run.config, others) for item in report.shown
  )
  return {
      name: data_lib.COLORS[index % len(data_lib.COLORS)]
      for index, name in enumerate(names)
  }


def spans_decades(values: Sequence[float]) -> bool:
  """Whether values are best drawn on a logarithmic axis."""
  return 0 < 10 * min(values) < max(values)


def _singles(
    report: Report, numbers: Iterable[int], field: str, name: str, color: str
) -> list[Chart]:
  """A faint point for each run, so that a checkbox hides its own."""
  data = []
  for number in numbers:
    item = report.shown[number]
    values = item.curve(data_lib.KNN)[1]
    if not len(values):
      continue
    status = item.run.status
    data += as_json(go.Scatter(
        x=[item.run.config[field]], y=[rounded(values[-1])],
        mode='markers', name=item.name, text=[
            f'{name or "run"}, {status}: {verdict.percent(values[-1])}'
        ],
        marker={
            'color': color, 'size': 8, 'opacity': 0.5,
            'symbol': 'x' if status == 'diverged' else
            'circle' if status == 'done' else 'circle-open',
        }, meta={'runs': [number]},
    ))
  return data
