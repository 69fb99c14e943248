"""The golden tests are awake: each known mistake makes one of them fail.

Every mutation is put into a copy of the package, and the tests named beside it
run against the copy.
"""

import os
import shutil
import subprocess
import sys

import pytest
import tiny

# name: (file, what is there, what the mistake writes, the tests that see it)
MUTATIONS = {
    'tanh GELU': (
        'models/recompute.py', 'jax.lax.erf(wide / math.sqrt(2))',
        'jnp.tanh(0.7978845608 * (wide + 0.044715 * wide**3))',
        'test_golden_step.py',
    ),
    'BatchNorm epsilon 1e-6': (
        'models/layers.py', 'epsilon: float = 1e-5', 'epsilon: float = 1e-6',
        'test_golden_step.py',
    ),
    'gradient of the softmax without its mean': (
        'models/attention.py', 'to_weights - mean', 'to_weights',
        'test_golden_step.py',
    ),
    'softmax without its maximum': (
        'models/attention.py', 'logits - jnp.max(logits, -1, keepdims=True)',
        'logits', 'test_models.py',
    ),
    'biased running variance': (
        'models/layers.py', 'self.momentum * (unbiased',
        'self.momentum * (var', 'test_golden_step.py',
    ),
    'EMA after the optimizer step': (
        'method/train_step.py', '      target_params=target_params,\n',
        '      target_params=ema(\n'
        '          state.target_params, encoder(params), momentum\n'
        '      ),\n',
        'test_golden_training.py',
    ),
    'keys from the target before it moved': (
        'method/train_step.py',
        '      method, target_params, state.target_batch_stats, views\n',
        '      method, state.target_params, state.target_batch_stats, views\n',
        'test_golden_step.py',
    ),
    'learning rate inside the LARS momentum': (
        'method/optimizers.py',
        '      optax.trace(c.momentum),\n'
        '      optax.scale_by_learning_rate(learning_rate),\n',
        '      optax.scale_by_learning_rate(learning_rate),\n'
        '      optax.trace(c.momentum),\n',
        'test_optim.py',
    ),
    'decay on the frozen patch projection': (
        'method/optimizers.py', 'if not frozen:', 'if True:',
        'test_golden_training.py',
    ),
    'both views through one BatchNorm': (
        'models/__init__.py',
        '  views = [part(x[:, v], train) for v in range(x.shape[1])]\n',
        '  both = part(x.reshape(-1, x.shape[-1]), train)\n'
        '  views = list(both.reshape(*x.shape[:2], -1).swapaxes(0, 1))\n',
        'test_golden_step.py',
    ),
    'q, k and v initialised as one matrix': (
        'models/attention.py',
        'DenseParams(3 * dim, init,',
        'DenseParams(3 * dim, xavier(dim, 3 * dim),',
        'test_models.py',
    ),
    'stride in the first convolution of a bottleneck': (
        'models/resnet.py',
        "          (self.channels, 1, 1),\n"
        "          (self.channels, 3, self.stride),\n",
        "          (self.channels, 1, self.stride),\n"
        "          (self.channels, 3, 1),\n",
        'test_golden_step.py',
    ),
    'patch projection left to learn': (
        'models/vit.py', "if self.patch_embed == 'frozen':", 'if False:',
        'test_golden_step.py',
    ),
    'loss without the factor 2T': (
        'method/objectives.py', 'return 2 * temperature * loss', 'return loss',
        'test_golden_step.py',
    ),
    'positions with rows and columns exchanged': (
        'models/vit.py', 'row, column = np.divmod', 'column, row = np.divmod',
        'test_models.py',
    ),
    'decoupled decay of matrices only': (
        'method/optimizers.py',
        "MASKS = {'all': None", "MASKS = {'all': is_kernel",
        'test_optim.py',
    ),
    'warm-up one step early': (
        'method/optimizers.py',
        '(peak - start) * step', '(peak - start) * (step + 1)',
        'test_optim.py',
    ),
}


def run_tests(folder, tests):
  """Runs one file of tests against the package in `folder`."""
  return subprocess.run(
      # All of its tests, also those that the suite leaves for `-m slow`.
      [sys.executable, '-m', 'pytest', '-x', '-q', '-m', '',
       f'tests/{tests}'],
      cwd=folder, capture_output=True, text=True,
      env=os.environ | {'PYTHONPATH': str(folder)},
  )


@pytest.fixture
def copy(tmp_path):
  """A copy of the package, its tests and its settings."""
  ignore = shutil.ignore_patterns('__pycache__')
  for name in 'mocov3_jax', 'tests':
    shutil.copytree(tiny.ROOT / name, tmp_path / name, ignore=ignore)
  shutil.copy(tiny.ROOT / 'pyproject.toml', tmp_path)
  return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('tests', sorted({m[3] for m in MUTATIONS.values()}))
def test_the_copy_passes_unchanged(copy, tests):
  result = run_tests(copy, tests)
  assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTATIONS)
def test_a_mutation_is_noticed(copy, name):
  file, before, after, tests = MUTATIONS[name]
  path = copy / 'mocov3_jax' / file
  text = path.read_text()
  assert text.count(before) == 1, f'{name}: the code has changed'
  path.write_text(text.replace(before, after))
  result = run_tests(copy, tests)
  # 1: a test failed. Anything else is a test that could not run.
  assert result.returncode == 1, result.stdout
  assert 'AssertionError' in result.stdout or 'assert' in result.stdout


def test_every_mutation_still_fits_the_code():
  for name, (file, before, _, _) in MUTATIONS.items():
    text = (tiny.ROOT / 'mocov3_jax' / file).read_text()
    assert text.count(before) == 1, name
