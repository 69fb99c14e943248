"""The panels of a report as plain data; `charts` and `figure` draw them.

A panel is described once, here, so that the page and the figure cannot
disagree about what they show.
"""

from collections.abc import Callable, Container, Sequence
import dataclasses
import itertools

import numpy as np

from mocov3_jax.reports import data, thinning, verdict
from mocov3_jax.reports.data import Report
from mocov3_jax.reports.thinning import Curve
from mocov3_jax.runs import table
from mocov3_jax.training import events

LAYER_COLORS = {data.FIRST: '#0072b2', data.LAST: '#d55e00'}
# Greys that are legible on both white and dark grey.
OTHER_LAYERS = ('#8c8c8c', '#a3a3a3', '#757575')
# With more values than this, the back end chooses the ticks of an axis.
MOST_TICKS = 12
# The panels that monitor a run: with labels, and without.
MONITORS = ('knn', 'rank')


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve.

  Attributes:
    runs: the runs that it shows, as indices into the runs of the report.
    x, y: its points, [n] each.
    name: its name in a tooltip.
    color: as '#rrggbb'.
    dash: lengths of dashes and gaps, from data.DASHES; '' is solid.
    width: in pixels of the page.
    errors: half the length of each point's error bar, [n]; None for a line
      without bars and without marked points.
  """

  runs: Sequence[int]
  x: Sequence[float]
  y: Sequence[float]
  name: str
  color: str
  dash: str = ''
  width: float = 1.8
  errors: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Marks:
  """Single points, each with a text of its own.

  Attributes:
    runs, x, y, name, color: the same as in a Line.
    texts: the text in the tooltip of each point.
    symbol: 'triangle-down', 'x', 'circle' or 'circle-open'.
    faint: whether the points are small and half transparent.
  """

  runs: Sequence[int]
  x: Sequence[float]
  y: Sequence[float]
  texts: Sequence[str]
  name: str
  color: str
  symbol: str
  faint: bool = False


@dataclasses.dataclass(frozen=True)
class Level:
  """A horizontal line to compare curves with: the value at chance.

  Attributes:
    runs: the runs that have this level, as indices into the report's runs.
    value: the level.
    end: the last step of these runs.
    name: its name in a tooltip.
  """

  runs: Sequence[int]
  value: float
  end: int
  name: str


Item = Line | Marks | Level


@dataclasses.dataclass(frozen=True)
class Panel:
  """A chart of a report, whichever back end draws it.

  Attributes:
    heading: the title on the page.
    about: an explanation for the reader of the page.
    y_title: the title of the vertical axis.
    items: what is drawn, in this order; nothing if nothing was logged.
    caption: the title in the figure; '' if the figure leaves the panel out.
    y_kind: 'number', 'share' (from 0 to 1, shown in percent) or 'multiple'
      (on a logarithmic axis).
    from_zero: whether the vertical axis begins at 0.
    x_title: 'step', or the field of the config that the panel is drawn over.
    x_log: whether the horizontal axis is logarithmic.
    x_ticks: the values with ticks; if empty, the back end chooses them.
    one_run: whether the page shows the items of one run at a time.
    legend: colours by name, if they stand for something other than runs.
  """

  heading: str
  about: str
  y_title: str
  items: Sequence[Item]
  caption: str = ''
  y_kind: str = 'number'
  from_zero: bool = False
  x_title: str = 'step'
  x_log: bool = False
  x_ticks: Sequence[float] = ()
  one_run: bool = False
  legend: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def over_steps(self) -> bool:
    """Whether the horizontal axis shows the steps of the runs."""
    return self.x_title == 'step'


def knn(report: Report, limit: int) -> Panel:
  """Returns the panel of the kNN accuracy and its dips."""
  items = _lines(report, limit, data.KNN)
  for number, run in enumerate(report.runs):
    dips = [*run.analysis.dips]
    if run.analysis.fall is not None:
      dips.append(run.analysis.fall)
    lows = [dip.low for dip in dips]
    items += _marks(
        number, run.curve(data.KNN), lows, [_describe(dip) for dip in dips],
        f'{run.name}: dips', run.color, 'triangle-down',
    )
  return Panel(
      heading='kNN accuracy',
      about='Share of held-out images that their nearest neighbours classify '
      'correctly. Step 0 is the network before training. A triangle marks the '
      'lowest point of a dip, or of a fall without recovery.',
      caption='kNN accuracy (triangles: dips and falls)',
      y_title='kNN accuracy', y_kind='share',
      items=items + _levels(
          report, data.KNN, data.chances(report),
          lambda level: f'chance, {verdict.percent(level)}',
      ),
  )


def _describe(dip: events.Dip) -> str:
  depth = verdict.points(dip.depth)
  if dip.width is None:
    return f'fall of {depth} from step {dip.start:,}, without recovery'
  return (
      f'dip of {depth} at step {dip.low:,}, recovered '
      f'{verdict.count(dip.width, "step")} after its start'
  )


def effective_rank(report: Report, limit: int) -> Panel:
  """Returns the panel of the effective rank of the features."""
  return Panel(
      heading='Effective rank of the features',
      about='Monitored when there are no labels: over how many directions the '
      'features spread. Near 1, they have collapsed.',
      caption='effective rank of the features', y_title='effective rank',
      items=_lines(report, limit, data.RANK),
  )


def loss(report: Report, limit: int) -> Panel:
  """Returns the panel of the loss, with its value at chance."""
  chances = [run.curve('train/loss_chance')[1] for run in report.runs]
  return Panel(
      heading='Loss',
      about='The loss of each step. Dotted: the loss of a network that cannot '
      'tell images apart.',
      caption='loss', y_title='loss',
      items=_lines(report, limit, 'train/loss', width=1.2) + _levels(
          report, 'train/loss',
          [float(those[-1]) if len(those) else None for those in chances],
          lambda level: f'chance, {level:.2f}',
      ),
  )


def spread(report: Report, limit: int) -> Panel:
  """Returns the panel of the standard deviation of the features."""
  return Panel(
      heading='Spread of the features',
      about='1 if the features point equally in all directions, 0 if all are '
      'the same (collapse).',
      y_title='spread of features',
      items=_lines(report, limit, 'train/feature_std', width=1.2),
  )


def gradients(
    report: Report, limit: int, layers: Container[str] | None = None
) -> Panel:
  """Returns the panel of the gradients of each run's layers, with spikes.

  Args:
    report: the runs.
    limit: the most points of a curve.
    layers: the names of the layers to show; None shows all.
  """
  items = _by_layer(
      report, limit, 'grad_max', layers,
      lambda steps, values: (steps, thinning.relative(values)),
  )
  return Panel(
      heading='Gradients by layer',
      about='The largest gradient of a layer, as a multiple of its own running '
      'median. A cross marks a spike. A frozen layer has no gradient, so no '
      'curve.',
      caption='gradient / running median (crosses: spikes)',
      y_title='gradient / running median', y_kind='multiple', one_run=True,
      items=items, legend=_layer_legend(),
  )


def updates(report: Report, limit: int) -> Panel:
  """Returns the panel of AdamW's updates by layer, with spikes and dips."""
  items = _by_layer(report, limit, 'update_rms', None, lambda *curve: curve)
  for number, run in enumerate(report.runs):
    curves = [run.curve(f'update_rms/{layer}') for layer in run.layers]
    curves = [curve for curve in curves if len(curve[0])]
    dips = run.analysis.dips
    if curves:
      items += _marks(
          number, curves[0], [dip.low for dip in dips],
          list(map(_describe, dips)), 'dips of kNN', run.color, 'triangle-down',
      )
  return Panel(
      heading='Size of the update by layer',
      about='The root mean square of a layer\'s gradients divided by AdamW\'s '
      'memory of them (RMS_t of Wortsman et al. 2023). Without momentum, this '
      'would be the update before the learning rate. At 1 or below, gradients '
      'have their usual size; far above 1, they are much larger than AdamW '
      'remembers. Crosses mark spikes of the gradient, triangles the lowest '
      'points of dips of kNN.',
      y_title='RMS of the update', y_kind='multiple', one_run=True,
      items=items, legend=_layer_legend(),
  )


def _layer_legend() -> dict[str, str]:
  return {
      data.LAYERS[layer]: color for layer, color in LAYER_COLORS.items()
  } | {'other layers': OTHER_LAYERS[0]}


def _by_layer(
    report: Report, limit: int, metric: str, layers: Container[str] | None,
    change: Callable[[np.ndarray, np.ndarray], Curve],
) -> list[Item]:
  """Returns a line for each layer of each run, and the layer's spikes on it.

  Args:
    report: the runs.
    limit: the most points of a curve.
    metric: the metric that is logged for each layer, without the layer's name.
    layers: the names of the layers to show; None shows all.
    change: transforms a curve before it is thinned.
  """
  items: list[Item] = []
  for number, run in enumerate(report.runs):
    greys = itertools.cycle(OTHER_LAYERS)
    for layer in run.layers:
      steps, values = run.curve(f'{metric}/{layer}')
      steps, values = steps[values > 0], values[values > 0]
      if not len(values) or layers is not None and layer not in layers:
        continue  # A frozen layer has only zeros.
      name, main = data.layer_name(layer), layer in LAYER_COLORS
      color = LAYER_COLORS[layer] if main else next(greys)
      curve = change(steps, values)
      x, y = thinning.thin(*curve, limit)
      items.append(Line(
          [number], x.tolist(), y.tolist(), name, color,
          width=1.5 if main else 1.0,
      ))
      highest = sorted(run.analysis.spikes[layer], key=lambda s: -s.ratio)
      spikes = sorted(highest[:limit // 2])
      items += _marks(
          number, curve, [spike.peak for spike in spikes], [
              f'spike of {spike.ratio:.3g} times the median, from step '
              f'{spike.onset:,} to {spike.end:,}' for spike in spikes
          ], f'{name}: spikes', color, 'x',
      )
  return items


def learning_rate(report: Report, limit: int) -> Panel:
  """Returns the panel of the learning rate."""
  return Panel(
      heading='Learning rate', about='The learning rate of each step.',
      y_title='learning rate',
      items=_lines(report, limit, 'train/lr'),
  )


def throughput(report: Report, limit: int) -> Panel:
  """Returns the panel of the images per second."""
  return Panel(
      heading='Throughput',
      about=f'Images a second, median of {thinning.SMOOTH} steps; evaluation '
      'and saving left out.',
      y_title='images per second', from_zero=True,
      items=_lines(report, limit, data.RATE, change=_smoothed),
  )


def mfu(report: Report, limit: int) -> Panel:
  """Returns the panel of the model FLOP utilisation."""
  return Panel(
      heading='Model FLOP utilisation',
      about='Operations the model needs, as a share of what the chips can do.',
      y_title='MFU', y_kind='share', from_zero=True,
      items=_lines(report, limit, data.MFU, change=_smoothed),
  )


def sweep(report: Report, limit: int) -> Panel:
  """Returns the panel of last accuracies over the field that varies most.

  Args:
    report: the runs.
    limit: not used, since a sweep has one point per run.
  """
  field = data.varied(report)
  if field is None:
    return Panel('Accuracy', 'No one field varies most.', 'kNN accuracy', [])
  values = sorted(set(report.fields[field]))
  settings = data.settings(report)
  colors = {
      label: data.COLORS[place % len(data.COLORS)]
      for place, label in enumerate(settings)
  }
  items: list[Item] = []
  for label, numbers in settings.items():
    for number in numbers:
      items += _last(report, number, field, label, colors[label])
    items += _mean(report, numbers, field, label, colors[label])
  return Panel(
      heading=f'Accuracy against {field}',
      about='Points are runs, lines the mean over the seeds of one setting, '
      'bars one standard deviation. Open points are runs that are not done, '
      'crosses runs that diverged; neither is included in the mean.',
      caption='last kNN accuracy, mean and sd',
      y_title='last kNN accuracy', y_kind='share', x_title=field,
      x_log=0 < 10 * values[0] < values[-1],
      x_ticks=values if len(values) <= MOST_TICKS else (),
      items=items, legend=colors if len(colors) > 1 else {},
  )


def _last(
    report: Report, number: int, field: str, label: str, color: str
) -> list[Item]:
  """Returns the point of a run, so that its checkbox can hide it.

  Returns nothing for a run without a kNN accuracy.
  """
  run = report.runs[number]
  values = run.curve(data.KNN)[1]
  if not len(values):
    return []
  symbols = {'diverged': 'x', 'done': 'circle'}
  status, last = run.record.status, float(values[-1])
  text = f'{label or "run"}, {status}: {verdict.percent(last)}'
  return [Marks(
      [number], [run.record.config[field]], [last], [text], run.name, color,
      symbols[status] if status in symbols else 'circle-open', faint=True,
  )]


def _mean(
    report: Report, numbers: list[int], field: str, label: str, color: str
) -> list[Item]:
  """Returns the means over the seeds as a line, if any run is done."""
  metric, sd = f'{data.KNN}_mean', f'{data.KNN}_sd'
  rows = table.aggregate(
      [report.runs[number].record for number in numbers], report.grid
  )
  rows = [row for row in rows if metric in row]
  rows.sort(key=lambda row: row[field])
  if not rows:
    return []
  return [Line(
      numbers, [row[field] for row in rows], [row[metric] for row in rows],
      f'{label or "all runs"}: mean', color, width=2,
      errors=[row[sd] or 0.0 for row in rows],
  )]


# In the order in which the page's data has them.
BUILDERS: dict[str, Callable[[Report, int], Panel]] = {
    'sweep': sweep, 'knn': knn, 'rank': effective_rank, 'loss': loss,
    'spread': spread, 'updates': updates, 'gradients': gradients,
    'lr': learning_rate,
    'rate': throughput, 'mfu': mfu,
}


def _lines(
    report: Report, limit: int, metric: str, width: float = 1.8,
    change: Callable[[np.ndarray, np.ndarray], Curve] = lambda *curve: curve,
) -> list[Item]:
  """Returns a line for each run that has logged a metric.

  Args:
    report: the runs.
    limit: the most points of a line.
    metric: the metric.
    width: the width of the lines.
    change: transforms a curve before it is thinned.
  """
  lines: list[Item] = []
  for number, run in enumerate(report.runs):
    steps, values = change(*run.curve(metric))
    if len(values):
      x, y = thinning.thin(steps, values, limit)
      lines.append(Line(
          [number], x.tolist(), y.tolist(), run.name, run.color, run.dash, width
      ))
  return lines


def _smoothed(steps: np.ndarray, values: np.ndarray) -> Curve:
  # The first step, which compiles, is logged as 0.
  return thinning.smoothed(steps[values > 0], values[values > 0])


def _marks(
    number: int, curve: Curve, steps: list[int], texts: list[str], name: str,
    color: str, symbol: str,
) -> list[Item]:
  """Returns marks at those of the steps that a run's curve covers."""
  kept = [
      (step, text) for step, text in zip(steps, texts, strict=True)
      if len(curve[0]) and curve[0][0] <= step <= curve[0][-1]
  ]
  if not kept:
    return []
  steps, texts = map(list, zip(*kept, strict=True))
  values = thinning.at(curve, steps)
  return [Marks([number], steps, values, texts, name, color, symbol)]


def _levels(
    report: Report, metric: str, levels: Sequence[float | None],
    say: Callable[[float], str],
) -> list[Item]:
  """Returns the distinct levels of the runs that have logged the metric."""
  found: dict[float, list[int]] = {}
  for number, (run, level) in enumerate(zip(report.runs, levels, strict=True)):
    if level is not None and len(run.curve(metric)[0]):
      found.setdefault(level, []).append(number)
  end = lambda number: int(report.runs[number].curve(metric)[0][-1])
  return [
      Level(numbers, level, max(map(end, numbers)), say(level))
      for level, numbers in sorted(found.items())
  ]
