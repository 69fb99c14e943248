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

from mocov3_jax.reports import charts, panels, tables, thinning, verdict
from mocov3_jax.reports.data import Report
from mocov3_jax.reports.panels import Panel
from mocov3_jax.training import events

HERE = pathlib.Path(__file__).parent
# With more runs than this, charts have no legends; the table has the colours.
LEGEND = 12

# Names of panels that stand side by side.
SMALL = ('loss', 'spread'), ('lr', 'rate', 'mfu')

HELP = (
    (
        'Dip',
        f'The kNN accuracy falls by {100 * events.DIP_DEPTH:g} points or '
        'more, and by far more than its noise. It often recovers, but rarely '
        'completely by the end of the run.',
    ),
    (
        'Spike',
        'The largest gradient of a layer rises far above its past values: to '
        f'{events.SPIKE_RATIO:g} times its running median or more, and beyond '
        'its noise. The paper '
        'finds that a spike causes the dip after it.',
    ),
    (
        'Event, leader',
        f'Spikes of several layers within {events.MAX_LAG} steps are one '
        'event; the leader is the layer that spikes first in most events. In '
        'the paper, that is the patch projection: freezing it '
        '(model.patch_embed=frozen) helps.',
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
  """Returns the whole page.

  Args:
    report: what to show.
    date: the date of the report, as text.
  """
  # Besides those of its layers, a run has at most six curves.
  limit = thinning.points_per_curve(
      sum(6 + run.layer_curves for run in report.runs)
  )
  built = {
      name: panel for name, build in panels.BUILDERS.items()
      if (panel := build(report, limit)).items
  }
  drawn = {
      name: charts.chart(panel, report.runs) for name, panel in built.items()
  }
  number = verdict.count(len(report.runs), 'run')
  library = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
  return string.Template(_static('html')).substitute(
      title='Training report', subtitle=f'{number}, {date}',
      verdict=escape(verdict.verdict(report)), body=_body(report, built),
      style=_static('css'), script=_static('js'), charts=embedded(drawn),
      library=base64.b64encode(library).decode(),
      plotly=plotly.__version__,
  )


def _static(kind: str) -> str:
  return (HERE / f'page.{kind}').read_text()


def embedded(value: Any) -> str:
  """Returns JSON that is safe inside a script element, whatever it holds."""
  text = json.dumps(value, allow_nan=False, separators=(',', ':'))
  for character in '<>&':  # In JSON, they occur only within strings.
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text


def _body(report: Report, built: dict[str, Panel]) -> str:
  first = next((name for name, panel in built.items() if panel.one_run), '')
  sections = {
      name: _section(name, panel, report, name == first)
      for name, panel in built.items()
  }
  join = lambda *names: '\n'.join(
      sections[name] for name in names if name in sections
  )
  small = [join(*names) for names in SMALL]
  small = [f'<div class="small">{text}</div>' if text else '' for text in small]
  nothing = '' if 'knn' in built else (
      '<p class="about">No kNN accuracy was logged: there are no labels, or '
      'the runs have just begun.</p>'
  )
  terms = ''.join(
      f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in HELP
  )
  help_ = (
      '<h2>How to read this</h2><details><summary>What dip, spike and '
      f'collapse mean</summary><dl>{terms}</dl></details>'
  )
  return '\n'.join(filter(None, [
      tables.sweep(report), join('sweep'), tables.runs(report), _unit(report),
      join(*panels.MONITORS), nothing, small[0], join('updates', 'gradients'),
      small[1], tables.configs(report), help_,
  ]))


def _section(name: str, panel: Panel, report: Report, first: bool) -> str:
  heading = escape(panel.heading)
  return (
      f'<section><h2>{heading}</h2><p class="about">{escape(panel.about)}</p>'
      f'{_legend(name, panel, report, first)}<div class="plot" '
      f'id="plot-{name}" data-chart="{name}" tabindex="0" role="application" '
      f'aria-label="Chart: {heading}" aria-describedby="keys"></div></section>'
  )


def _legend(name: str, panel: Panel, report: Report, first: bool) -> str:
  items = [
      f'<li class="run">{tables.stroke(color)}<span>{escape(text)}</span></li>'
      for text, color in panel.legend.items()
  ]
  if name in panels.MONITORS and 1 < len(report.runs) <= LEGEND:
    items = [
        f'<li><label class="run" for="run-{number}">{tables.swatch(run)}'
        '</label></li>' for number, run in enumerate(report.runs)
    ]
  # All charts of one run at a time share one chooser, at the first of them.
  chooser = _one_run(report) if first else ''
  return chooser + (
      f'<ul class="legend">{"".join(items)}</ul>' if items else ''
  )


def _one_run(report: Report) -> str:
  spikes = [
      sum(map(len, run.analysis.spikes.values())) for run in report.runs
  ]
  # Start with the run with the most spikes; the deepest dip breaks ties.
  chosen = max(range(len(spikes)), key=lambda number: (
      spikes[number],
      verdict.deepest(report.runs[number]),
  ))
  options = ''.join(
      f'<option value="{number}"{" selected" if number == chosen else ""}>'
      f'{escape(run.name)} ({verdict.count(count, "spike")})</option>'
      for number, (run, count) in enumerate(
          zip(report.runs, spikes, strict=True)
      )
  )
  return (
      '<div class="controls"><label for="one-run">Run</label>'
      f'<select id="one-run">{options}</select></div>'
  )


def _unit(report: Report) -> str:
  if any(run.steps_per_epoch is None for run in report.runs):
    return ''
  return (
      '<div class="controls"><label>Horizontal axis of the charts below '
      '<select id="unit"><option value="step">steps</option>'
      '<option value="epoch">epochs</option></select></label></div>'
  )
