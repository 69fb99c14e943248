"""Bounds the time of a compiled TPU step, operation by operation.

For each HLO operation there are up to three lower bounds of its time: its FLOPs
at the chip's peak, its traffic between HBM and the core at the bandwidth, and
the bundles of its program at the clock rate. The largest of them bounds the
operation. The sum over the operations bounds the step, since a core runs one
operation at a time.

This is a bound for this program, not a measurement: waits for memory and for
the matrix unit are not included. Where the printed program is not understood,
the bound may be too high, since code under an unknown condition counts as
executed.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import re

from mocov3_jax.parallel.chips import Chip
from mocov3_jax.planning import hlo
from mocov3_jax.planning.bundles import Schedule

# Opcodes that take no time of their own: those that only name values, and the
# ends of asynchronous operations.
FREE = frozenset({
    'call', 'conditional', 'parameter', 'get-tuple-element', 'tuple',
    'bitcast', 'constant', 'after-all', 'partition-id', 'replica-id',
    'async-done', 'async-update', 'copy-done', 'send-done', 'recv-done',
})
# Custom calls that only rename bytes, and the memory space of scalar results.
FREE_CALLS = r'custom_call_target="(ConcatBitcast|SliceBitcast|AllocateBuffer)"'
SCALAR = 'S(6)}'
# A Pallas kernel.
KERNEL = 'custom_call_target="tpu_custom_call"'
# Asynchronous collectives, which `hlo.collectives` counts.
BESIDE = rf'({"|".join(hlo.KINDS)})-(start|done)'
# Opcodes that read or write only a part of their first operand.
SLICES, UPDATE = ('slice', 'dynamic-slice', 'gather'), 'dynamic-update-slice'
COPIES = frozenset({'async-start', 'copy-start'})
RELAYOUTS = frozenset({'copy', 'reshape', 'transpose'})
# Rows of the contracted axis that the matrix unit processes at a time.
MXU = 128

# Parts of the model by scope of the traced program; the first match counts.
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
  """Lower bounds of the time of some operations, milliseconds.

  Attributes:
    flops_ms: their matrix products at the chip's peak.
    hbm_ms: their traffic at the bandwidth of the HBM.
    schedule_ms: their bundles at the clock rate; 0 without a schedule.
    bound_ms: the sum over the operations of the largest of the three bounds.
  """

  flops_ms: float = 0.0
  hbm_ms: float = 0.0
  schedule_ms: float = 0.0
  bound_ms: float = 0.0

  def add(self, other: 'Time') -> None:
    """Adds the time of other operations."""
    self.flops_ms += other.flops_ms
    self.hbm_ms += other.hbm_ms
    self.schedule_ms += other.schedule_ms
    self.bound_ms += other.bound_ms


@dataclasses.dataclass(frozen=True)
class Breakdown:
  """Where the time of a step goes.

  Attributes:
    step: the time of the whole step.
    parts: the time by part of the model, the longest first.
    networks: the time by network and direction; operations that belong to no
      network are left out.
    copies_ms: the time of the HBM traffic of asynchronous copies, which run in
      parallel with the rest and are not in `step`.
    dynamic_loops: the number of operations that are counted incompletely. These
      are loops, and operations that contain one, whose trip count is unknown:
      they count as one trip. They are also conditionals, whose branches are not
      counted.
    unscheduled: the number of operations whose bundles are unknown; they are
      bounded by FLOPs and HBM traffic only.
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
  """Bounds the time of each operation of a program, and adds the bounds up.

  Args:
    text: HLO after the compiler's last pass, with memory spaces.
    chip: the chip for which the program was compiled.
    schedule: the program's bundles, if they were printed.
    grids: the number of programs of each Pallas kernel, by the kernel's name.
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
    if KERNEL in op.attributes:  # The author's estimate, `pl.CostEstimate`.
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
  """Returns whether an asynchronous operation is a collective."""
  return any(
      inner.code.startswith(hlo.KINDS)
      for inner in hlo.inside(op.called, computations)
  )


def _running(
    computations: Mapping[str, list[hlo.Operation]], name: str = 'ENTRY',
    times: int = 1,
) -> Iterable[tuple[hlo.Operation, int, dict[str, str]]]:
  """Yields the operations that run, their counts, and shapes.

  A fusion is one operation. The body of a loop counts as often as the loop
  runs, or once if that is unknown. The shapes are those of all values in the
  operation's computation, by name.
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
  """Returns the scope of an operation in the traced program.

  For a fusion with a matrix product, it is the scope of the product. The
  compiler names a fusion after its result, and the product of a weight's
  gradient may be fused with the optimizer.
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
  read = {}  # An operand that is passed twice is read once.
  for i, name in enumerate(op.operands):
    whole = hlo.hbm_bytes(shapes[name]) if name in shapes else 0
    part = _part_read(op, i, computations)
    read[name] = whole if part is None else min(whole, part)
  return sum(read.values()) + _written(op, op.shape, shapes, computations)


def _part_read(
    op: hlo.Operation, operand: int,
    computations: Mapping[str, list[hlo.Operation]],
) -> int | None:
  """Returns the bytes that are read of an operand; None for all of it."""
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
  """Returns the bytes of a value that its users read; None for all of it."""
  total = 0
  if any(op.is_root and op.name == name for op in ops):
    return None  # It is the result of the computation.
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
    op: the operation that makes the result.
    shape: the shape of the result, with the layout that gives its memory space.
    shapes: the shapes of the values in the operation's computation, by name.
    computations: all computations of the program.
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
  """Returns the FLOPs of a fusion's matrix products, unpadded and padded.

  For the padded FLOPs, the contracted axis is rounded up to a multiple of
  `MXU`, whichever operand the matrix unit holds.
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
  """Returns how many positions of the window lie on input values, on average.

  The compiler writes batched matrix products as convolutions. Their window is
  as wide as the batch, and lies mostly outside of the input.
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
