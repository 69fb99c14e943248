"""What people install: the wheel, its recipes and its command."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import recipes

RECIPES = sorted((tiny.ROOT / 'configs').rglob('*.py'))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy, since building leaves folders behind."""
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  for name in (
      'mocov3_jax', 'configs', 'docs/package.md', 'pyproject.toml',
      'requirements.txt', 'LICENSE',
  ):
    target = source / name
    target.parent.mkdir(exist_ok=True)
    (shutil.copytree if (tiny.ROOT / name).is_dir() else shutil.copy)(
        tiny.ROOT / name, target
    )
  done = subprocess.run(
      [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
       '--no-build-isolation', '--wheel-dir', folder, source],
      capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stderr
  (found,) = folder.glob('*.whl')
  return found


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """A folder that has the wheel's files, as site-packages would."""
  folder = tmp_path_factory.mktemp('installed')
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder)
  return folder


def run(installed, cwd, *arguments):
  process = subprocess.run(
      [sys.executable, '-m', 'mocov3_jax', *arguments], cwd=cwd, text=True,
      capture_output=True, timeout=300,
      env=os.environ | tiny.here() | {
          'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu'
      },
  )
  return process.returncode, process.stdout, process.stderr


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as file:
    names = {n for n in file.namelist() if '.dist-info/' not in n}
    about = next(n for n in file.namelist() if n.endswith('/METADATA'))
    described = file.read(about).decode()
  package = {
      str(p.relative_to(tiny.ROOT))
      for p in (tiny.ROOT / 'mocov3_jax').rglob('*')
      if p.is_file() and '__pycache__' not in p.parts
  }
  recipe_files = {
      f'mocov3_jax/{p.relative_to(tiny.ROOT)}' for p in RECIPES
  }
  assert names == package | recipe_files
  assert 'License-Expression: Apache-2.0' in described
  # A relative link or picture is dead where the page is shown.
  text = described.split('\n\n', 1)[1]
  assert '](' in text and all(
      part.startswith(('http', '#')) for part in text.split('](')[1:]
  )


@pytest.mark.slow
def test_an_installed_recipe_is_named_from_any_folder(installed, tmp_path):
  code, out, err = run(
      installed, tmp_path, 'preview', '--config=digits:simclr', '--count=2',
      f'--out={tmp_path / "views.png"}',
  )
  assert code == 0 and (tmp_path / 'views.png').exists(), err


@pytest.mark.slow
def test_what_is_installed_trains_and_evaluates(installed, tmp_path):
  workdir = tmp_path / 'run'
  code, out, err = run(
      installed, tmp_path, 'train', '--config=digits:simclr',
      f'--workdir={workdir}', *tiny.flags()[1:], '--config.schedule.steps=2',
      '--config.schedule.warmup_epochs=0.05',
  )
  assert code == 0, err
  assert json.loads(out.splitlines()[-1])['step'] == 2
  config = json.loads((workdir / 'config.json').read_text())
  assert config['objective']['name'] == 'simclr'
  code, out, err = run(
      installed, tmp_path, 'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={workdir}', f'--workdir={tmp_path / "knn"}',
  )
  assert code == 0, err


def test_a_sweep_takes_names_and_prints_them(tmp_path):
  code, out, err = tiny.call(
      'sweep', '--config=digits', f'--workdir={tmp_path / "s"}', '--seeds=2',
      '--evaluate=eval_linear:small', '--print=commands',
  )
  assert code == 0, err
  assert out.count('--config=digits ') == 2
  assert out.count('--config=eval_linear:small') == 2


@pytest.mark.parametrize('given, file', [
    ('digits', 'digits.py'), ('digits.py', 'digits.py'),
    ('configs/digits.py', 'digits.py'), ('configs/digits', 'digits.py'),
    ('imagenet/vit_b16:100', 'imagenet/vit_b16.py:100'),
    ('folder:/my/a:b', 'folder.py:/my/a:b'),
])
def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch, given, file):
  monkeypatch.chdir(tmp_path)
  assert recipes.resolve(given) == f'{recipes.folder()}/{file}'
  # A file that is there comes first.
  name, colon, argument = given.partition(':')
  mine = pathlib.Path(name).with_suffix('.py')
  mine.parent.mkdir(exist_ok=True)
  mine.touch()
  mine = f'{mine}{colon}{argument}'
  assert recipes.resolve(mine) == mine


@pytest.mark.parametrize('given', [
    'digit', '../configs/digits', '/configs/digits.py', 'imagenet', '', ':x',
    'digits/../digits', '.',
])
def test_what_is_no_recipe_is_refused_with_their_names(
    tmp_path, monkeypatch, given
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match='eval_knn.*imagenet/vit_b16'):
    recipes.resolve(given)


def test_what_is_no_program_is_not_run_as_one(tmp_path):
  file = tmp_path / 'config.json'
  file.write_text(f'open({str(tmp_path / "ran")!r}, "w")\n')
  code, _, err = tiny.call(
      'train', f'--config={file}', f'--workdir={tmp_path / "run"}'
  )
  assert code == 2 and 'is not a Python file' in err
  assert not (tmp_path / 'ran').exists()


def test_all_recipes_have_names():
  assert recipes.names() == sorted(
      p.relative_to(tiny.ROOT / 'configs').with_suffix('').as_posix()
      for p in RECIPES
  )


def test_the_versions_of_python_are_the_same_everywhere():
  project = tomllib.loads((tiny.ROOT / 'pyproject.toml').read_text())['project']
  named = [
      c.rpartition(' ')[2] for c in project['classifiers']
      if c.startswith('Programming Language :: Python :: 3.')
  ]
  assert named == ['3.11', '3.12', '3.13', '3.14']
  assert project['requires-python'] == '>=3.11,<3.15'
  assert '(3, 11) <= sys.version_info[:2] <= (3, 14)' in (
      tiny.ROOT / 'launch' / 'venv.sh'
  ).read_text()
