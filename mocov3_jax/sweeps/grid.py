"""The grid of a sweep: how it is read, and how its runs are named."""

from collections.abc import Iterator, Sequence
import copy
import dataclasses
import difflib
import hashlib
import itertools
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import knobs, recipes
from mocov3_jax.runs import table as sweep_table

SEED = 'seed'
# A folder's name may have 255 bytes; nothing is added to it later.
LONGEST = 200


@dataclasses.dataclass(frozen=True)
class Grid:
  """A sweep, as given on the command line.

  Attributes:
    config: FILE[:argument], the recipe of all runs.
    overrides: {field: value} for all runs, apart from the grid and the seed.
    axes: {field: its values}, without the seed.
    seeds: the seeds of each grid point.
    names: {field: its short name} of the axes and the seed.
  """

  config: str
  overrides: dict[str, Any]
  axes: dict[str, tuple[Any, ...]]
  seeds: tuple[int, ...]
  names: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Point:
  """A run of a grid.

  Attributes:
    name: name of its folder.
    title: what sets it apart from the other runs, for people.
    config: config of the run.
    flags: flags of the train command, without the workdir.
  """

  name: str
  title: str
  config: ConfigDict
  flags: list[str]


def parse(
    file: str, base: ConfigDict, overrides: dict[str, Any],
    axes: Sequence[str], seeds: int,
) -> Grid:
  """Reads the grid.

  Args:
    file: FILE[:argument], the recipe.
    base: its config, with the overrides.
    overrides: {field: value} from --config.FIELD=VALUE.
    axes: texts of the form FIELD=VALUE,VALUE,...
    seeds: number of seeds; if it is 1, the seed is that of `base`.

  Raises:
    UserError: if anything is wrong with the axes and their values. Ranges are
      not checked here.
  """
  fields = list(knobs.flatten(base.to_dict()))
  found: dict[str, tuple[Any, ...]] = {}
  for text in axes:
    field, values = _parse_axis(text, base, fields)
    if field in found:
      raise UserError(
          f'--grid {field} is given twice. Use one --grid a field, with '
          'all its values.'
      )
    found[field] = values
  if seeds > 1:
    if SEED in found:
      raise UserError(
          f'--grid seed and --seeds={seeds} are both given. Allowed: one of '
          'them.'
      )
    found[SEED] = tuple(range(seeds))
  for field in found:
    if field in overrides:
      given = f'--seeds={seeds}' if field == SEED and seeds > 1 else (
          f'--grid {field}'
      )
      raise UserError(
          f'{given} and --config.{field}={overrides[field]} are both given. '
          'Use one of them.'
      )
  return Grid(
      config=file,
      overrides={k: v for k, v in overrides.items() if k != SEED},
      axes={k: v for k, v in found.items() if k != SEED},
      seeds=found[SEED] if SEED in found else (base.seed,),
      names={field: short_name(field, fields) for field in [*found, SEED]},
  )


def _parse_axis(
    text: str, base: ConfigDict, fields: Sequence[str]
) -> tuple[str, tuple[Any, ...]]:
  field, equals, listed = text.partition('=')
  if not (field and equals):
    raise UserError(
        f'--grid {text!r} is not an axis. Allowed: FIELD=VALUE,VALUE,..., such '
        'as optimizer.lr_per_256=5e-5,1e-4.'
    )
  if field not in fields:
    near = [f for f in fields if f.startswith(field)]
    near = near or difflib.get_close_matches(field, fields, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise UserError(
        f'--grid {text}: there is no config field {field!r}.{hint} Use a '
        'field of mocov3_jax/config/training.py, as GROUP.FIELD.'
    )
  values = []
  for part in split(text, listed):
    value = _parse_value(field, part, base)
    if value in values:
      raise UserError(
          f'--grid {text}: {part} is there twice. Allowed: each value once.'
      )
    values.append(value)
  return field, tuple(values)


def split(text: str, listed: str) -> list[str]:
  """Splits at the commas outside brackets.

  Args:
    text: the whole axis, for the message.
    listed: its values.

  Raises:
    UserError: for an empty value, or an unbalanced bracket.
  """
  depth, parts = 0, ['']
  for sign in listed:
    depth += (sign in '([{') - (sign in ')]}')
    if depth < 0:
      break
    if sign == ',' and not depth:
      parts.append('')
    else:
      parts[-1] += sign
  if depth:
    raise UserError(
        f'--grid {text}: the brackets do not match. Use one closing bracket '
        'for each opening bracket.'
    )
  parts = [part.strip() for part in parts]
  if '' in parts:
    raise UserError(
        f'--grid {text}: value {parts.index("") + 1} is empty. Write '
        'values with a comma between each two.'
    )
  return parts


def _parse_value(field: str, text: str, base: ConfigDict) -> Any:
  """Returns the value that --config.FIELD=TEXT sets, by the same parser."""
  argv = ['sweep', f'--config.{field}={text}']
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
        'config', copy.deepcopy(base), flag_values=values, sys_argv=argv
    )
    values(argv)
  except (flags.Error, TypeError, ValueError) as e:
    default = knobs.flatten(base.to_dict())[field]
    raise UserError(
        f'--grid {field}={text}: {_last_line(e)}. Allowed: values of the kind '
        f'of {default!r}.'
    ) from e
  return values['config'].override_values[field]


def load_config(flag: str, path: str) -> ConfigDict:
  """Reads a config file as the commands do.

  Args:
    flag: the flag that names the file, for the message.
    path: FILE[:argument].

  Raises:
    UserError: if the file does not give a config.
  """
  argv = ['sweep', f'--{flag}={recipes.resolve(path, f"--{flag}")}']
  values = flags.FlagValues()
  try:
    holder = config_flags.DEFINE_config_file(
        flag, flag_values=values, sys_argv=argv
    )
    values(argv)
  except Exception as e:  # It is a program; anything can go wrong in it.
    raise UserError(
        f'--{flag}={path} cannot be used: {type(e).__name__}: {_last_line(e)}'
    ) from e
  if not isinstance(holder.value, ConfigDict):
    raise UserError(
        f'--{flag}={path} cannot be used: get_config() returned no ConfigDict.'
    )
  return holder.value


def _last_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [''])[-1]


def short_name(field: str, fields: Sequence[str]) -> str:
  """Returns the shortest tail of a dotted name that no other field has."""
  parts = field.split('.')
  tails = ['.'.join(parts[-n:]) for n in range(1, len(parts) + 1)]
  return next(
      tail for tail in tails
      if tail == field
      or sum(f'.{other}'.endswith(f'.{tail}') for other in fields) == 1
  )


def points(grid: Grid, base: ConfigDict) -> list[Point]:
  """Returns all runs of a grid; the seed changes fastest.

  Args:
    grid: the grid of the sweep.
    base: the config that all runs start from.
  """
  return list(_points(grid, base))


def _points(grid: Grid, base: ConfigDict) -> Iterator[Point]:
  fields = [*grid.axes, SEED]
  for values in itertools.product(*grid.axes.values(), grid.seeds):
    chosen = dict(zip(fields, values, strict=True))
    config = copy.deepcopy(base)
    config.update_from_flattened_dict(chosen)
    shown = {
        field: f'{grid.names[field]}={sweep_table.show_value(value)}'
        for field, value in chosen.items()
    }
    yield Point(
        name=folder_name([shown[f] for f in [*sorted(grid.axes), SEED]]),
        title=' '.join(shown.values()),
        config=config,
        flags=[f'--config={grid.config}'] + [
            f'--config.{field}={value}'
            for field, value in (grid.overrides | chosen).items()
        ],
    )


def folder_name(words: Sequence[str]) -> str:
  """Returns a folder name that is unique and always the same.

  Args:
    words: texts such as 'lr_per_256=0.0001', in a fixed order.
  """
  whole = ','.join(words)
  name = re.sub(r'[^\w.,=()+-]', '_', whole, flags=re.ASCII)[:LONGEST]
  if name == whole:
    return name
  # Two names may look alike after that.
  return f'{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}'
