"""Where the time of a TPU program goes: programs of known cost.

tests/tpu_programs.zip holds what libtpu 0.0.52 printed of three programs for a
v5e chip: the bfloat16 product of [2048, 1024] and [1024, 512]; a * 2 + b of
float32 [4096, 2048]; and the same in a Pallas kernel of six programs, each of
[256, 512].
"""

import pathlib
import zipfile

import pytest

from mocov3_jax.parallel.chips import CHIPS
from mocov3_jax.planning import bundles, hlo
from mocov3_jax.planning.breakdown import breakdown

PROGRAMS = pathlib.Path(__file__).parent / 'tpu_programs.zip'
CHIP = CHIPS['v5e']
# A bundle: address, label, depth, and more instructions.
LINE = '  0x{:x} {} {} {{ %a = sadd.s32 %b, 1 {}}}'
# Values in a vector register.
REGISTER = 8 * 128


@pytest.fixture
def bounds(tmp_path):
  """f(name of a program, grids) -> its breakdown."""
  with zipfile.ZipFile(PROGRAMS) as file:
    file.extractall(tmp_path)

  def of(name, grids=None, scheduled=True):
    folder = tmp_path / name
    schedule = bundles.Schedule(folder) if scheduled else None
    text = (folder / 'program.after_codegen.txt').read_text()
    return breakdown(text, CHIP, schedule, grids)

  return of


def cycles(found):
  return found.step.schedule_ms / 1e3 * CHIP.clock


def moved(found):
  return (found.step.hbm_ms + found.copies_ms) / 1e3 * CHIP.bandwidth


def test_a_product_takes_its_operations_and_its_bytes(bounds):
  found = bounds('matmul')
  operations = 2 * 2048 * 1024 * 512
  assert found.step.flops_ms == pytest.approx(1e3 * operations / CHIP.flops)
  # Both operands and the result once, one operand by a copy before.
  assert moved(found) == pytest.approx(
      2 * (2048 * 1024 + 1024 * 512 + 2048 * 512)
  )
  # What four units of 128 x 128 need: the bundles of the loop cannot be far
  # from it, since each holds its products.
  units = operations / (2 * 128 * 128 * 4)
  assert 0.8 * units < cycles(found) < 1.2 * units
  assert found.step.bound_ms == max(
      found.step.flops_ms, found.step.hbm_ms, found.step.schedule_ms
  )
  assert found.dynamic_loops == found.unscheduled == 0


def test_elementwise_work_is_bound_by_memory(bounds):
  found = bounds('elementwise')
  values = 4096 * 2048
  assert moved(found) == pytest.approx(3 * 4 * values)
  assert found.step.flops_ms == 0
  assert found.step.bound_ms == found.step.hbm_ms
  # One store a bundle at most.
  assert 1 < cycles(found) / (values / REGISTER) < 2


def test_a_kernel_counts_as_often_as_its_grid(bounds):
  found = bounds('kernel', {'twice': 6})
  assert moved(found) == pytest.approx(3 * 4 * 6 * 256 * 512)
  each = cycles(found) / 6
  assert 1 < each / (256 * 512 / REGISTER) < 2
  assert found.dynamic_loops == 0


def test_a_kernel_whose_length_is_not_printed_counts_by_its_grid():
  text = LINE.format(0, 'LB:', '>', '')
  assert bundles.issued(text, grid=60) == bundles.Issued(60, 0)
  # Two cores share the programs: the loop of each says how often it runs.
  exit_test = ';; %c = scmp.ge.s32 %a, 32 /* loop exit test */ '
  text = LINE.format(0, 'LB:', '>', exit_test)
  assert bundles.issued(text, grid=60) == bundles.Issued(30, 0)


def test_without_a_schedule_there_are_two_bounds(bounds):
  found = bounds('matmul', scheduled=False)
  assert found.step.schedule_ms == 0
  assert found.step.bound_ms == max(
      found.step.flops_ms, found.step.hbm_ms
  )


PROGRAM = """
%fused (p0: f32[512,512], p1: s32[]) -> f32[8,512] {
  %p0 = f32[512,512]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = f32[8,512]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1)
}

ENTRY %main (a: f32[512,512], i: s32[]) -> f32[8,512] {
  %a = f32[512,512]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %fusion.1 = f32[8,512]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, \
calls=%fused, metadata={op_name="jit(step)/jvp(Network)/blocks_0/mlp/fc1/add"}
  %copy.1 = f32[8,512]{0,1:T(8,128)} copy(%fusion.1), \
metadata={op_name="jit(step)/transpose(jvp(Network))/blocks_0/attn/mul"}
  %copy.2 = f32[8,512]{0,1:T(8,128)} copy(%copy.1), \
metadata={op_name="jit(step)/ema/add"}
  %copy.3 = f32[8,512]{0,1:T(8,128)} copy(%copy.2), \
metadata={op_name="jit(step)/transpose(jvp(loss))/mul"}
  ROOT %all-reduce.1 = f32[8,512]{1,0:T(8,128)} all-reduce(%copy.3), \
to_apply=%add
}
"""


def test_each_operation_is_of_a_part_and_a_network():
  found = breakdown(PROGRAM, CHIP)
  rows = 4 * 8 * 512
  us = lambda time: time.hbm_ms / 1e3 * CHIP.bandwidth
  assert {name: us(time) for name, time in found.parts.items()} == {
      # Of the operand only the slice is read; the result stays in VMEM.
      'MLP': pytest.approx(rows),
      're-layouts of attention': pytest.approx(rows),
      'optimizer and EMA': pytest.approx(2 * rows),
      'heads and loss': pytest.approx(2 * rows),
      'collectives': pytest.approx(2 * rows),
  }
  assert list(found.networks) == ['backward', 'online forward']


LOOP = """
%body (p: (s32[], f32[8,512])) -> (s32[], f32[8,512]) {
  %p = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,512]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,512]{1,0:T(8,128)} add(%x, %x)
  ROOT %t = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (p: (s32[], f32[8,512])) -> pred[] {
  %n = s32[]{:T(128)} LENGTH
  ROOT %c = pred[]{:T(512)S(6)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,512]) -> (s32[], f32[8,512]) {
  %a = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8,512]{1,0:T(8,128)}) while(%a), \
condition=%condition, body=%body
}
"""


@pytest.mark.parametrize('length, times, dynamic', [
    ('constant(7)', 7, 0), ('parameter(0)', 1, 1),
])
def test_the_body_of_a_loop_counts_as_often_as_it_runs(length, times, dynamic):
  found = breakdown(LOOP.replace('LENGTH', length), CHIP)
  assert moved(found) == pytest.approx(times * 2 * 4 * 8 * 512)
  assert found.dynamic_loops == dynamic


def test_a_loop_that_may_end_sooner_is_not_counted():
  either = LOOP.replace('LENGTH', 'constant(1000)').replace(
      '  ROOT %c =', '  %d = pred[]{:T(512)S(6)} compare(%i, %x)\n  ROOT %c ='
  )
  assert breakdown(either, CHIP).dynamic_loops == 1
  assert hlo.has_loops(either)
  assert not hlo.has_loops(LOOP.replace('LENGTH', 'constant(1)'))


PARTS_OF_ARRAYS = """
%nested (q: f32[4096,1024], k: s32[]) -> f32[8,1024] {
  %q = f32[4096,1024]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %s.1 = f32[8,1024]{1,0} dynamic-slice(%q, %k, %k)
}

%update (p: f32[4096,1024], u: f32[8,1024], k: s32[]) -> f32[4096,1024] {
  %p = f32[4096,1024]{1,0} parameter(0)
  %u = f32[8,1024]{1,0} parameter(1)
  %k.1 = s32[] parameter(2)
  %b = f32[4096,1024]{1,0} bitcast(%p)
  %part = f32[8,1024]{1,0} fusion(%b, %k.1), kind=kLoop, calls=%nested
  %sum = f32[8,1024]{1,0} add(%part, %u)
  ROOT %d = f32[4096,1024]{1,0} dynamic-update-slice(%p, %sum, %k.1, %k.1)
}

ENTRY %main (a: f32[4096,1024], r: f32[8,1024]) -> f32[8,1024] {
  %a = f32[4096,1024]{1,0} parameter(0)
  %r = f32[8,1024]{1,0} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  OPERATION
}
"""
ROWS = 4 * 8 * 1024


@pytest.mark.parametrize('operation, rows', [
    # Read and written.
    ('ROOT %x = f32[8,1024]{1,0} slice(%a), slice={[0:8], [0:1024]}', 2),
    ('ROOT %x = f32[4096,1024]{1,0} dynamic-update-slice(%a, %r, %i, %i)', 2),
    # The part of the large array, the small one, and what is written back.
    ('ROOT %x = f32[4096,1024]{1,0} fusion(%a, %r, %i), calls=%update', 3),
    # What runs beside the program, and what moves nothing.
    ('%x = (f32[8,1024]{1,0}, f32[32,1024]{1,0}) all-gather-start(%r)\n'
     '  ROOT %y = f32[32,1024]{1,0} all-gather-done(%x)', 0),
    ('ROOT %x = f32[4096,1024]{1,0} conditional(%i, %a, %a)', 0),
])
def test_only_what_moves_is_counted(operation, rows):
  found = breakdown(PARTS_OF_ARRAYS.replace('OPERATION', operation), CHIP)
  assert moved(found) == pytest.approx(rows * ROWS)


def test_a_line_is_an_operation():
  op = hlo.operations(PROGRAM)['ENTRY'][2]
  assert (op.name, op.code, op.operands, op.called) == (
      'fusion.1', 'fusion', ('a', 'i'), 'fused'
  )
  assert hlo.hbm_bytes('(f32[2,3]{1,0}, bf16[4]{0:T(128)S(1)})') == 24
  assert hlo.dimensions('(f32[2,3]{1,0}, bf16[4]{0})') == [2, 3]


def test_a_loop_runs_as_often_as_its_exit_says():
  text = '\n'.join([
      LINE.format(0, '  :', '', ''),
      LINE.format(1, 'LB:', '>', ''),
      LINE.format(2, '  :', '>',
                  ';; %c = scmp.ge.s32 %a, 40 /* loop exit test */ '),
      LINE.format(3, 'LB:', '>', ';; %d = vdelay 4 '),
  ])
  # Two bundles forty times; then a loop without an exit, which is said.
  assert bundles.issued(text) == bundles.Issued(1 + 2 * 40 + 5, 1)
