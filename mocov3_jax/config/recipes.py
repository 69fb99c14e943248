"""Finds the file that --config names: a user's file or a packaged recipe."""

import os
import pathlib

from mocov3_jax.base.errors import UserError

# A wheel has the recipes inside the package, a clone beside it.
_PACKAGE = pathlib.Path(__file__).parents[1]
FOLDERS = _PACKAGE / 'configs', _PACKAGE.parent / 'configs'
SUFFIX = '.py'


def folder() -> pathlib.Path:
  """Returns the folder of the recipes that come with the package."""
  return next(path for path in FOLDERS if path.is_dir())


def names() -> list[str]:
  """Returns the names of these recipes, such as 'imagenet/vit_b16'."""
  return sorted(
      path.relative_to(folder()).with_suffix('').as_posix()
      for path in folder().rglob(f'*{SUFFIX}') if path.name != '__init__.py'
  )


def resolve(given: str, flag: str = '--config') -> str:
  """Finds a config file.

  Args:
    given: FILE[:argument]. FILE is a path, or the name of a recipe with or
      without a leading `configs/` and a trailing `.py`. An existing file takes
      precedence over a recipe.
    flag: the flag that it was given by, for the message.

  Returns:
    The path of the file, with the argument.

  Raises:
    UserError: if there is no such file, or it is not a Python file. A config
      file is run as a program, so other files must not be taken by mistake.
  """
  path, colon, argument = given.partition(':')
  if path.endswith(SUFFIX) and os.path.isfile(path):
    return given
  name = path.removeprefix('configs/').removesuffix(SUFFIX)
  if name in names():
    return f'{folder() / name}{SUFFIX}{colon}{argument}'
  if os.path.isfile(path):
    raise UserError(
        f'{flag}={path} is not a Python file. Use a file that ends with '
        f'{SUFFIX}, which is run as a program; or the name of a recipe. The '
        'config.json of a run has the values for --config.FIELD=VALUE.'
    )
  what = 'is a folder' if os.path.isdir(path) else 'does not exist'
  raise UserError(
      f'{flag}={path} {what}. Use a config file, or one of the recipes: '
      f'{", ".join(names())}.'
  )
