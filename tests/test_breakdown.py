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
  longer = bounds('kernel', {'twice': 60})
  each = (cycles(longer) - cycles(found)) / 54
  assert 1 < each / (256 * 512 / REGISTER) < 2
  assert found.dynamic_loops == 0


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
  ROOT %all-reduce.1 = f32[8,512]{1,0:T(8,128)} all-reduce(%copy.2), \
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


def test_a_line_is_an_operation():
  op = hlo.operations(PROGRAM)['ENTRY'][2]
  assert (op.name, op.code, op.operands, op.called) == (
      'fusion.1', 'fusion', ('a', 'i'), 'fused'
  )
  assert hlo.hbm_bytes('(f32[2,3]{1,0}, bf16[4]{0:T(128)S(1)})') == 24
  assert hlo.dimensions('(f32[2,3]{1,0}, bf16[4]{0})') == [2, 3]


def test_a_loop_runs_as_often_as_its_exit_says():
  line = '  0x{:x} {} {} {{ %a = sadd.s32 %b, 1 {}}}'
  text = '\n'.join([
      line.format(0, '  :', '', ''),
      line.format(1, 'LB:', '>', ''),
      line.format(2, '  :', '>',
                  ';; %c = scmp.ge.s32 %a, 40 /* loop exit test */ '),
      line.format(3, 'LB:', '>', ';; %d = vdelay 4 '),
  ])
  # Two bundles forty times; then a loop without an exit, which is said.
  assert bundles.issued(text) == bundles.Issued(1 + 2 * 40 + 5, 1)
