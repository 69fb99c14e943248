"""Reads a compiled program: its collectives, with the loops counted."""

import collections
import dataclasses
import math
import re

KINDS = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
    'collective-permute',
)
BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
    's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}
_COLLECTIVE = re.compile(
    rf'= (\(.*?\)|\S+) ({"|".join(KINDS)})(?:-start)?\('
)
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_CALLED = re.compile(
    r'(?:calls|to_apply|called_computations|body)=\{?%?([\w.-]+)'
)


@dataclasses.dataclass(frozen=True)
class Collectives:
  """Of one kind, in one execution of a program.

  Attributes:
    count: how many.
    bytes: of their results on one device, all together.
  """

  count: int
  bytes: int


def collectives(text: str) -> dict[str, Collectives]:
  """Counts the collectives of a compiled program, by kind.

  Args:
    text: the optimised HLO, `compiled.as_text()`.
  """
  computations = _computations(text)
  times = _times(computations)
  found = collections.defaultdict(list)
  seen = set()
  for name, lines in computations.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if not match or not times[name]:
        continue
      # The TPU compiler repeats one that overlaps with other work in several
      # fusions, where its operand is a parameter.
      channel = re.search(r'channel_id=(\d+)', line)
      if channel and re.search(rf'{match[2]}\S*\(%param', line):
        key = match[2], channel[1], _size(match[1])
        if key in seen:
          continue
        seen.add(key)
      found[match[2]] += [_size(match[1])] * times[name]
  return {
      kind: Collectives(len(sizes), sum(sizes))
      for kind, sizes in sorted(found.items())
  }


def _size(shape: str) -> int:
  return sum(
      BYTES[kind] * math.prod(int(n) for n in dims.split(',') if n)
      for kind, dims in _ARRAY.findall(shape) if kind in BYTES
  )


def _computations(text: str) -> dict[str, list[str]]:
  found, lines = {}, []
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if head:
      lines = found.setdefault('ENTRY' if head[1] else head[2], [])
    elif line.startswith(' '):
      lines.append(line)
  return found


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
  """Returns how often each computation runs; loops by their bounds."""
  times = dict.fromkeys(computations, 0)

  def visit(name, count):
    times[name] += count
    for line in computations[name]:
      inner = count
      loop = re.search(r'condition=%?([\w.-]+)', line)
      if loop:
        inner *= _trips(line, computations[loop[1]])
      for called in _CALLED.findall(line):
        if called in computations:
          visit(called, inner)

  if 'ENTRY' not in computations:
    raise ValueError('the text holds no program')
  visit('ENTRY', 1)
  return times


def _trips(line: str, condition: list[str]) -> int:
  known = re.search(r'known_trip_count\D*(\d+)', line)
  if known:
    return int(known[1])
  # Loops of lax.map and lax.scan count from 0 to a constant.
  bounds = re.findall(r'constant\((\d+)\)', '\n'.join(condition))
  return max(map(int, bounds), default=1)


def has_loops(text: str) -> bool:
  """Returns whether a part of the program runs more than once."""
  computations = _computations(text)
  return any(n > 1 for n in _times(computations).values())
