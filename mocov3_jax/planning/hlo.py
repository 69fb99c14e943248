"""Reads the operations and collectives of a compiled program.

The program is the text of optimised HLO. An operation is a line such as

  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kOutput,
    calls=%computation, metadata={op_name="jit(step)/..."}

where S(1) in a layout means that the array is in VMEM rather than in HBM.
"""

import collections
from collections.abc import Iterator
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
_LAID_OUT = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?')
CALLED = re.compile(
    r'(?:calls|to_apply|called_computations|body)=\{?%?([\w.-]+)'
)


@dataclasses.dataclass(frozen=True)
class Operation:
  """An operation, from one line of a computation.

  Attributes:
    name: its name, which is unique in the program.
    shape: the shape of the result as text, with layouts; may be a tuple.
    code: the opcode, such as 'fusion' or 'custom-call'.
    is_root: whether it is the result of its computation.
    arguments: the text in the parentheses: the operands, the number of a
      parameter, or the value of a constant.
    attributes: the rest of the line.
  """

  name: str
  shape: str
  code: str
  is_root: bool
  arguments: str
  attributes: str

  @property
  def operands(self) -> tuple[str, ...]:
    """The names of the operations whose results are its operands."""
    return tuple(re.findall(r'%([\w.-]+)', self.arguments))

  def attribute(self, pattern: str | re.Pattern[str]) -> str:
    """Returns the first group of a pattern in the attributes, or ''."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''

  @property
  def scope(self) -> str:
    """The scopes of the traced program that it comes from, or ''."""
    return self.attribute('op_name="([^"]*)"')

  @property
  def called(self) -> str:
    """The name of the computation that it calls, as of a fusion, or ''."""
    return self.attribute(r'calls=%?([\w.-]+)')


def operations(text: str) -> dict[str, list[Operation]]:
  """Returns the operations by computation; the main one is 'ENTRY'."""
  return {
      name: [op for op in map(_operation, lines) if op]
      for name, lines in _computations(text).items()
  }


def trips(
    loop: Operation, computations: dict[str, list[Operation]]
) -> int:
  """Returns the trip count of a loop; 0 if it is not known."""
  known = loop.attribute(r'known_trip_count\D*(\d+)')
  if known:
    return int(known)
  # The loops of lax.map and lax.scan count from 0 to a constant, and have no
  # other condition.
  name = loop.attribute(r'condition=%?([\w.-]+)')
  if name not in computations:
    return 0
  asked = list(inside(name, computations))
  codes = [op.code for op in asked]
  bounds = [int(op.arguments) for op in asked if op.code == 'constant'
            and op.arguments.isdigit()]
  plain = set(codes) <= {
      'parameter', 'get-tuple-element', 'constant', 'compare', 'fusion',
      'bitcast', 'copy',
  }
  if plain and codes.count('compare') == 1 and len(bounds) == 1:
    return bounds[0]
  return 0


def inside(
    computation: str, computations: dict[str, list[Operation]]
) -> Iterator[Operation]:
  """Yields the operations of a computation and of the ones it calls."""
  if computation in computations:
    for op in computations[computation]:
      yield op
      yield from inside(op.called, computations)


def _operation(line: str) -> Operation | None:
  match = re.match(r'\s+(ROOT )?%([\w.-]+) = (.*)$', line)
  if not match:
    return None
  root, name, rest = match.groups()
  # A shape is one word, or a tuple in parentheses, which may be nested.
  end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  code, _, rest = rest.partition('(')
  end = _closing('(' + rest) - 1
  return Operation(
      name, shape, code, root is not None, rest[:end], rest[end + 1 :]
  )


def _closing(text: str) -> int:
  """Returns the index that closes the parenthesis at the start of `text`."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return i
  return len(text)


def dimensions(shape: str) -> list[int]:
  """Returns the dimensions of an array, or of the first array of a tuple."""
  return [int(n) for n in _ARRAY.search(shape)[2].split(',') if n]


def elements(shape: str) -> list[str]:
  """Returns the arrays of a shape, each as text with its layout."""
  return [
      f'{kind}[{dims}]{{{layout}}}'
      for kind, dims, layout in _LAID_OUT.findall(shape)
  ]


def hbm_bytes(shape: str) -> int:
  """Returns the bytes of those arrays of a shape that are in HBM."""
  return sum(
      array_bytes(f'{kind}[{dims}]')
      for kind, dims, layout in _LAID_OUT.findall(shape) if 'S(' not in layout
  )


def copied_bytes(op: Operation) -> int:
  """Returns the bytes of HBM traffic of an asynchronous copy or slice."""
  # The first two arrays are source and destination; the smaller one is copied.
  arrays = _LAID_OUT.findall(op.shape)[:2]
  if len(arrays) < 2:
    return 0
  moved = min(array_bytes(f'{kind}[{dims}]') for kind, dims, _ in arrays)
  inside = any('S(' in layout for _, _, layout in arrays)
  return moved if inside else 2 * moved


@dataclasses.dataclass(frozen=True)
class Collectives:
  """The collectives of one kind in one execution of a program.

  Attributes:
    count: how many run.
    bytes: the total bytes of their results on one device.
  """

  count: int
  bytes: int


def collectives(text: str) -> dict[str, Collectives]:
  """Counts the collectives of a compiled program, by kind.

  Args:
    text: the optimised HLO, as of `compiled.as_text()`.
  """
  computations = _computations(text)
  times = _times(computations, text)
  found = collections.defaultdict(list)
  seen = set()
  for name, lines in computations.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if not match or not times[name]:
        continue
      # The TPU compiler repeats a collective that overlaps with other work in
      # several fusions, where its operand is a parameter. It counts once.
      channel = re.search(r'channel_id=(\d+)', line)
      if channel and re.search(rf'{match[2]}\S*\(%param', line):
        key = match[2], channel[1], array_bytes(match[1])
        if key in seen:
          continue
        seen.add(key)
      found[match[2]] += [array_bytes(match[1])] * times[name]
  return {
      kind: Collectives(len(sizes), sum(sizes))
      for kind, sizes in sorted(found.items())
  }


def array_bytes(shape: str) -> int:
  """Returns the bytes of all arrays of a shape."""
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


def _times(computations: dict[str, list[str]], text: str) -> dict[str, int]:
  """Returns how often each computation runs.

  A loop of unknown trip count counts as one trip.

  Raises:
    ValueError: if the text has no ENTRY computation.
  """
  times = dict.fromkeys(computations, 0)
  parsed = operations(text)

  def visit(name, count):
    times[name] += count
    for op in parsed[name]:
      inner = count
      if op.code == 'while':
        inner *= max(trips(op, parsed), 1)
      for called in CALLED.findall(op.attributes):
        if called in computations:
          visit(called, inner)

  if 'ENTRY' not in computations:
    raise ValueError('the text holds no program')
  visit('ENTRY', 1)
  return times


def has_loops(text: str) -> bool:
  """Returns whether the program has loops that may not run exactly once.

  Raises:
    ValueError: if the text has no ENTRY computation.
  """
  computations = operations(text)
  if 'ENTRY' not in computations:
    raise ValueError('the text holds no program')
  return any(
      op.code == 'while' and trips(op, computations) != 1
      for ops in computations.values() for op in ops
  )
