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
  """Lets the commands that tests start share their compiled programs.

  Not the tests' own process, which has read its environment before.
  """
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp('compiled')
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(folder))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    yield
