"""The rules of docs/architecture.md, read off the source."""

import ast
import importlib.util
import pathlib
import re

import jax
import pytest

from mocov3_jax import checks, eval_config, train
from mocov3_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'mocov3_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
RECIPES = sorted((ROOT / 'configs').rglob('*.py'))
LAYERS = {
    'errors': 0, 'config': 0, 'eval_config': 0, 'checks': 0, 'passes': 0,
    'models': 1, 'objectives': 1, 'image_ops': 1, 'augment': 1, 'mixing': 1,
    'curves': 1, 'stability': 1,
    'optim': 2, 'sharding': 2, 'train_step': 2,
    'data': 3, 'checkpoint': 3, 'saved': 3, 'metrics': 3, 'workdir': 3,
    'loop': 4,
    'evals': 5,
    'tools': 6, 'train': 6, 'evaluate': 6, 'preview': 6, 'benchmark': 6,
    'extract': 6, 'convert': 6, 'plan': 6, 'visualize': 6,
    'sweep': 6, 'report': 6,
}


def module(path):
  """The first name under mocov3_jax of a file: 'data' of data/sources.py."""
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(tree):
  """The first names under mocov3_jax that a file imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        assert not alias.name.startswith('mocov3_jax.'), alias.name
    if not isinstance(node, ast.ImportFrom):
      continue
    assert node.level == 0, 'relative import'
    parts = node.module.split('.')
    if parts[0] == 'mocov3_jax':
      yield from parts[1:2] or (alias.name for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_imports_go_down(path):
  if path.name == '__init__.py' and path.parent == PACKAGE:
    return
  layer = LAYERS[module(path)]
  for name in imports(ast.parse(path.read_text())):
    if name != module(path):
      assert LAYERS[name] <= layer, f'{path.name} imports {name}'


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_files_and_functions_are_short(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 300
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      length = node.end_lineno - node.lineno + 1
      assert length <= 60, f'{path.name}: {node.name} has {length} lines'


def test_the_train_step_has_at_most_forty_lines_of_code():
  tree = ast.parse((PACKAGE / 'train_step.py').read_text())
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
    'make', [config_lib.default_config, eval_config.eval_config]
)
def test_every_field_is_read_somewhere(make):
  # A read is an attribute (c.weight_decay), outside of where it is set.
  text = '\n'.join(
      p.read_text() for p in FILES
      if p.name not in ('config.py', 'eval_config.py')
  )
  text += (PACKAGE / 'config.py').read_text().split('class Plan')[1]
  for field in leaves(make()):
    last = field.rsplit('.', 1)[-1]
    assert re.search(rf'\.{last}\b', text), field


def recipe(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_and_documents_itself(path):
  loaded = recipe(path)
  c = loaded.get_config()
  if 'protocol' in c:
    checks.validate_eval(c, 1)
  else:
    checks.validate(c, 1)
    train.build_method(c, config_lib.plan(c, 50_000))
  with pytest.raises((AttributeError, KeyError)):
    c.no_such_field = 1  # Still locked.
  for word in 'paper', 'Command:', 'Hardware', 'Expected':
    assert word in loaded.__doc__, f'{path.name} lacks {word!r}'
  assert f'configs/{path.relative_to(ROOT / "configs")}' in loaded.__doc__


def test_eight_devices_are_there():
  assert jax.device_count() == 8
