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
    UserError: if there is no such file.
  """
  path, colon, argument = given.partition(':')
  if not os.path.isfile(path):
    name = path.removeprefix('configs/').removesuffix(SUFFIX)
    if name not in names():
      what = 'is a folder' if os.path.isdir(path) else 'does not exist'
      raise UserError(
          f'{flag}={path} {what}. Use a config file, or one of the recipes: '
          f'{", ".join(names())}.'
      )
    path = str(folder() / f'{name}{SUFFIX}')
  return f'{path}{colon}{argument}'
