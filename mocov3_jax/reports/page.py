"""The report as one HTML page that opens from disk and loads nothing."""

import base64
import gzip
from html import escape
import json
import pathlib
import string
from typing import Any

import plotly
from plotly.offline import get_plotlyjs

from mocov3_jax.reports import charts as report_charts
from mocov3_jax.reports import data as data_lib
from mocov3_jax.reports import tables as report_tables
from mocov3_jax.reports import thinning as report_curves
from mocov3_jax.reports import verdict
from mocov3_jax.reports.data import Report
from mocov3_jax.training import events

HERE = pathlib.Path(__file__).parent
# More runs than this have no legend at each chart; the table has the colours.
LEGEND = 12

# name of a chart: (heading, what to see in it).
TEXTS = {
    'sweep': (
        'Accuracy against {field}',
        'Points are runs, lines the mean over the seeds of one setting, bars '
        'one standard deviation. Open points are not done, crosses diverged; '
        'neither is in the mean.',
    ),
    'knn': (
        'kNN accuracy',
        'Share of held-out images that their nearest neighbours classify '
        'right. Step 0 is the random network. A triangle marks the low of a '
        'dip.',
    ),
    'rank': (
        'Effective rank of the features',
        'What is watched without labels: over how many directions features '
        'spread. Near 1, they have collapsed.',
    ),
    'loss': (
        'Loss', 'Of each step. Dotted: a network that tells nothing apart.'
    ),
    'spread': (
        'Spread of the features',
        '1 where features point everywhere alike, 0 where all are the same '
        '(collapse).',
    ),
    'gradients': (
        'Gradients by layer',
        'The largest gradient of a layer, as a multiple of its own running '
        'median. A cross marks a spike. A frozen layer has no gradient, so no '
        'curve.',
    ),
    'lr': ('Learning rate', 'Of each step.'),
    'rate': (
        'Throughput',
        f'Images a second, median of {report_curves.SMOOTH} steps; evaluation '
        'and saving left out.',
    ),
    'mfu': (
        'Model FLOP utilisation',
        'Operations the model needs, as a share of what the chips can do.',
    ),
}
SMALL = ('loss', 'spread'), ('lr', 'rate', 'mfu')

HELP = (
    (
        'Dip',
        f'The kNN accuracy falls by {100 * events.DIP_DEPTH:g} points or '
        'more, and by far more than its noise. It often comes back, but is '
        'seldom quite made good at the end.',
    ),
    (
        'Spike',
        f'The largest gradient of a layer is {events.SPIKE_RATIO:g} times '
        'its running median or more, and far outside its noise. The paper '
        'finds that a spike causes the dip after it.',
    ),
    (
        'Event, leader',
        f'Spikes of several layers within {events.MAX_LAG} steps are one '
        'event; the leader is the layer that is first in most. The paper finds '
        'the patch projection there: freezing it (model.patch_embed=frozen) '
        'helps.',
    ),
    (
        'Collapse',
        'All images have the same features: the spread is (nearly) 0 up to '
        'the end of the run.',
    ),
    (
        'Diverged, stopped',
        'A diverged run ended because a number stopped being finite; a '
        'stopped one can be continued by the same command.',
    ),
)


def page(report: Report, date: str) -> str:
  """The whole page.

  Args:
    report: what to show.
    date: of the report, as text.
  """
  charts = report_charts.charts(report)
  number = verdict.count(len(report.shown), 'run')
  library = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
  return string.Template(_static('html')).substitute(
      title='Training report', subtitle=f'{number}, {date}',
      verdict=escape(verdict.verdict(report)), body=_body(report, charts),
      style=_static('css'), script=_static('js'), charts=embedded(charts),
      library=base64.b64encode(library).decode(),
      plotly=plotly.__version__,
  )


def _static(kind: str) -> str:
  return (HERE / f'page.{kind}').read_text()


def embedded(value: Any) -> str:
  """JSON that is safe inside a script element, whatever its strings hold."""
  text = json.dumps(value, allow_nan=False, separators=(',', ':'))
  for character in '<>&':  # In JSON, they stand in strings alone.
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text


def _body(report: Report, charts: dict[str, Any]) -> str:
  parts = [report_tables.sweep(report)]
  if 'sweep' in charts:
    parts.append(_chart('sweep', report))
  parts += [report_tables.runs(report), _unit(report)]
  monitors = report_charts.monitors(report)
  parts += [_chart(name, report) for name in monitors]
  if 'knn' not in monitors:
    parts.append(
        '<p class="about">No kNN accuracy was logged: there are no labels, or '
        'the runs have just begun.</p>'
    )
  parts.append(_small(SMALL[0], report, charts))
  if 'gradients' in charts:
    parts.append(_chart('gradients', report))
  parts += [_small(SMALL[1], report, charts), report_tables.configs(report)]
  help_ = ''.join(
      f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in HELP
  )
  parts.append(
      '<h2>How to read this</h2><details><summary>What dip, spike and '
      f'collapse mean</summary><dl>{help_}</dl></details>'
  )
  return '\n'.join(filter(None, parts))




def _chart(name: str, report: Report) -> str:
  heading, about = TEXTS[name]
  if name == 'sweep':
    heading = heading.format(field=data_lib.varied(report))
  heading = escape(heading)
  return (
      f'<section><h2>{heading}</h2><p class="about">{escape(about)}</p>'
      f'{_legend(name, report)}<div class="plot" id="plot-{name}" '
      f'data-chart="{name}" tabindex="0" role="application" '
      f'aria-label="Chart: {heading}" aria-describedby="keys"></div></section>'
  )


def _legend(name: str, report: Report) -> str:
  if name == 'gradients':
    return _one_run(report) + _layers()
  if name == 'sweep':
    return _settings(report)
  if name not in report_charts.MONITORS or not 1 < len(report.shown) <= LEGEND:
    return ''
  items = ''.join(
      f'<li><label class="run" for="run-{number}">'
      f'{report_tables.swatch(item)}</label></li>'
      for number, item in enumerate(report.shown)
  )
  return f'<ul class="legend">{items}</ul>'


def _one_run(report: Report) -> str:
  spikes = [
      sum(map(len, item.analysis.spikes.values())) for item in report.shown
  ]
  # The one with the most spikes, or the deepest dip, is worth a look first.
  chosen = max(range(len(spikes)), key=lambda number: (
      spikes[number],
      max((d.depth for d in report.shown[number].analysis.dips), default=0.0),
  ))
  options = ''.join(
      f'<option value="{number}"{" selected" if number == chosen else ""}>'
      f'{escape(item.name)} ({verdict.count(count, "spike")})</option>'
      for number, (item, count) in enumerate(
          zip(report.shown, spikes, strict=True)
      )
  )
  return (
      '<div class="controls"><label for="one-run">Run</label>'
      f'<select id="one-run">{options}</select></div>'
  )


def _layers() -> str:
  styles = {
      'patch projection': report_charts.FIRST_COLOR,
      'last block': report_charts.LAST_COLOR,
      'other layers': report_charts.OTHER_LAYERS[0],
  }
  return _colors(styles)


def _settings(report: Report) -> str:
  styles = report_charts.settings(report)
  return _colors(styles) if len(styles) > 1 else ''


def _colors(styles: dict[str, str]) -> str:
  items = ''.join(
      f'<li class="run">{report_tables.stroke(color)}'
      f'<span>{escape(name)}</span></li>'
      for name, color in styles.items()
  )
  return f'<ul class="legend">{items}</ul>'


def _small(
    names: tuple[str, ...], report: Report, charts: dict[str, Any]
) -> str:
  found = ''.join(_chart(name, report) for name in names if name in charts)
  return f'<div class="small">{found}</div>' if found else ''


def _unit(report: Report) -> str:
  if any(item.steps_per_epoch is None for item in report.shown):
    return ''
  return (
      '<div class="controls"><label>Horizontal axis of the charts below '
      '<select id="unit"><option value="step">steps</option>'
      '<option value="epoch">epochs</option></select></label></div>'
  )
