"""The rules of docs/architecture.md, read off the source."""

import ast
import importlib.util
import pathlib
import re

import jax
import pytest
import tiny

from mocov3_jax.config import checks, evaluation
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'mocov3_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
RECIPES = sorted((ROOT / 'configs').rglob('*.py'))
# The folders from the ground up. A file may import its own folder and those of
# the floors below, so no two folders can import each other.
FLOORS = (
    ('base',),
    ('config', 'parallel'),
    ('models',),
    ('method', 'runs', 'sources', 'trackers'),
    ('data',),
    ('evals', 'weights'),
    ('training',),
    ('protocols', 'sweeps', 'reports', 'pictures', 'planning', 'benchmarks'),
)
FLOOR = {folder: n for n, folders in enumerate(FLOORS) for folder in folders}


def imported(tree):
  """The modules of the package that a file imports, without 'mocov3_jax.'."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      if name.startswith('mocov3_jax.'):
        yield name.removeprefix('mocov3_jax.')


def violations(package):
  """What in a package breaks the rule of the house, a line each."""
  found = []
  for path in sorted(package.rglob('*.py')):
    file = path.relative_to(package)
    if file.parts == ('__main__.py',):
      continue  # It maps words to commands, and so names them all.
    command = len(file.parts) == 1
    folder = file.parts[0]
    if not command and folder not in FLOOR:
      found.append(f'{file}: the folder {folder} has no floor')
      continue
    floor = len(FLOORS) if command else FLOOR[folder]
    for name in imported(ast.parse(path.read_text())):
      target = name.split('.')[0]
      if target == '__version__' or (target == folder and not command):
        continue
      if (package / f'{target}.py').exists():
        found.append(f'{file} imports the command {target}')
      elif target not in FLOOR or FLOOR[target] >= floor:
        found.append(f'{file} imports {target}, which is not below it')
  return found


def test_imports_go_down():
  assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    'files, message',
    [
        ({'data/x.py': 'from mocov3_jax.training import loop'},
         'data/x.py imports training, which is not below it'),
        ({'sweeps/x.py': 'from mocov3_jax.reports.page import page'},
         'sweeps/x.py imports reports, which is not below it'),
        ({'training/x.py': 'from mocov3_jax import train'},
         'training/x.py imports the command train'),
        ({'method/x.py': 'import mocov3_jax.runs.table',
          'runs/x.py': 'from mocov3_jax.method import build'},
         'method/x.py imports runs, which is not below it'),
        ({'tools/x.py': 'import os'},
         'tools/x.py: the folder tools has no floor'),
    ],
    ids=['upwards', 'between workshops', 'a command', 'a circle', 'a drawer'],
)
def test_the_rule_bites(tmp_path, files, message):
  (tmp_path / 'train.py').write_text('from mocov3_jax.training import loop')
  assert violations(tmp_path) == []
  for name, text in files.items():
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(text)
  assert message in violations(tmp_path)


def test_a_file_beside_the_folders_is_a_command():
  for path in PACKAGE.glob('*.py'):
    if not path.name.startswith('__'):
      assert "__name__ == '__main__'" in path.read_text(), path.name


def test_the_train_step_has_at_most_forty_lines_of_code():
  tree = ast.parse((PACKAGE / 'method' / 'train_step.py').read_text())
  step = next(
      node for node in tree.body
      if isinstance(node, ast.FunctionDef) and node.name == 'train_step'
  )
  body = step.body[1:]  # After the docstring.
  signature = step.body[0].lineno - step.lineno
  assert body[-1].end_lineno - body[0].lineno + 1 + signature <= 40


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_nothing_is_looked_up_by_string(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.Call):
      continue
    if isinstance(node.func, ast.Name):
      assert node.func.id not in ('getattr', 'eval', 'exec', '__import__')
    if isinstance(node.func, ast.Attribute):
      assert node.func.attr != 'import_module'
      owner = ast.unparse(node.func.value)
      # The one plain dict that is asked this way; never a config.
      assert node.func.attr != 'get' or owner in ('old', 'new'), owner


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_no_tensorflow(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      assert name.split('.')[0] != 'tensorflow', name
      assert not name.startswith('clu.metric_writers'), name


def leaves(config, prefix=''):
  for name, value in config.items():
    if hasattr(value, 'items'):
      yield from leaves(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}'


@pytest.mark.parametrize(
    'make', [config_lib.default_config, evaluation.eval_config]
)
def test_every_field_is_read_somewhere(make):
  # A read is an attribute (c.weight_decay), outside of where it is set.
  text = '\n'.join(
      p.read_text() for p in FILES
      if p.parent.name != 'config'
  )
  settings = PACKAGE / 'config' / 'training.py'
  text += settings.read_text().split('class Plan')[1]
  for field in leaves(make()):
    last = field.rsplit('.', 1)[-1]
    assert re.search(rf'\.{last}\b', text), field


def recipe(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_and_documents_itself(path, tmp_path):
  loaded = recipe(path)
  arguments = ()
  if path.stem == 'continue':  # From what, it cannot know.
    arguments = [str(tiny.random_run(tmp_path / 'run', tiny.config()))]
  c = loaded.get_config(*arguments)
  if 'protocol' in c:
    checks.validate_eval(c, 1)
  else:
    checks.validate(c, 1)
    build_method(c, config_lib.plan(c, 50_000))
  with pytest.raises((AttributeError, KeyError)):
    c.no_such_field = 1  # Still locked.
  for word in 'paper', 'Command:', 'Hardware', 'Expected':
    assert word in loaded.__doc__, f'{path.name} lacks {word!r}'
  assert f'configs/{path.relative_to(ROOT / "configs")}' in loaded.__doc__


def test_eight_devices_are_there():
  assert jax.device_count() == 8
