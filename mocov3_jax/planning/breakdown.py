"""Where the time of a compiled TPU step goes, operation by operation.

For each operation there are up to three lower bounds of its time: its
operations at the chip's peak, what it moves between HBM and the core at the
bandwidth, and the bundles of its program at the clock. The largest of them
bounds the operation, and the sum over the operations bounds the step, since a
core does one operation at a time. It is a bound of this program, and not a
measurement: waits for memory and for the matrix unit are not in it. Where the
printed program is not understood, it may be too high: a branch whose condition
is unknown counts as taken.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import re

from mocov3_jax.parallel.chips import Chip
from mocov3_jax.planning import hlo
from mocov3_jax.planning.bundles import Schedule

# Codes of what takes no time of its own: names of values, and the two ends of
# what runs beside the program.
FREE = frozenset({
    'call', 'conditional', 'parameter', 'get-tuple-element', 'tuple',
    'bitcast', 'constant', 'after-all', 'partition-id', 'replica-id',
    'async-done', 'async-update', 'copy-done', 'send-done', 'recv-done',
})
# Calls that only name bytes otherwise; and results in the core's scalar memory.
FREE_CALLS = r'custom_call_target="(ConcatBitcast|SliceBitcast|AllocateBuffer)"'
SCALAR = 'S(6)}'
# A Pallas kernel.
KERNEL = 'custom_call_target="tpu_custom_call"'
# Collectives that run beside the program; `hlo.collectives` counts them.
BESIDE = rf'({"|".join(hlo.KINDS)})-(start|done)'
# What reads or writes a part of its first operand.
SLICES, UPDATE = ('slice', 'dynamic-slice', 'gather'), 'dynamic-update-slice'
COPIES = frozenset({'async-start', 'copy-start'})
RELAYOUTS = frozenset({'copy', 'reshape', 'transpose'})
# Rows of the contraction that the matrix unit works on at a time.
MXU = 128

# What a scope of the traced program belongs to: the first pattern found.
PARTS = (
    ('norms', r'/norm[12]?/'),
    ('qkv and proj', r'/attn/(qkv|proj)/'),
    ('attention', r'/attn/'),
    ('MLP', r'/mlp/'),
    ('patches', r'/patch_embed/'),
    ('augmentation', r'augment/'),
    ('heads and loss', r'/(projector|predictor)/|jvp\(loss\)'),
    ('optimizer and EMA', r'/(optimizer|ema|metrics)/'),
    ('blocks, else', r'/blocks_\d+/'),
)
RELAYOUT, OTHER, COLLECTIVE = 're-layouts of attention', 'other', 'collectives'
NETWORKS = (
    ('backward', r'transpose\(jvp'),
    ('online forward', r'jvp\('),
    ('target forward', r'Network\.encode'),
)


@dataclasses.dataclass
class Time:
  """Lower bounds of a time, milliseconds.

  Attributes:
    flops_ms: its products at the chip's peak.
    hbm_ms: its traffic at the bandwidth of the HBM.
    schedule_ms: its bundles at the clock; 0 without a schedule.
    bound_ms: the sum over operations of the largest of the three.
  """

  flops_ms: float = 0.0
  hbm_ms: float = 0.0
  schedule_ms: float = 0.0
  bound_ms: float = 0.0

  def add(self, other: 'Time') -> None:
    """Adds what another operation takes."""
    self.flops_ms += other.flops_ms
    self.hbm_ms += other.hbm_ms
    self.schedule_ms += other.schedule_ms
    self.bound_ms += other.bound_ms


@dataclasses.dataclass(frozen=True)
class Breakdown:
  """Where the time of a step goes.

  Attributes:
    step: of the whole.
    parts: by part of the model, the longest first.
    networks: by network and direction; what is of none is in none.
    copies_ms: HBM traffic of asynchronous copies, which run beside the rest.
    dynamic_loops: loops, and operations with one, that are counted once,
      since the program computes how often they run; and conditions, whose
      branches are not counted.
    unscheduled: operations whose bundles are not known; they are bounded by
      the other two.
  """

  step: Time
  parts: dict[str, Time]
  networks: dict[str, Time]
  copies_ms: float
  dynamic_loops: int
  unscheduled: int


def breakdown(
    text: str, chip: Chip, schedule: Schedule | None = None,
    grids: Mapping[str, int] | None = None,
) -> Breakdown:
  """Bounds the time of each operation of a program, and adds up.

  Args:
    text: of the program after the compiler's last step, with memory spaces.
    chip: for which it was compiled.
    schedule: its bundles, if they were printed.
    grids: programs of each Pallas kernel, by the kernel's name.
  """
  computations = hlo.operations(text)
  step, copies, dynamic, unscheduled = Time(), 0, 0, 0
  parts, networks = {}, {}
  for op, times, shapes in _running(computations):
    if op.code == 'while':
      dynamic += not hlo.trips(op, computations)
      continue
    dynamic += op.code == 'conditional'
    if op.code in COPIES and not _sends(op, computations):
      copies += times * hlo.copied_bytes(op)
    if op.code in FREE | COPIES or op.shape.endswith(SCALAR):
      continue
    if re.fullmatch(BESIDE, op.code):
      continue
    if re.search(FREE_CALLS, op.attributes):
      continue
    flops, padded = _flops(op.called, computations)
    if KERNEL in op.attributes:  # As its author says; see `pl.CostEstimate`.
      flops, padded = float(op.attribute(r'"flops":"(\d+)"') or 0), 0.0
    moved = _moved(op, shapes, computations)
    issued = None
    if schedule:
      bounds = re.findall(
          r'\d+', op.attribute(r'"iteration_bounds":\[([^\]]*)\]')
      )
      issued = schedule.issued(
          op.name, [int(n) for n in bounds], _grid(op, grids or {})
      )
      unscheduled += issued is None
      dynamic += bool(issued and issued.dynamic_loops)
    cycles = issued.cycles if issued else 0.0
    flops, padded, moved, cycles = (
        1e3 * times * x for x in (flops, padded, moved, cycles)
    )
    time = Time(
        flops / chip.flops, moved / chip.bandwidth, cycles / chip.clock
    )
    time.bound_ms = max(padded / chip.flops, time.hbm_ms, time.schedule_ms)
    scope = _scope(op, computations)
    step.add(time)
    parts.setdefault(_part(op, scope), Time()).add(time)
    network = _first(NETWORKS, scope)
    if network:
      networks.setdefault(network, Time()).add(time)
  return Breakdown(
      step,
      dict(sorted(parts.items(), key=lambda part: -part[1].bound_ms)),
      {name: networks[name] for name, _ in NETWORKS if name in networks},
      1e3 * copies / chip.bandwidth, dynamic, unscheduled,
  )


def _sends(
    op: hlo.Operation, computations: Mapping[str, list[hlo.Operation]]
) -> bool:
  """Returns whether what runs beside the program is a collective."""
  return any(
      inner.code.startswith(hlo.KINDS)
      for inner in hlo.inside(op.called, computations)
  )


def _running(
    computations: Mapping[str, list[hlo.Operation]], name: str = 'ENTRY',
    times: int = 1,
) -> Iterable[tuple[hlo.Operation, int, dict[str, str]]]:
  """Yields what runs, and how often, with the shapes beside it.

  Fusions are one operation; the bodies of loops run as often as the loop does,
  and once if that is not known.
  """
  shapes = {op.name: op.shape for op in computations[name]}
  for op in computations[name]:
    yield op, times, shapes
    if op.code == 'while':
      body = op.attribute(r'body=%?([\w.-]+)')
      yield from _running(
          computations, body, times * max(hlo.trips(op, computations), 1)
      )
    elif op.code == 'call':
      yield from _running(
          computations, op.attribute(r'to_apply=%?([\w.-]+)'), times
      )


def _part(op: hlo.Operation, scope: str) -> str:
  if re.match('|'.join(hlo.KINDS), op.code):
    return COLLECTIVE
  part = _first(PARTS, scope) or OTHER
  return RELAYOUT if part == 'attention' and op.code in RELAYOUTS else part


def _first(patterns: Iterable[tuple[str, str]], scope: str) -> str:
  return next((name for name, p in patterns if re.search(p, scope)), '')


def _scope(
    op: hlo.Operation, computations: Mapping[str, list[hlo.Operation]]
) -> str:
  """Returns the scope of an operation: of a fused product, that of the product.

  The compiler names a fusion after its result, and a weight's gradient may be
  fused with the optimizer.
  """
  for inner in hlo.inside(op.called, computations):
    if inner.code == 'convolution' and inner.scope:
      return inner.scope
  return op.scope


def _grid(op: hlo.Operation, grids: Mapping[str, int]) -> int:
  if KERNEL not in op.attributes:
    return 0
  return next(
      (grid for name, grid in grids.items() if name in op.scope + op.name), 0
  )


def _moved(
    op: hlo.Operation, shapes: Mapping[str, str],
    computations: Mapping[str, list[hlo.Operation]],
) -> int:
  """Returns the bytes that an operation reads from and writes to HBM."""
  read = {}  # An operand that is given twice is read once.
  for i, name in enumerate(op.operands):
    whole = hlo.hbm_bytes(shapes[name]) if name in shapes else 0
    part = _part_read(op, i, computations)
    read[name] = whole if part is None else min(whole, part)
  return sum(read.values()) + _written(op, op.shape, shapes, computations)


def _part_read(
    op: hlo.Operation, operand: int,
    computations: Mapping[str, list[hlo.Operation]],
) -> int | None:
  """Returns the bytes that are read of an operand; None if that is all."""
  if op.code in SLICES and operand == 0:
    return hlo.array_bytes(op.shape)
  if op.code == UPDATE and operand == 0:
    return 0  # It becomes the result.
  if op.called in computations:
    inner = computations[op.called]
    for parameter in inner:
      if parameter.code == 'parameter' and parameter.arguments == str(operand):
        return _part_used(parameter.name, inner, computations)
  return None


def _part_used(
    name: str, ops: list[hlo.Operation],
    computations: Mapping[str, list[hlo.Operation]],
) -> int | None:
  """Returns the bytes of a value that others read; None if that is all."""
  total = 0
  if any(op.is_root and op.name == name for op in ops):
    return None  # It is handed on.
  for user in ops:
    for i, operand in enumerate(user.operands):
      if operand != name:
        continue
      if user.code == 'bitcast':
        part = _part_used(user.name, ops, computations)
      else:
        part = _part_read(user, i, computations)
      if part is None:
        return None
      total += part
  return total


def _written(
    op: hlo.Operation, shape: str, shapes: Mapping[str, str],
    computations: Mapping[str, list[hlo.Operation]],
) -> int:
  """Returns the bytes that an operation writes to HBM.

  Args:
    op: what gives the result.
    shape: of the result, with the layout that says where it is.
    shapes: of the values beside it.
    computations: of the program.
  """
  whole = hlo.hbm_bytes(shape)
  if op.code == UPDATE:  # In place.
    return min(whole, hlo.array_bytes(shapes[op.operands[1]]))
  if op.called not in computations:
    return whole
  inner = {x.name: x for x in computations[op.called]}
  root = next((x for x in inner.values() if x.is_root), None)
  if root is None:
    return whole
  arrays = hlo.elements(shape)
  results = root.operands if root.code == 'tuple' else (root.name,)
  if len(results) != len(arrays):
    return whole
  written = 0
  beside = {name: x.shape for name, x in inner.items()}
  for name, array in zip(results, arrays, strict=True):
    result = inner[name]
    while result.code == 'bitcast':
      result = inner[result.operands[0]]
    written += _written(result, array, beside, computations)
  return written


def _flops(
    computation: str, computations: Mapping[str, list[hlo.Operation]]
) -> tuple[float, float]:
  """Returns the operations of a fusion's products; as they are, and padded.

  Padded: the contraction to whole `MXU`, whichever operand the unit holds.
  """
  flops = padded = 0.0
  ops = {op.name: op for op in hlo.inside(computation, computations)}
  for op in ops.values():
    if op.code != 'convolution':
      continue
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.attributes)
    left, right = (
        hlo.dimensions(ops[name].shape) for name in op.operands[:2]
    )
    out = hlo.dimensions(op.shape)
    contracted = right[labels[2].index('i')] * _taps(
        op, labels, left, out
    )
    product = 2.0 * math.prod(out) * contracted
    flops += product
    padded += product * _padding(contracted)
  return flops, padded


def _padding(size: float) -> float:
  return math.ceil(max(size, 1) / MXU) * MXU / max(size, 1)


def _taps(op, labels, left, out) -> float:
  """Returns how many values of the window meet the input, in the mean.

  The compiler writes batches of products as convolutions, with a window as
  wide as the batch that is mostly outside of the input.
  """
  window = re.search(r'window=\{([^}]*)\}', op.attributes)
  if not window:
    return 1.0
  given = {
      name: values.split('x')
      for name, values in re.findall(r'(\w+)=([\d_x-]+)', window[1])
  }
  taps = 1.0
  for axis, size in enumerate(map(int, given['size'])):
    stride = int(given['stride'][axis]) if 'stride' in given else 1
    low = int(given['pad'][axis].split('_')[0]) if 'pad' in given else 0
    dilation = int(given['lhs_dilate'][axis]) if 'lhs_dilate' in given else 1
    step = int(given['rhs_dilate'][axis]) if 'rhs_dilate' in given else 1
    inputs = left[labels[1].index(str(axis))]
    outputs = out[labels[3].index(str(axis))]
    met = sum(
        0 <= place <= (inputs - 1) * dilation and place % dilation == 0
        for o in range(outputs) for t in range(size)
        for place in [o * stride + t * step - low]
    )
    taps *= met / outputs
  return taps
