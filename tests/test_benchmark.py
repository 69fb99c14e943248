"""The benchmarks run, and count what they say they count."""

import importlib.util
import json
import subprocess
import sys

import jax
import photos
import pytest
import tiny

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.benchmarks import step, step_process
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.parallel import chips, processes
from mocov3_jax.training import flops as flops_lib
from mocov3_jax.training import pretrain

FLAGS = {
    'batch_size': 16, 'data.image_size': 32, 'data.mean': '(.5,.5,.5)',
    'data.std': '(.2,.2,.2)', 'model.patch_size': 8,
}


@pytest.mark.slow
def test_input_is_compared_with_the_pillow_chain(tmp_path):
  photos.write_tiles(tmp_path, tile=48, each=4)
  flags = tiny.flags(**FLAGS, **{'data.source': f'folder:{tmp_path}'})
  code, out, err = tiny.run(
      'benchmark', 'input', '--images=32', '--rounds=1', *flags
  )
  assert code == 0, err
  result = json.loads(out)
  rates = result['images_per_second']
  assert {'1 threads', '2 threads', '1 Pillow processes'} <= rates.keys()
  assert min(rates.values()) > 0
  ratio = rates['1 threads'] / rates['1 Pillow processes']
  assert abs(result['ratio_by_cores']['1'] - ratio) < 1e-6
  assert 'times the Pillow chain' in err


def test_commands_start_without_what_they_may_not_need():
  # tensorboardX imports PyTorch where there is one, whose memory `benchmark
  # step` would count as ours; scikit-learn takes as long as all the rest.
  code = (
      'import sys\n'
      'from mocov3_jax import evaluate, sweep, visualize\n'
      'from mocov3_jax.benchmarks import jax_step\n'
      'assert not {"torch", "tensorboardX", "sklearn"} & set(sys.modules)\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=tiny.ROOT, check=True)


@pytest.mark.slow
def test_the_share_of_the_augmentation_is_measured():
  code, out, err = tiny.run(
      'benchmark', 'augment', '--rounds=1', *tiny.flags(**FLAGS)
  )
  assert code == 0, err
  result = json.loads(out)
  assert 0 < result['augment_flops'] < result['step_flops']
  assert abs(
      result['share_of_flops']
      - result['augment_flops'] / result['step_flops']
  ) < 1e-9


@pytest.mark.slow
def test_the_step_is_timed_against_a_measured_ceiling():
  code, out, err = tiny.run(
      'benchmark', 'step', '--against=none', '--rounds=1', '--steps=2',
      *tiny.flags(**FLAGS),
  )
  assert code == 0, err
  result = json.loads(out)
  ours = result['jax']
  assert ours['images_per_second'] > 0 and ours['first_step_seconds'] > 0
  assert ours['peak_memory'] > 2**20
  # No CPU has a published peak; what a matrix product reaches is measured.
  assert ours['mfu_peak'] is None
  used = result['step_flops'] / 16 * ours['images_per_second']
  assert ours['mfu_ceiling'] == pytest.approx(used / result['ceiling_flops'])
  assert 'img/s' in err and 'ratio' not in result


def test_step_refuses_an_unknown_opponent():
  code, _, err = tiny.call(
      'benchmark', 'step', '--against=keras', *tiny.flags(**FLAGS)
  )
  assert code == 2 and 'compiled, eager, none' in err, err


@pytest.mark.skipif(
    importlib.util.find_spec('torch') is not None, reason='PyTorch is here'
)
def test_step_says_how_to_get_pytorch():
  with pytest.raises(UserError, match=r'mocov3_jax\[torch\]'):
    step_process.torch_step(config_lib.default_config(), compiled=True)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
  tried = []

  def measured(config, *_):
    tried.append(config.batch_size)
    if config.batch_size > 128:
      raise step_process.OutOfMemory('full')
    return config.model.name

  monkeypatch.setattr(step, 'benchmark_step', measured)
  results = step.benchmark_suite(
      config_lib.default_config(), 'none', 1, 1
  )
  assert list(results) == ['vit_s', 'vit_b', 'vit_l', 'resnet50']
  assert tried[:4] == [1024, 512, 256, 128]


def runs_out(_):
  raise MemoryError  # Python's own has no message.


def test_a_lack_of_memory_in_the_process_of_a_step_is_told():
  with step_process.stepper(dict) as ask:
    with pytest.raises(step_process.OutOfMemory, match='MemoryError'):
      ask(runs_out)


def test_what_is_computed_again_does_not_count_as_work():
  flops = []
  for changes in {}, {'model.remat': True}, {'micro_batch': 8}:
    c = tiny.config(**changes)
    method = build_method(c, config_lib.plan(c, 1437))
    flops.append(flops_lib.step_flops(method, (8, 8, 1), c.batch_size))
  assert flops[0] == flops[1] == flops[2] > 0


@pytest.mark.slow
def test_mfu_is_logged_where_the_peak_is_known(tmp_path, monkeypatch):
  c = tiny.config(**{'schedule.steps': 3, 'schedule.warmup_epochs': 0.0})
  monkeypatch.setitem(
      chips.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12
  )
  result = pretrain.pretrain(c, str(tmp_path / 'run'))
  method = build_method(c, config_lib.plan(c, 1437))
  flops = flops_lib.step_flops(method, (8, 8, 1), 64) / 64
  peak = 1e12 * jax.device_count()
  rows = [r for r in tiny.metrics(tmp_path / 'run') if 'train/mfu' in r]
  assert len(rows) == 3
  assert result['train/mfu'] == pytest.approx(
      result['train/images_per_second'] * flops / peak
  )


def test_programs_for_a_cpu_are_kept_only_on_request(monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    processes.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    processes.enable_compilation_cache()
    kept = jax.config.jax_compilation_cache_dir
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert kept == str(files.user_cache('compiled'))
