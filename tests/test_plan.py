"""The planner: collectives, topologies, bounds. No TPU compiler is needed."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import photos
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.parallel import chips as chips_lib
from mocov3_jax.parallel import sharding
from mocov3_jax.planning import cost as cost_lib
from mocov3_jax.planning import gpus, hlo, plan, timing, topology
from mocov3_jax.planning.breakdown import Breakdown, Time
from mocov3_jax.training import flops as flops_lib

NO_COMPILER = importlib.util.find_spec('libtpu') is None


def compiled_text(f, *shapes):
  """Of a program on eight devices, its arguments split along axis 0."""
  mesh = sharding.make_mesh()
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  step = jax.jit(f, in_shardings=split, out_shardings=whole)
  return step.lower(*arguments).compile().as_text()


def test_collectives_are_counted_with_their_bytes():
  found = hlo.collectives(compiled_text(lambda x: x.sum(axis=0), (64, 128)))
  assert found == {'all-reduce': hlo.Collectives(1, 128 * 4)}
  # Keys to everyone: each device gets all 64 of them.
  found = hlo.collectives(compiled_text(lambda x: x * 2, (64, 128)))
  assert found == {'all-gather': hlo.Collectives(1, 64 * 128 * 4)}


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
  def f(x):
    body = lambda carry, _: (carry * 0.5 + jnp.sum(x * carry[0]), None)
    return jax.lax.scan(body, jnp.ones(4), length=7)[0]

  text = compiled_text(f, (64, 128))
  assert hlo.has_loops(text)
  assert hlo.collectives(text)['all-reduce'].count == 7
  assert not hlo.has_loops(compiled_text(lambda x: x * 2, (64, 128)))


def test_without_several_devices_there_are_no_collectives():
  text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
  assert hlo.collectives(text) == {}


@pytest.mark.parametrize(
    'given, words',
    [
        ('v5f:4x4', "--topology='v5f'.*v4, v5e, v5p, v6e"),
        ('v5e', 'v5e:NxN'),
        ('v5e:16', 'v5e:4x4'),
        ('v4:4x4', 'v4:NxNxN'),
        ('v5e:0x4', 'v5e:NxN'),
    ],
)
def test_a_topology_that_cannot_be_is_named(given, words):
  with pytest.raises(UserError, match=words):
    topology.parse(given)


def test_the_model_needs_eight_forward_passes():
  # Per image two crops, each forward and backward (twice a forward pass) in
  # the online network and forward in the target: 8 backbone passes.
  c = config_lib.default_config()
  c.batch_size = 64
  method = build_method(c, config_lib.plan(c, 10**6))
  flops = flops_lib.step_flops(method, (224, 224, 3), 64) / 64
  # Of the last block only the class token: the other 196 need no projection,
  # no MLP and no products of their queries.
  last = 2 * 196 * (9 * 384**2 + 2 * 197 * 384)
  backbone = 2 * 4.598498304e9 - last
  patches = 2 * 196 * 384 * 768  # Of one crop.
  projector = 2 * (384 * 4096 + 4096 * 4096 + 4096 * 256)
  predictor = 2 * (256 * 4096 + 4096 * 256)
  # Of the frozen patches there is no backward pass.
  wanted = 8 * backbone - 4 * patches + 8 * projector + 6 * predictor
  assert flops == pytest.approx(wanted, rel=1e-3)


def test_bounds_follow_from_published_peaks():
  chips = topology.Slice(
      'v5e:2x2', chips_lib.CHIPS['v5e'], [None] * 4, 'libtpu 0.0.52', '0.0.42.*'
  )
  cost = cost_lib.Cost(
      attention='pallas', fits=True, state=1, total=1, model_flops=1.0,
      traced_flops=1.0,
      compiled_flops=197e12,
      breakdown=Breakdown(Time(bound_ms=2e3), {}, {}, 0.0, 0, 0),
      collectives={
          'all-reduce': hlo.Collectives(1, 200 * 10**9),
          'all-gather': hlo.Collectives(2, 200 * 10**9),
      },
  )
  bounds = cost_lib.seconds(cost, chips)
  assert bounds['compute'] == pytest.approx(1)
  assert bounds['program'] == pytest.approx(2)
  # Rings of four: 3/4 of the bytes travel, twice for the reduction.
  assert bounds['interconnect'] == pytest.approx(0.75 * 2 + 0.75)


def test_the_compilers_word_on_memory_is_understood():
  assert cost_lib.memory_needed(
      'Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm.'
  ) == int(22.5 * 2**30)
  assert cost_lib.memory_needed(
      'the total memory required for HLO temporaries (22.38G) exceeds '
      'available HBM (15.75G). HLO module: jit_step.'
  ) == int(22.38 * 2**30)
  assert cost_lib.memory_needed('another error') is None


def test_proposals_leave_a_batchnorm_backbone_whole():
  c = config_lib.default_config()
  changes = list(plan.proposals(c, 16))
  assert changes[0] == {'model.remat': True}
  assert {'micro_batch': 128, 'fsdp_devices': 16} in changes
  c.model.name = 'resnet50'
  assert list(plan.proposals(c, 16)) == [{'fsdp_devices': 16}]


def planned(monkeypatch, cost, *arguments, options=(), **changes):
  """What is reported of a slice of four chips and a step of a given cost."""
  chips = topology.Slice(
      'v5e:2x2', chips_lib.CHIPS['v5e'], [None] * 4, 'libtpu 0.0.52', '0.0.42.*'
  )
  monkeypatch.setattr(plan.topology_lib, 'get_slice', lambda name: chips)
  measure = cost if callable(cost) else lambda *_: cost
  monkeypatch.setattr(plan.cost_lib, 'measure', measure)
  c = tiny.config(**{'schedule.epochs': 100.0, **changes})
  return plan.plan(c, 'v5e:2x2', *arguments, **dict(options))


COST = cost_lib.Cost(
    attention='pallas', fits=True, state=1, total=2, model_flops=197e9,
    traced_flops=2 * 197e9,
)


def test_there_is_a_lower_bound_and_a_time_at_an_assumed_mfu(
    monkeypatch, capsys
):
  report = planned(monkeypatch, COST, 6400, 2.0, 0.25)
  # 0.394 T operations at 197 T a second; and 0.197 T at a quarter of that.
  assert report['seconds_bound'] == pytest.approx(2e-3)
  assert report['seconds'] == pytest.approx(4e-3)
  assert report['mfu_bound'] == pytest.approx(0.5)
  assert report['mfu'] == pytest.approx(0.25)
  # 100 epochs of 100 steps, on four chips for $2 an hour each.
  assert report['steps'] == 10_000
  assert report['hours'] == pytest.approx(40 / 3600)
  assert report['dollars'] == pytest.approx(2 * 4 * 40 / 3600)
  assert report['dollars_bound'] == pytest.approx(2 * 4 * 20 / 3600)
  told = capsys.readouterr().err
  assert told.count('lower bound') == 1 and 'at 25% MFU' in told
  assert 'libtpu 0.0.52; with this JAX, TPUs run 0.0.42.*' in told
  assert ' to ' not in told


def test_no_mfu_beats_the_bound(monkeypatch):
  report = planned(monkeypatch, COST, 6400, 0.0, 0.9)
  assert report['hours'] == report['hours_bound']
  assert report['mfu'] == pytest.approx(0.5) and 'dollars' not in report


def test_the_images_are_those_of_the_source(monkeypatch, tmp_path):
  assert planned(monkeypatch, COST)['images'] == 1437
  photos.write_tiles(tmp_path, tile=32, each=10, nested=False)
  report = planned(monkeypatch, COST, **{
      'data.source': f'folder:{tmp_path}', 'data.mean': (0.5,) * 3,
      'data.std': (0.5,) * 3,
  })
  assert report['images'] == 100 and report['steps'] == 100
  colour = {'data.mean': (0.5,) * 3, 'data.std': (0.5,) * 3}
  assert planned(monkeypatch, COST, **colour, **{
      'data.source': 'tfds:imagenet2012', 'batch_size': 4096,
  })['images'] == 1_281_167
  for source in 'folder:/not/here', 'tfds:cifar10':
    with pytest.raises(UserError, match='--images=NUMBER'):
      planned(monkeypatch, COST, **colour, **{'data.source': source})
  assert planned(monkeypatch, COST, 500, **colour, **{
      'data.source': 'folder:/not/here'
  })['images'] == 500


@pytest.mark.parametrize('requirements, version', [
    (['numpy>=2', 'libtpu==0.0.42.*; extra == "tpu"'], '0.0.42.*'),
    (['libtpu == 0.0.50 ; extra == "tpu"'], '0.0.50'),
    (['numpy'], ''), ([], ''),
])
def test_the_compiler_of_a_slice_is_the_one_that_jax_names(
    requirements, version
):
  assert topology.prescribed_compiler(requirements) == version


@pytest.mark.parametrize('arguments', [(-1,), (9, -1.0), (9, 0.0, 0.0),
                                       (9, 0.0, 1.1)])
def test_numbers_out_of_range_are_named(monkeypatch, arguments):
  with pytest.raises(UserError, match='--images=.*--price=.*--mfu='):
    planned(monkeypatch, COST, *arguments)


def test_a_missing_compiler_is_one_clear_message(monkeypatch):
  if not NO_COMPILER:
    pytest.skip('the compiler is installed')
  code, out, err = tiny.run(
      'plan', '--config=configs/digits.py', '--topology=v5e:2x2'
  )
  assert code == 2 and 'mocov3_jax[tpu]' in err, err
  assert 'Traceback' not in err and not out


@pytest.mark.parametrize('given, words', [
    ('h100', 'h100:1 to h100:8'), ('h100:9', 'h100:1 to h100:8'),
    ('h1000:1', 'a100, h100, h200, v4'),
])
def test_a_gpu_that_cannot_be_is_named(given, words):
  with pytest.raises(UserError, match=words):
    topology.get_slice(given)


@pytest.mark.parametrize('options, words', [
    ({'shares': ['8', 'x']}, '--images_per_chip=8,x'),
    ({'shares': ['0']}, '--images_per_chip=0'),
    ({'dump': '.'}, '--dump=. is not empty'),
])
def test_options_that_cannot_be_are_named(monkeypatch, options, words):
  with pytest.raises(UserError, match=words):
    planned(monkeypatch, COST, options=options)


def test_shares_of_a_batch_are_compared(monkeypatch, capsys):
  # The larger share takes twice as long an image.
  def measure(config, *_):
    share = config.batch_size // 4
    time = share * (1.0 if share <= 16 else 2.0)
    return dataclasses.replace(COST, breakdown=Breakdown(
        Time(bound_ms=time), {}, {}, 0.0, 0, 0
    ))

  report = planned(
      monkeypatch, measure, 6400, options={'shares': ['16', '32']}
  )
  assert report['images_per_chip'] == 16
  assert report['shares'] == {
      '16': pytest.approx(1.0), '32': pytest.approx(2.0)
  }
  assert 'try --config.micro_batch=16' in capsys.readouterr().err


def test_the_table_tells_parts_and_networks(monkeypatch, capsys):
  cost = dataclasses.replace(COST, breakdown=Breakdown(
      Time(1.0, 2.0, 3.0, 4.5), {'MLP': Time(1.0, 0.5, 2.0, 2.5)},
      {'backward': Time(0.5, 0.5, 0.5, 0.75)}, 0.25, 3, 0,
  ))
  report = planned(monkeypatch, cost, 6400)
  assert (report['flops_ms'], report['hbm_ms']) == (1.0, 2.0)
  assert (report['schedule_ms'], report['bound_ms']) == (3.0, 4.5)
  assert report['parts']['MLP']['bound_ms'] == 2.5
  # It is more than what the products take at the peak.
  assert report['seconds_bound'] == pytest.approx(4.5e-3)
  assert report['bound_by'] == 'program'
  told = capsys.readouterr().err
  for words in (
      'MLP                           2.50      1.00      0.50      2.00',
      '0.25 ms of copies', '3 operations have loops', 'not measured',
  ):
    assert words in told, told


def test_a_planned_step_is_timed_on_these_devices_alone():
  c = tiny.config()
  steps = config_lib.plan(c, 1437)
  count, kind = jax.device_count(), jax.devices()[0].device_kind
  assert timing.step_seconds(c, steps, ('TPU v4',), count) is None
  assert timing.step_seconds(c, steps, (kind,), count + 1) is None
  assert timing.step_seconds(c, steps, (kind,), count) > 0


GPU_PROGRAM = """
%graph (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %gemm = bf16[8]{0} custom-call(%p), custom_call_target="__cublas$lt$matmul"
  ROOT %f = bf16[8]{0} fusion(%gemm), kind=kCustom, calls=%x, \
backend_config={"fusion_backend_config":{"kind":"__triton"}}
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %p.1 = bf16[8]{0} parameter(0)
  %c = bf16[8]{0} custom-call(%p.1), custom_call_target="__cudnn$fmhaSoftmax"
  %l = bf16[8]{0} fusion(%c), kind=kLoop, calls=%y
  ROOT %call = bf16[8]{0} call(%l), to_apply=%graph
}
"""


def test_kernels_are_counted_by_library():
  assert gpus.kernels(GPU_PROGRAM) == {
      'cuDNN attention': 1, 'XLA': 1, 'cuBLAS': 1, 'Triton': 1
  }


def planned_for_real(*arguments):
  """Runs `plan` as a user does: libtpu ends at flags of XLA for CPUs."""
  process = tiny.start('plan', *arguments, env_add={'XLA_FLAGS': ''})
  return tiny.finish(process, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason='needs libtpu')
@pytest.mark.parametrize('slice_', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1',
                                    'v6e:1x1'])
def test_the_kernels_compile_for_each_chip(slice_):
  code, out, err = planned_for_real(
      '--config=configs/imagenet/vit_s16.py', f'--topology={slice_}',
      '--config.batch_size=8', '--config.model.depth=2',
      '--config.head.hidden_dim=512', '--config.model.dtype=bfloat16',
  )
  assert code == 0, err
  report = json.loads(out.splitlines()[-1])
  assert report['attention'] == 'pallas' and report['fits']
  assert report['parts']['attention']['flops_ms'] > 0


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason='needs libtpu')
def test_a_small_network_is_planned_for_real():
  code, out, err = planned_for_real(
      '--config=configs/imagenet/vit_s16.py', '--topology=v5e:2x2',
      '--config.batch_size=64', '--config.model.depth=2',
      '--config.head.hidden_dim=512', '--price=1',
  )
  assert code == 0, err
  report = json.loads(out.splitlines()[-1])
  assert report['fits'] and report['chips'] == 4
  assert report['compiled_flops'] == pytest.approx(
      report['model_flops'], rel=0.1
  )
  assert set(report['collectives']) == {'all-gather', 'all-reduce'}
  assert report['dollars'] == pytest.approx(report['chip_hours'])
  assert 0 < report['hours_bound'] < report['hours']
  assert report['mfu'] == pytest.approx(0.4) and report['mfu_bound'] > 0.4
  # The set is not here, and known all the same.
  assert report['images'] == 1_281_167
  assert 'lower bound' in err and 'at 40% MFU' in err and '$' in err
