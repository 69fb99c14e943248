"""Finds what went wrong in a run from its metrics, live or afterwards.

`analyse` reads the rows of a metrics.jsonl. It finds the instabilities of the
paper's section 4 (see `events`), and whether the run collapsed, got stuck or
diverged. `Watch` warns of the same while the run goes on.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math

import numpy as np

from mocov3_jax.training import events
from mocov3_jax.training.events import Dip, Lead, Spike, dips, lead, spikes

Rows = Sequence[Mapping[str, float]]
NOTHING = np.empty(0, np.int64), np.empty(0)

GRADIENTS = 'grad_max/'  # Prefix of the metrics to search for spikes.
FIRST_LAYER = 'grad_max/patch_embed'

# Below this train/feature_std, the features are collapsed. It is the spacing of
# bfloat16 numbers below 1: in that dtype, such features no longer tell images
# apart. A higher bound would be wrong, because images that look alike have
# features that are alike (docs/what-normal-looks-like.md).
COLLAPSED_STD = 2.0**-8
# Tolerance, as a fraction of the chance level, within which a loss counts as
# equal to that of equal embeddings, or as not below chance.
SAME_LOSS = 0.01
# How many consecutive logged rows a failure must last: a network may recover
# from a shorter one.
LASTING_ROWS = 20
# A loss at chance for this many steps is not just a slow start: the digits need
# 20. In shorter runs the limit is a third of the run.
STUCK_STEPS = 1000

# Largest distance of rows, in steps, that resolves a lag of 20 (paper Fig. 4).
COARSEST = 5
# Steps for which Watch does not repeat a warning; one event spans fewer.
SILENCE = 200
# How many consecutive kNN values must be below the first one for a warning.
BELOW = 3

# One more than in `analyse`, because the test is repeated at every evaluation.
LIVE_DIP_SIGMAS = events.DIP_SIGMAS + 1

CALMER = 'a lower optimizer.lr_per_256 or a longer schedule.warmup_epochs'
# ResNets and convolutional stems have no projection to freeze (paper s4.2).
FREEZE = 'model.patch_embed=frozen (where that is a linear projection), '
# The bound of StableAdamW (arXiv 2304.13013); docs/study.md tries it.
BOUND = 'optimizer.update_clip=1, '
# For fresh heads on a trained backbone (configs/continue.py).
WARM = 'a longer init.freeze_backbone_epochs, '
APART = (
    'BatchNorm in the heads, a predictor (BYOL), objective.momentum near 1, '
    'a lower learning rate'
)
LEARN = 'another learning rate, a longer warm-up'


def all_series(
    rows: Iterable[Mapping[str, float]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns steps (int64 [n]) and finite values (float64 [n]) by metric."""
  found: dict[str, tuple[list[int], list[float]]] = {}
  for row in rows:
    for name, value in row.items():
      if math.isfinite(value):
        steps, values = found.setdefault(name, ([], []))
        steps.append(row['step'])
        values.append(value)
  return {
      name: (np.asarray(steps, np.int64), np.asarray(values, np.float64))
      for name, (steps, values) in found.items()
  }


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and values of one metric; empty if it was not logged."""
  own = [
      {'step': row['step'], name: row[name]} for row in rows if name in row
  ]
  return all_series(own).setdefault(name, NOTHING)


def is_collapsed(row: Mapping[str, float]) -> bool:
  """Returns whether all images have the same features or the same embeddings.

  The embeddings can collapse while the features do not: in BYOL, the heads can
  do so alone, and the loss shows it. A contrastive loss is then at chance: see
  `is_stuck`.
  """
  if row['train/feature_std'] < COLLAPSED_STD:
    return True
  if 'train/loss_collapsed' not in row:
    return False
  loss, alike = row['train/loss'], row['train/loss_collapsed']
  near = SAME_LOSS * row['train/loss_chance']
  return abs(row['train/loss_chance'] - alike) > near > abs(loss - alike)


def is_stuck(row: Mapping[str, float]) -> bool:
  """Returns whether the loss is at the chance level, or above it.

  Above it, the embeddings differ but are not informative.
  """
  return row['train/loss'] >= (1 - SAME_LOSS) * row['train/loss_chance']


def collapsed(rows: Rows) -> int | None:
  """Returns the step since which the run has been collapsed, or None.

  The collapse must last up to the end, for at least LASTING_ROWS rows.
  """
  rows = [row for row in rows if 'train/feature_std' in row]
  bad = _last_run([is_collapsed(row) for row in rows])
  return rows[-bad]['step'] if bad >= LASTING_ROWS else None


def stuck(rows: Rows) -> int | None:
  """Returns the step since which the loss has been at chance, or None.

  That must last up to the end, for at least LASTING_ROWS rows, and for
  STUCK_STEPS steps or a third of the run, whichever is less.
  """
  rows = [row for row in rows if 'train/loss_chance' in row]
  bad = _last_run([is_stuck(row) for row in rows])
  if bad < LASTING_ROWS:
    return None
  first, since, last = (rows[i]['step'] for i in (0, -bad, -1))
  least = min(STUCK_STEPS, (last - first) / 3)
  return since if last - since >= least else None


def _last_run(bad: list[bool]) -> int:
  """Returns how many values at the end of the list are True."""
  return (bad[::-1] + [False]).index(False)


def diverged(rows: Rows) -> int | None:
  """Returns the step at which a metric stopped being finite, or None."""
  steps, _ = series(rows, 'train/diverged')
  return int(steps[0]) if len(steps) else None


@dataclasses.dataclass(frozen=True)
class Analysis:
  """The instabilities and failures of one run.

  Attributes:
    dips: the dips of kNN accuracy from which it recovered.
    fall: the fall of kNN accuracy from which it did not recover; None if there
      is none.
    spikes: the gradient spikes of each logged layer, by the layer's name.
    lead: the layer in which the spikes begin.
    collapsed, stuck: the step since which the run is collapsed or stuck at
      chance; None = it is not.
    diverged: the step at which it diverged; None = it did not.
  """

  dips: list[Dip]
  fall: Dip | None
  spikes: dict[str, list[Spike]]
  lead: Lead
  collapsed: int | None
  stuck: int | None
  diverged: int | None


def analyse(rows: Rows) -> Analysis:
  """Analyses a run: all rows of its metrics.jsonl, in order."""
  every = all_series(rows)
  found = {
      name.removeprefix(GRADIENTS): spikes(*curve)
      for name, curve in every.items() if name.startswith(GRADIENTS)
  }
  steps, _ = every.setdefault(FIRST_LAYER, NOTHING)
  # Rows that are too far apart do not show which layer was first.
  coarse = len(steps) > 1 and np.median(np.diff(steps)) > COARSEST
  falls = dips(*every.setdefault('knn/top1', NOTHING))
  return Analysis(
      [dip for dip in falls if dip.end is not None],
      next((dip for dip in falls if dip.end is None), None), found,
      lead({} if coarse else found), collapsed(rows), stuck(rows),
      diverged(rows),
  )


class Watch:
  """Watches a run as it goes on; keeps the last WINDOW values of each curve.

  A gradient that rises and stays high counts as a spike here, because later
  values are not known yet.
  """

  def __init__(self, has_weights: bool = False, can_bound: bool = False):
    """Starts without any values.

    Args:
      has_weights: whether the run begins with the weights of a checkpoint and
        not with a random network.
      can_bound: whether the optimizer can bound its updates and does not.
    """
    self._has_weights, self._can_bound = has_weights, can_bound
    self._finders = collections.defaultdict(events.SpikeFinder)  # By layer.
    self._knn = collections.deque(maxlen=events.WINDOW)
    self._dip_said = -math.inf  # Step of the last warning of a dip.
    self._first = None  # kNN of the network before its first step.
    self._below = 0  # Consecutive evaluations below it.
    self._first_learns = False
    self._collapsed = 0  # Consecutive collapsed rows.
    self._stuck_since = None
    self._stuck_said = False
    self._spoken = {}  # Kind -> (step of the last warning, held back since).

  def update(self, step: int, values: Mapping[str, float]) -> list[str]:
    """Takes in the values logged at one step; call it once per row, in order.

    Args:
      step: the step of the values.
      values: metrics by name; those that `analyse` does not use are ignored.

    Returns:
      Warnings, one line each; usually none.
    """
    warnings = self._spikes(step, values)
    if 'knn/top1' in values:
      warnings += self._dips(step, values['knn/top1'])
    if 'train/feature_std' in values:
      self._collapsed = self._collapsed + 1 if is_collapsed(values) else 0
      if self._collapsed == LASTING_ROWS:
        warnings += self._say('collapse', step, (
            f'all images have had the same features or embeddings for '
            f'{LASTING_ROWS} rows of the log. What helps: {APART}'
        ))
    if 'train/loss_chance' in values:
      warnings += self._stuck(step, values)
    return warnings

  def _spikes(self, step: int, values: Mapping[str, float]) -> list[str]:
    beginning = {}  # Layer -> spike.
    for name in values:
      if name.startswith(GRADIENTS):
        layer = name.removeprefix(GRADIENTS)
        spike = self._finders[layer].update(step, values[name])
        if spike:
          beginning[layer] = spike
    if FIRST_LAYER in values:
      self._first_learns = values[FIRST_LAYER] > 0
    if not beginning:
      return []
    layer = max(beginning, key=lambda layer: beginning[layer].ratio)
    ratio = beginning[layer].ratio
    return self._say('spike', step, (
        f'gradient of {layer} {ratio:.1f}x its running median. If kNN falls '
        f'with it, what helps: {self._calmer()}'
    ))

  def _calmer(self) -> str:
    bound = BOUND if self._can_bound else ''
    if self._has_weights:
      return WARM + bound + CALMER
    return (FREEZE if self._first_learns else '') + bound + CALMER

  def _dips(self, step: int, value: float) -> list[str]:
    self._knn.append((step, value))
    return self._fall(step, value) + self._below_first(step, value)

  def _below_first(self, step: int, value: float) -> list[str]:
    # A short run has too few values to tell a fall from noise, but enough for
    # this test.
    if self._first is None:
      self._first = value if step == 0 else math.nan
    low = value < self._first - events.DIP_DEPTH
    self._below = self._below + 1 if low else 0
    if self._below != BELOW or math.isfinite(self._dip_said):
      return []
    return self._say('below', step, (
        f'kNN is {value:.3f}, less than the {self._first:.3f} of the '
        f'{"weights it began with" if self._has_weights else "random network"}'
        f', for {BELOW} evaluations in a row. If it does not climb, what '
        f'helps: {self._calmer()}'
    ))

  def _fall(self, step: int, value: float) -> list[str]:
    found = dips(*np.asarray(self._knn).T, sigmas=LIVE_DIP_SIGMAS)
    if not found or found[-1].end is not None:
      return []
    # Warn once of a fall that goes on, or that comes and goes with the noise.
    if found[-1].start <= self._dip_said:
      return []
    self._dip_said = step
    return self._say('dip', step, (
        f'kNN fell by {found[-1].depth:.3f} from step {found[-1].start} to '
        f'{found[-1].low} and is now {value:.3f}. If it does not come back, '
        f'or falls again, what helps: {self._calmer()}'
    ))

  def _stuck(self, step: int, values: Mapping[str, float]) -> list[str]:
    # A collapsed network can be at chance, too; that has been reported already.
    if not is_stuck(values) or self._collapsed >= LASTING_ROWS:
      self._stuck_since, self._stuck_said = None, False
      return []
    if self._stuck_since is None:
      self._stuck_since = step
    if self._stuck_said or step - self._stuck_since < STUCK_STEPS:
      return []
    self._stuck_said = True
    return self._say('stuck', step, (
        f'the loss has been at its chance level since step '
        f'{self._stuck_since}. What helps: {LEARN}'
    ))

  def _say(self, kind: str, step: int, text: str) -> list[str]:
    """Returns [warning]; [] if one of its kind was given recently."""
    last, held = self._spoken.setdefault(kind, (-math.inf, 0))
    if step - last < SILENCE:
      self._spoken[kind] = last, held + 1
      return []
    self._spoken[kind] = step, 0
    more = f' ({held} more like this since step {last})' if held else ''
    return [f'warning: step {step}: {text}{more}']
