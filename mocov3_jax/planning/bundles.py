"""Counts the cycles that a TPU core needs to issue a compiled program.

A TPU core issues one bundle of instructions (VLIW) per cycle. The compiler can
print the bundles of each operation of a program, with its loops and their trip
counts (`DUMP_FLAGS`). The sum of the bundles, each counted as often as it runs,
is a lower bound of the operation's cycles: waits for memory and for the matrix
unit are not included. Conditional code that is not understood counts as
executed, so the count may be too high.

The text format is not documented. What is understood of it is tested on
programs of known cost (tests/test_breakdown.py).
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import re

# The flags with which libtpu must be loaded to print its bundles.
DUMP_FLAGS = (
    '--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
    '--xla_jf_dump_llo_pass_label_regex=final_bundles|deduplication'
)
# '0x1f LB: > { a ;; b }': address, labels, loop depth, instructions.
_BUNDLE = re.compile(
    r'^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2}(?:,[A-Z]{2})*:)?\s*:? ?((?:>\s?)*)'
    r'\s*(\{.*)$'
)
_LOOP_EXIT = re.compile(
    r'scmp\.\w+\.s32(?:\.totalorder)? [^,;]*, (\d+) /\* loop exit test \*/'
)
_BRANCH = re.compile(r'sbr\.rel \(!?%\w+\) target = \$region(\d+)')
_DELAY = re.compile(r'vdelay[^,;]*?(\d+)')
# Conditional code of fewer bundles than this counts as always executed.
SMALL_REGION = 30


@dataclasses.dataclass
class _Bundle:
  """One bundle, and how often it runs."""

  depth: int
  labels: str
  text: str
  times: float = 1.0


@dataclasses.dataclass(frozen=True)
class Issued:
  """What an operation's program issues.

  Attributes:
    cycles: the bundles, each counted as often as it runs, and explicit delays.
    dynamic_loops: the number of loops without a trip count in the text; they
      count as one trip.
  """

  cycles: float
  dynamic_loops: int


class Schedule:
  """The bundles of a program's operations, as printed by the compiler."""

  def __init__(self, folder: pathlib.Path):
    """Lists the files that the compiler printed into `folder`."""
    self._files, self._issued = {}, {}
    for path in folder.glob('*final_bundles.txt'):
      name = re.sub(r'^\d+-|-\d+-final_bundles\.txt$', '', path.name)
      if 'schedule-analysis' not in path.name:
        self._files[name] = path
    # Identical operations are compiled once. A map lists, under the name of the
    # compiled one, those that are the same.
    self._same_as = {}
    for path in folder.glob('*deduplication-map.txt'):
      kept = None
      for line in path.read_text().splitlines():
        if line.startswith('key:'):
          kept = line.removeprefix('key:')
        elif line.startswith('  ') and kept:
          self._same_as[line.strip()] = kept

  @property
  def names(self) -> list[str]:
    """The names of the operations that were printed."""
    return list(self._files)

  def issued(
      self, name: str, iteration_bounds: Sequence[int] = (), grid: int = 0
  ) -> Issued | None:
    """Returns what an operation issues; None if it was not printed.

    Args:
      name: the name of the operation in the optimised HLO.
      iteration_bounds: the number of tiles of a matrix product along rows,
        columns and the contracted axis.
      grid: the number of programs of a Pallas kernel; 0 = not a Pallas kernel.
        A trip count in the text takes precedence, since two cores of one chip
        share the programs.
    """
    if name not in self._files:
      if name not in self._same_as:
        return None
      name = self._same_as[name]
      if name not in self._files:
        return None
    key = name, tuple(iteration_bounds), grid
    if key not in self._issued:
      text = self._files[name].read_text(errors='replace')
      self._issued[key] = issued(text, iteration_bounds, grid)
    return self._issued[key]


def issued(
    text: str, iteration_bounds: Sequence[int] = (), grid: int = 0
) -> Issued:
  """Counts the bundles of one program; see `Schedule.issued`."""
  bundles = _parse(text)
  dynamic = 0
  for depth in range(1, max((b.depth for b in bundles), default=0) + 1):
    for loop in _loops(bundles, depth):
      trips = _trips(loop, depth)
      if grid and depth == 1:
        # The loop is a pipeline of three stages. It has two trips more than
        # programs, and each stage runs once per program.
        trips = trips - 2 if trips > 2 else grid
      if not trips:
        dynamic += 1
        continue
      for bundle in loop:
        bundle.times *= trips
      if not grid:
        _skip_regions(loop, depth, trips, iteration_bounds)
  cycles = 0.0
  for bundle in bundles:
    delay = _DELAY.search(bundle.text)
    cycles += bundle.times * (1 + (int(delay[1]) if delay else 0))
  return Issued(cycles, dynamic)


def _parse(text: str) -> list[_Bundle]:
  bundles = []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match:
      labels, depth, body = match[1] or '', match[2].count('>'), match[3]
      # An empty bundle is printed without its loop depth.
      if bundles and not labels and re.match(r'\{\s*\}', body):
        depth = bundles[-1].depth
      bundles.append(_Bundle(depth, labels, body))
    elif bundles:
      bundles[-1].text += '\n' + line
  return bundles


def _loops(bundles: list[_Bundle], depth: int) -> list[list[_Bundle]]:
  """Returns the bundles of each loop of this depth, nested ones included."""
  loops, before = [], -1
  for i, bundle in enumerate(bundles):
    if bundle.depth < depth:
      continue
    begins = bundle.depth == depth and 'LB' in bundle.labels
    if before != i - 1 or begins or not loops:
      loops.append([])
    loops[-1].append(bundle)
    before = i
  return loops


def _trips(loop: list[_Bundle], depth: int) -> int:
  """Returns the trip count of a loop; 0 if the text does not have it."""
  for bundle in loop:
    found = _LOOP_EXIT.search(bundle.text)
    if found and bundle.depth == depth:
      return max(int(found[1]), 1)
  return 0


def _skip_regions(
    loop: list[_Bundle], depth: int, trips: int,
    iteration_bounds: Sequence[int],
) -> None:
  """Corrects the counts of bundles that some trips of a loop branch over.

  A matrix product over a * b * c tiles (`iteration_bounds`) is a software
  pipeline of a * b * c + 2 trips; on two cores, each core has half of the
  tiles. The first and the last trip skip the body. If the contracted axis is
  cut into c parts, what follows the sum (a bias, the optimizer) runs only in
  every c-th trip.
  """
  at_depth = '\n'.join(b.text for b in loop if b.depth == depth)
  pipelined = trips > 2 and re.search(
      rf'scmp\.lt\.s32(?:\.totalorder)? [^,;]*, {trips - 1}\b', at_depth
  )
  parts = iteration_bounds[2] if len(iteration_bounds) > 2 else 1
  for start, bundle in enumerate(loop):
    branch = _BRANCH.search(bundle.text)
    if not branch or bundle.depth != depth:
      continue
    ends = re.compile(rf'(?:empty|End) region {branch[1]}\b')
    end = next(
        (i for i in range(start + 1, len(loop)) if ends.search(loop[i].text)),
        start,
    )
    region = loop[start + 1 : end]
    if end - start < SMALL_REGION:
      continue
    multiplies = any('vmatmul' in b.text for b in region)
    share = 1.0
    if pipelined and multiplies and end - start > len(loop) / 2:
      share = (trips - 2) / trips
    elif pipelined and parts > 1 and not multiplies:
      share = 1 / parts
    for b in region:
      b.times *= share
