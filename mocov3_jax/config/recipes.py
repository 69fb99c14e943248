"""Which file --config names: one of the user's, or a recipe of the package."""

import os
import pathlib

from mocov3_jax.base.errors import UserError

# A wheel has the recipes within the package, a clone beside it.
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
    given: FILE[:argument], where FILE is a path; or the name of a recipe, with
      or without `configs/` before it and `.py` behind it. A file that is there
      comes first.
    flag: by which it was given, for the message.

  Returns:
    The path of the file, with the argument.

  Raises:
    UserError: if there is no such file, or it is no Python file. A config file
      is a program, and something else by a mistake should not be run as one.
  """
  path, colon, argument = given.partition(':')
  if path.endswith(SUFFIX) and os.path.isfile(path):
    return given
  name = path.removeprefix('configs/').removesuffix(SUFFIX)
  if name in names():
    return f'{folder() / name}{SUFFIX}{colon}{argument}'
  if os.path.isfile(path):
    raise UserError(
        f'{flag}={path} is no Python file. Use a file that ends with {SUFFIX}, '
        'which is run as a program; or the name of a recipe. The config.json '
        'of a run has the values for --config.FIELD=VALUE.'
    )
  what = 'is a folder' if os.path.isdir(path) else 'does not exist'
  raise UserError(
      f'{flag}={path} {what}. Use a config file, or one of the recipes: '
      f'{", ".join(names())}.'
  )
