"""The verdict of a report, in plain sentences."""

from collections import Counter
from collections.abc import Sequence
import statistics

from mocov3_jax.reports import data
from mocov3_jax.reports.data import Report, ReportedRun
from mocov3_jax.training import stability

NAMED = 3  # The most runs that are named; any others are only counted.
# In the order of the sentence. A report has no run that is 'absent'.
STATUSES = {
    'done': 'done', 'running': 'still running',
    'stopped': 'stopped before the end', 'diverged': 'diverged',
}
ALONE = {
    'done': 'The run is done.', 'running': 'The run is still going on.',
    'stopped': 'The run was stopped before its end.',
    'diverged': 'The run diverged.',
}


def verdict(report: Report) -> str:
  """Returns one paragraph: how the runs ended, and what was unstable."""
  return ' '.join(filter(None, (
      _endings(report), _accuracy(report), _below_first(report),
      _without_labels(report),
      _dips(report), _spikes(report), _failures(report),
  )))


def _endings(report: Report) -> str:
  runs = report.runs
  if len(runs) == 1:
    return ALONE[runs[0].record.status]
  found = Counter(run.record.status for run in runs)
  parts = [
      f'{found[status]} {text}' for status, text in STATUSES.items()
      if found[status]
  ]
  broken = [run for run in runs if run.record.status == 'diverged']
  which = f' ({_names(broken)})' if broken else ''  # These come last.
  return f'{len(runs)} runs: {", ".join(parts)}{which}.'


def _accuracy(report: Report) -> str:
  rows = [
      row for row in data.table(report)
      if 'knn/top1' in row and row['step']
  ]
  if not rows:
    return ''
  best = max(rows, key=lambda row: row['knn/top1'])
  last, first = percent(best['knn/top1']), percent(best['knn/top1_init'])
  if len(report.runs) == 1:
    return f'Its last kNN accuracy is {last}; at step 0 it was {first}.'
  if not data.comparable(report):
    return (
        'The runs are on different images, so their accuracies are not '
        'compared.'
    )
  return (
      f'The highest last kNN accuracy is {last}, of {best["run"]}; at step 0 '
      f'it was {first}.'
  )


def _below_first(report: Report) -> str:
  # Ending below the first accuracy is bad, even if no dip was found.
  rows = data.table(report)
  below = [
      run for run, row in zip(report.runs, rows, strict=True)
      if 'knn/top1' in row and row['knn/top1'] < row['knn/top1_init']
  ]
  if not below:
    return ''
  if len(report.runs) == 1:
    return 'That is less than the network had before training.'
  return f'Less than before training: {_names(below)}.'


def _without_labels(report: Report) -> str:
  """Says whether runs that have no kNN have learned, and how well."""
  runs = [
      (run, row) for run, row in zip(
          report.runs, data.table(report), strict=True
      )
      if data.KNN not in row and data.CHANCE in row
  ]
  if not runs:
    return ''
  not_learned = [
      run for run, row in runs
      if stability.is_stuck(row) or row['collapsed']
  ]
  if len(report.runs) > 1:
    but = f'; not {_names(not_learned)}' if not_learned else ''
    return (
        f'Without labels, {len(runs) - len(not_learned)} of {len(runs)} have '
        f'learned to tell images apart{but}.'
    )
  (run, row), = runs
  found = [
      f'There are no labels. The network has {"not " if not_learned else ""}'
      f'learned to tell images apart: the loss is {row[data.LOSS]:.3g}, at '
      f'chance {row[data.CHANCE]:.3g}'
  ]
  if data.CONTRAST in row:
    guess = 1 / run.record.config['batch_size']
    found.append(
        f'{percent(row[data.CONTRAST])} of the queries find their own key '
        f'(by guessing {percent(guess)})'
    )
  for name, metric, better in (
      ('alignment', data.ALIGNMENT, 'low is good'),
      ('uniformity', data.UNIFORMITY, 'low is good'),
      ('effective rank', data.RANK, 'it is high in a random network, and is '
       'useful only to compare trained ones'),
  ):
    values = run.curve(metric)[1]
    if len(values):
      found.append(
          f'{name} {values[-1]:.3g}, at step 0 {values[0] + 0.0:.3g} ({better})'
      )
  return '; '.join(found) + '.'


def _dips(report: Report) -> str:
  runs = [run for run in report.runs if len(run.curve(data.KNN)[0])]
  if not runs:
    return ''
  return ' '.join(filter(None, (_dipped(runs), _fallen(runs)))) or (
      'Nowhere does the kNN accuracy dip.'
  )


def deepest(run: ReportedRun) -> float:
  """Returns the depth of the deepest dip or fall of a run; 0 without any."""
  found = run.analysis
  falls = [*found.dips] + ([found.fall] if found.fall is not None else [])
  return max((dip.depth for dip in falls), default=0.0)


def _fallen(runs: Sequence[ReportedRun]) -> str:
  fallen = [run for run in runs if run.analysis.fall is not None]
  if not fallen:
    return ''
  worst = max(fallen, key=lambda run: run.analysis.fall.depth)
  fall = worst.analysis.fall
  how = f'by {points(fall.depth)} from step {fall.start:,}'
  if len(runs) == 1:
    return f'The kNN accuracy falls {how} and does not recover.'
  return (
      f'In {len(fallen)} of {len(runs)} runs it falls and does not recover; '
      f'the largest fall is {how}, in {worst.name}.'
  )


def _dipped(runs: Sequence[ReportedRun]) -> str:
  dipped = [run for run in runs if run.analysis.dips]
  if not dipped:
    return ''
  worst, lowest = max(
      ((run, dip) for run in dipped for dip in run.analysis.dips),
      key=lambda pair: pair[1].depth,
  )
  where = f'{points(lowest.depth)} at step {lowest.low:,}'
  if len(runs) == 1:
    number = len(worst.analysis.dips)
    return f'{count(number, "dip")} in kNN accuracy, the deepest of {where}.'
  have = 'has' if len(dipped) == 1 else 'have'
  return (
      f'{len(dipped)} of {len(runs)} {have} dips in kNN accuracy; the deepest '
      f'is of {where}, in {worst.name}.'
  )


def _spikes(report: Report) -> str:
  total = data.counts(report)['spikes']
  if not total:
    return 'No gradient spikes.'
  leads = [run.analysis.lead for run in report.runs]
  events = sum(lead.events for lead in leads)
  led: Counter[str] = Counter()
  for lead in leads:
    if lead.first is not None:
      led[lead.first] += lead.led
  text = f'{count(total, "gradient spike")}'
  if not events:
    return f'{text}, none of them in several layers together.'
  (layer, first), *_ = led.most_common(1) or [(None, 0)]
  where = count(events, 'event')
  if layer is None or 2 * first <= events:
    return f'{text}; no layer is first in most of {where} over several layers.'
  text += (
      f'; {first} of {where} over several layers begin in the '
      f'{data.layer_name(layer)}'
  )
  lag = _median_lag(report.runs)
  if layer == data.FIRST and lag is not None:
    text += f', {count(lag, "step")} before the last block (median)'
  return text + '.'


def _median_lag(runs: Sequence[ReportedRun]) -> float | None:
  """Returns by how many steps the last block follows the patch projection.

  This is the median over the runs in which the patch projection leads; None if
  there are none.
  """
  lags = [
      run.analysis.lead.lags[data.LAST] for run in runs
      if run.analysis.lead.first == data.FIRST
      and data.LAST in run.analysis.lead.lags
  ]
  return statistics.median(lags) if lags else None


def _failures(report: Report) -> str:
  parts = []
  collapsed = [run for run in report.runs if run.analysis.collapsed is not None]
  stuck = [run for run in report.runs if run.analysis.stuck is not None]
  if collapsed:
    parts.append(f'Features have collapsed in {_names(collapsed)}.')
  if stuck:
    parts.append(f'The loss is no better than chance in {_names(stuck)}.')
  return ' '.join(parts)


def _names(runs: Sequence[ReportedRun]) -> str:
  names = [run.name for run in runs[:NAMED]]
  more = len(runs) - NAMED
  return _listed(names + ([f'{more} more'] if more > 0 else []))


def _listed(parts: Sequence[str]) -> str:
  *before, last = parts
  return f'{", ".join(before)} and {last}' if before else last


def count(number: float, noun: str) -> str:
  """Returns a number of things: '1 spike', '2,000 spikes', '2.5 steps'."""
  return f'{number:,g} {noun}{"" if number == 1 else "s"}'


def percent(share: float) -> str:
  """Returns a share from 0 to 1 in percent."""
  return f'{100 * share:.1f}\u00a0%'  # No line break here.


def points(share: float) -> str:
  """Returns a difference of two shares in percentage points."""
  return f'{100 * share:.1f} points'
