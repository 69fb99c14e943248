"""The planner: collectives, topologies, bounds. No TPU compiler is needed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.parallel import chips as chips_lib
from mocov3_jax.parallel import sharding
from mocov3_jax.planning import cost as cost_lib
from mocov3_jax.planning import hlo, plan, topology
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
  chips = topology.Slice('v5e:2x2', chips_lib.CHIPS['v5e'], [None] * 4)
  cost = cost_lib.Cost(
      fits=True, state=1, total=1, model_flops=1.0, traced_flops=1.0,
      compiled_flops=197e12, hbm_bytes=2 * 819e9,
      collectives={
          'all-reduce': hlo.Collectives(1, 200 * 10**9),
          'all-gather': hlo.Collectives(2, 200 * 10**9),
      },
  )
  bounds = cost_lib.seconds(cost, chips)
  assert bounds['compute'] == pytest.approx(1)
  assert bounds['memory'] == pytest.approx(2)
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


def test_a_missing_compiler_is_one_clear_message(monkeypatch):
  if not NO_COMPILER:
    pytest.skip('the compiler is installed')
  code, out, err = tiny.run(
      'plan', '--config=configs/digits.py', '--topology=v5e:2x2'
  )
  assert code == 2 and 'requirements-tpu-plan.txt' in err, err
  assert 'Traceback' not in err and not out


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason='needs libtpu')
def test_a_small_network_is_planned_for_real():
  code, out, err = tiny.run(
      'plan', '--config=configs/imagenet/vit_s16.py', '--topology=v5e:2x2',
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
  assert report['cost'] == pytest.approx(report['chip_hours'])
  assert report['hours'][0] <= report['hours'][1]
