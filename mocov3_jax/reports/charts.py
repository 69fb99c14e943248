"""Draws a panel as a plotly chart, in the JSON that plotly.js reads."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from mocov3_jax.reports.data import ReportedRun
from mocov3_jax.reports.panels import Level, Line, Marks, Panel

GREY = '#808080'  # Legible on both white and dark grey.
CLEAR = 'rgba(0,0,0,0)'


def chart(panel: Panel, runs: Sequence[ReportedRun]) -> dict[str, Any]:
  """Returns the curves and the layout of a panel.

  The colours of text and grid are left to the page, which has two themes.

  Args:
    panel: what to draw.
    runs: the runs of the report, which the panel refers to by index.
  """
  data = []
  for item in panel.items:
    # go.Scatter checks the names of its arguments.
    trace = go.Scatter(
        name=item.name, hovertemplate=_tooltip(panel, item), **_trace(item),
        # Read by the page's script.
        meta={'runs': item.runs, 'epoch': runs[item.runs[0]].steps_per_epoch},
    )
    data.append(trace.to_plotly_json())
  return {'data': data, 'layout': _layout(panel).to_plotly_json()}


def _trace(item: Line | Marks | Level) -> dict[str, Any]:
  if isinstance(item, Level):
    return {
        'x': [0, max(1, item.end)], 'y': _rounded([item.value] * 2),
        'mode': 'lines+text', 'text': ['', 'chance'],
        'textposition': 'top left',
        'line': {'color': GREY, 'dash': '2,4', 'width': 1.5},
    }
  points = {'x': item.x, 'y': _rounded(item.y)}
  if isinstance(item, Marks):
    look = {'size': 8, 'opacity': 0.5} if item.faint else {
        'size': 11, 'line': {'width': 1, 'color': '#ffffff'},
    }
    return points | {
        'mode': 'markers', 'text': [_text(text) for text in item.texts],
        'marker': {'symbol': item.symbol, 'color': item.color, **look},
    }
  points |= {'mode': 'lines', 'line': {
      'color': item.color, 'dash': item.dash or 'solid', 'width': item.width,
  }}
  if item.errors is None:
    return points
  return points | {'mode': 'lines+markers', 'error_y': {
      'type': 'data', 'thickness': 1.5, 'array': _rounded(item.errors),
  }}


def _rounded(values: Iterable[float]) -> list[float]:
  """Returns values to five digits, more than a screen can show."""
  return [float(f'{value:.5g}') for value in values]


def _tooltip(panel: Panel, item: Line | Marks | Level) -> str:
  name = _text(item.name)
  if isinstance(item, Marks):
    return f'<b>{name}</b><br>%{{text}}<extra></extra>'
  # The page can switch the axis and its title from steps to epochs.
  x = (
      '%{xaxis.title.text} %{x:,.3~f}' if panel.over_steps else
      f'{_text(_short(panel.x_title))} %{{x:.4~g}}'
  )
  y = '%{y:.1%}' if panel.y_kind == 'share' else '%{y:.4~g}'
  return f'<b>{name}</b><br>{x}<br>{panel.y_title} {y}<extra></extra>'


def _text(text: str) -> str:
  """Escapes untrusted text, since plotly interprets tags and %{...}."""
  return escape(text, quote=False).replace('%', '&#37;')


def _short(title: str) -> str:
  """Returns the name of a field without its group."""
  return title.rsplit('.', 1)[-1]


def _layout(panel: Panel) -> go.Layout:
  axis = {'automargin': True, 'zeroline': False}
  x = axis | {'title': {'text': _text(panel.x_title)}, 'tickformat': ',~r'}
  if panel.x_log:
    x['type'] = 'log'
  if panel.x_ticks:
    x |= {'tickvals': panel.x_ticks, 'ticktext': list(map(str, panel.x_ticks))}
  y = axis | {
      'title': {'text': panel.y_title},
      'rangemode': 'tozero' if panel.from_zero else 'normal',
  }
  if panel.y_kind == 'share':
    y |= {
        'tickformat': '.3~p', 'autorangeoptions': {'clipmin': 0, 'clipmax': 1}
    }
  if panel.y_kind == 'multiple':
    y |= {
        'type': 'log', 'ticksuffix': '×', 'tickformat': '~g',
        'tickvals': [d * 10.0**e for e in range(-6, 9) for d in (1, 3)],
    }
  return go.Layout(
      template={}, autosize=True, showlegend=False, hovermode='closest',
      margin={'l': 8, 'r': 12, 't': 32, 'b': 8},
      paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, modebar={'bgcolor': CLEAR},
      xaxis=x, yaxis=y, meta={
          'steps': panel.over_steps, 'x': _text(_short(panel.x_title)),
          'y': panel.y_title, 'percent': panel.y_kind == 'share',
          'one': panel.one_run,
      },
  )
