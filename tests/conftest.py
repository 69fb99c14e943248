"""Strict numerics, eight CPU devices to shard over, and quick compilation."""

import os

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests compile more than they compute: LLVM does little for them, XLA does the
# same. The commands that they start compute more.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
jax.devices()  # Reads them.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=1'


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Lets all tests, and the commands they start, share compiled programs."""
  folder = tmp_path_factory.getbasetemp().parent / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(folder))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    yield
