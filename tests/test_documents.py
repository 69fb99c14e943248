"""What the pages say can be done as it stands there."""

import os
import re
import runpy
import subprocess

import numpy as np
import photos
import pytest
import tiny

from mocov3_jax.sources import ArraySource


def blocks(page, language):
  """The blocks of code of a page."""
  text = (tiny.ROOT / page).read_text()
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


@pytest.mark.slow
def test_the_lines_for_python_run_in_order(tmp_path, monkeypatch, capsys):
  config = runpy.run_path(tiny.ROOT / 'configs' / 'digits.py')['get_config']()
  tiny.random_run(tmp_path / 'runs' / 'smoke', config)
  monkeypatch.chdir(tmp_path)
  names, features = {}, []
  for block in blocks('docs/python.md', 'python'):
    exec(block, names)
    if 'features' in names:
      features.append(np.asarray(names['features']))
  assert names['bank'].shape == (1437, 64) and names['queries'].shape[0] == 360
  assert names['nearest'].shape == (360, 5)
  assert names['maps'].shape == (360, 4, 5)
  np.testing.assert_allclose(names['maps'].sum(axis=2), 1, rtol=1e-5)
  assert 'kNN accuracy: 0.' in capsys.readouterr().out
  mine, linen, bridged = features
  assert mine.shape == (3, 64) and linen.shape == (2, 64)
  np.testing.assert_allclose(linen, bridged, rtol=1e-6, atol=1e-6)
  # Of another size than the network's.
  large = ArraySource(
      'large', np.zeros((3, 20, 20, 1), np.uint8), np.full(3, -1), ()
  )
  found, _ = names['run'].extract(large)
  np.testing.assert_allclose(found, mine, rtol=1e-4, atol=1e-4)


# What stands in for a line of the README that never returns, needs a network,
# or names the reader's own files.
STAND_INS = {
    # The clone is made by the test, as a reader would make it.
    r'git clone ADDRESS mocov3_jax && cd mocov3_jax': ':',
    # The requirements are those of the environment of the tests.
    r'pip install -e [^ ]+ +#.*': ':',
    r'/my/photos': 'my_photos',
}


@pytest.mark.slow
def test_the_readme_runs_in_order_in_a_fresh_clone(tmp_path):
  """All its lines of shell, one after another, as a reader types them."""
  clone = tmp_path / 'mocov3_jax'
  subprocess.run(
      ['git', 'clone', '--quiet', tiny.ROOT, clone], check=True, timeout=100
  )
  tiny.stand_in_venv(clone)
  commands = clone / '.venv' / 'bin'
  (commands / 'activate').write_text(f'PATH={commands}:$PATH\n')
  photos.write_tiles(clone / 'my_photos', tile=96, each=14)
  lines = '\n'.join(blocks('README.md', 'bash'))
  for pattern, instead in STAND_INS.items():
    lines, count = re.subn(pattern, instead, lines)
    assert count, f'the README no longer has {pattern}'
  done = subprocess.run(
      ['bash', '-euxo', 'pipefail'], input=lines, cwd=clone, text=True,
      capture_output=True, timeout=3000,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  for made in (
      'smoke.html', 'attention.png', 'features.npz', 'backbone.safetensors',
      'views.png', 'report.html', 'before.png', 'after.png',
  ):
    assert (clone / made).stat().st_size > 1000, made
