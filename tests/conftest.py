"""Strict numerics, eight CPU devices to shard over, and quick compilation."""

import os
import shutil

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile more than they compute: LLVM does little for them, XLA does the
# same. The commands that they start compute more.
QUICK = '--xla_backend_optimization_level='
if jax.__version_info__ < (0, 11):
  # Halves the time to compile. A flag that XLA does not know ends the process,
  # so newer versions have to be tried before they get it.
  QUICK = (
      '--xla_cpu_use_fusion_emitters=false '
      f'--xla_llvm_disable_expensive_passes=true {QUICK}'
  )
os.environ['XLA_FLAGS'] = f'{QUICK}0'
jax.devices()  # Reads them.
os.environ['XLA_FLAGS'] = f'{QUICK}1'


# Bytes of compiled programs that are kept for the next time.
MOST_COMPILED = 2**30
# These take longest. They come first, so that no process ends up with one of
# them alone.
LONGEST = (
    'test_models', 'test_no_number', 'test_resume', 'test_sharding',
    'test_bad_input', 'test_evaluate', 'test_convert', 'test_report',
    'test_hostile', 'test_golden_step', 'test_visualize', 'test_processes',
    'test_photos', 'test_buckets', 'test_hosts',
)


def pytest_collection_modifyitems(items):
  places = {name: place for place, name in enumerate(LONGEST)}
  items.sort(
      key=lambda item: places[item.path.stem]
      if item.path.stem in places else len(places)
  )


def pytest_sessionstart(session):
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    folder = session.config.cache.mkdir('compiled')
    if sum(path.stat().st_size for path in folder.iterdir()) > MOST_COMPILED:
      shutil.rmtree(folder)


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory, pytestconfig):
  """Lets tests, and the commands that they start, share compiled programs.

  Most of what tests do is to compile: tiny trainings, of few kinds. What was
  compiled is kept in .pytest_cache, for the next time.
  """
  folder = str(pytestconfig.cache.mkdir('compiled'))
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', folder)
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    # Listings of folders are nothing to leave in the user's own cache.
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    yield
