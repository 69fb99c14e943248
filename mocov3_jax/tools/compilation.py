"""What was compiled once need not be compiled again."""

import pathlib

import jax

FOLDER = pathlib.Path('~/.cache/mocov3_jax/compiled')


def keep_compiled() -> None:
  """Keeps compiled programs on disk, for the next start of the same run.

  In the folder that JAX_COMPILATION_CACHE_DIR names, or else in `FOLDER`. Not
  for CPUs unless it is named: their programs are quick to compile, and bound
  to the very processor. JAX_ENABLE_COMPILATION_CACHE=false turns it off.
  """
  if jax.config.jax_compilation_cache_dir or jax.default_backend() == 'cpu':
    return
  jax.config.update('jax_compilation_cache_dir', str(FOLDER.expanduser()))
