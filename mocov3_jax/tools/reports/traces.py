"""Curves, marks and axes of the report's charts, as plotly's JSON values.

The page's script knows which runs a curve is of, and how to say its numbers,
by the `meta` of the curve and of the layout.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from mocov3_jax.tools.reports import curves as report_curves
from mocov3_jax.tools.reports.data import Shown

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
