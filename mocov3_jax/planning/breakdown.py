"""Where the time of a compiled TPU step goes, operation by operation.

For each operation there are up to three lower bounds of its time: its
operations at the chip's peak, what it moves between HBM and the core at the
bandwidth, and the bundles of its program at the clock. The largest of them
bounds the operation, and the sum over the operations bounds the step, since a
core does one operation at a time. It is a bound of this program, and not a
measurement: waits for memory and for the matrix unit are not in it.
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
    'call', 'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant',
    'after-all', 'partition-id', 'replica-id', 'async-done', 'async-update',
    'copy-done', 'send-done', 'recv-done',
})
# Calls that only name bytes otherwise; and results in the core's scalar memory.
FREE_CALLS = r'custom_call_target="(ConcatBitcast|SliceBitcast|AllocateBuffer)"'
SCALAR = 'S(6)}'
# A Pallas kernel.
KERNEL = 'custom_call_target="tpu_custom_call"'
COPIES = frozenset({'async-start', 'copy-start'})
RELAYOUTS = frozenset({'copy', 'reshape', 'transpose'})
# The matrix unit works on 128 rows of the contraction and 128 columns.
MXU = 128

# What a scope of the traced program belongs to: the first pattern found.
PARTS = (
    ('norms', r'/norm[12]?/'),
    ('qkv and proj', r'/attn/(qkv|proj)/'),
    ('attention', r'/attn/'),
    ('MLP', r'/mlp/'),
    ('patches', r'/patch_embed/'),
    ('augmentation', r'augment/'),
    ('heads and loss', r'/(projector|predictor|loss)/'),
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
      since the program computes how often they run.
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
    if op.code in COPIES:
      copies += times * hlo.copied_bytes(op)
    if op.code in FREE | COPIES or op.shape.endswith(SCALAR):
      continue
    if re.search(FREE_CALLS, op.attributes):
      continue
    flops, padded = _flops(op.called, computations)
    if KERNEL in op.attributes:  # As its author says; see `pl.CostEstimate`.
      flops = padded = float(op.attribute(r'"flops":"(\d+)"') or 0)
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
  for inner in _inside(op.called, computations):
    if inner.code == 'convolution' and inner.scope:
      return inner.scope
  return op.scope


def _inside(
    computation: str, computations: Mapping[str, list[hlo.Operation]]
) -> Iterable[hlo.Operation]:
  """Yields the operations of a fusion, and of those fused into it."""
  if computation in computations:
    for op in computations[computation]:
      yield op
      yield from _inside(op.called, computations)


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
  sliced = _sliced(op.called, computations)
  read = {}  # An operand that is given twice is read once.
  for i, name in enumerate(op.operands):
    whole = hlo.hbm_bytes(shapes[name]) if name in shapes else 0
    read[name] = min(whole, sliced[i]) if i in sliced else whole
  return hlo.hbm_bytes(op.shape) + sum(read.values())


def _sliced(
    computation: str, computations: Mapping[str, list[hlo.Operation]]
) -> dict[int, int]:
  """Returns which parameters of a fusion are only sliced, and to how much."""
  if computation not in computations:
    return {}
  ops = computations[computation]
  found = {}
  for parameter in ops:
    if parameter.code != 'parameter':
      continue
    users = [op for op in ops if parameter.name in op.operands]
    if users and all(
        op.code in ('slice', 'dynamic-slice', 'gather')
        and op.operands[0] == parameter.name for op in users
    ):
      number = int(parameter.arguments)
      found[number] = sum(hlo.array_bytes(op.shape) for op in users)
  return found


def _flops(
    computation: str, computations: Mapping[str, list[hlo.Operation]]
) -> tuple[float, float]:
  """Returns the operations of a fusion's products; as they are, and padded.

  Padded: contraction and columns to whole `MXU`.
  """
  flops = padded = 0.0
  ops = {op.name: op for op in _inside(computation, computations)}
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
    columns = out[labels[3].index('f')]
    product = 2.0 * math.prod(out) * contracted
    flops += product
    padded += product * _padding(contracted) * _padding(columns)
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
