"""Flags in, one JSON line and an exit code out: the frame of each command."""

from collections.abc import Callable
import glob
import json
import logging as logging_lib
import os
import re
import sys
from typing import Any

from absl import flags, logging

from mocov3_jax.base import console, exits
from mocov3_jax.base.errors import (
  Preempted,
  UserError,
  is_out_of_memory,
  unknown,
)
from mocov3_jax.base.exits import BAD_INPUT, PREEMPTED, exit_at_once
from mocov3_jax.config import evaluation, knobs, training

LESS_MEMORY = (
    'Allowed: less at a time. A training needs less with micro_batch, '
    'model.remat=True or fsdp_devices, and may go on with them in the same '
    'workdir; or with a smaller batch_size or objective.queue, in a new one.'
)

Main = Callable[..., dict[str, Any] | None]


def run(main: Main | dict[str, Main], words: bool = False) -> None:
  """Runs a command and exits.

  Prints the result of `main` as one JSON object on the last line of stdout.
  Exit codes: 0 done; 1 another process of the run was lost; 2 bad input, or
  out of memory (one message on stderr); 130 Ctrl-C where there is nothing to
  save; 143 stopped by SIGTERM or Ctrl-C after a complete save. Anything else
  is a bug, with a traceback.

  Args:
    main: the command, which reads its flags; or commands by the word that
      chooses one of them, `python -m mocov3_jax.benchmark input`.
    words: whether the command is given, as its one argument, the words that
      are no flags.
  """
  _quieten()
  try:
    if {'--help', '-h', '--helpfull'} & set(sys.argv[1:]):
      print(sys.modules['__main__'].__doc__)
      print(flags.FLAGS.main_module_help())
      return
    given = _parse_flags(sys.argv)
    if isinstance(main, dict):
      main = main[_choose(given, main)]
    elif given and not words:
      raise UserError(
          f'unexpected argument {given[0]!r}. Allowed: flags, as --name=value.'
      )
    result = main(given) if words else main()
    if result is not None:  # One process of several speaks for all.
      print(json.dumps(result), flush=True)
  except UserError as e:
    console.say(f'error: {e}')
    exits.leave(BAD_INPUT)
  except Preempted as e:
    console.say(str(e))
    sys.exit(PREEMPTED)
  except KeyboardInterrupt:
    exit_at_once()
  except Exception as e:
    if not is_out_of_memory(e):
      raise
    what = (str(e).splitlines() or ['no memory'])[0][:200].rstrip('.')
    console.say(f'error: {what}. {LESS_MEMORY}')
    exits.leave(BAD_INPUT)


def _quieten() -> None:
  # Orbax's and JAX's informative messages would drown the progress.
  logging.set_verbosity(logging.ERROR)
  # TensorStore leaves hundreds of broken asyncio tasks behind a checkpoint
  # that cannot be read, and each is reported beside our one message.
  logging_lib.getLogger('asyncio').setLevel(logging_lib.CRITICAL)
  default = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      default(unraisable)

  sys.unraisablehook = hook


def _choose(words: list[str], allowed: dict[str, Main]) -> str:
  if len(words) != 1:
    raise UserError(
        f'{len(words)} words were given ({" ".join(words) or "none"}). '
        f'Allowed: one of {", ".join(allowed)}.'
    )
  if words[0] not in allowed:
    raise unknown('command', words[0], allowed)
  return words[0]


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags and the config file; whatever goes wrong is bad input.

  Returns:
    The words that are no flags.
  """
  _check_config_file(argv)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as e:
    raise UserError(_flag_message(str(e), argv)) from e
  except Exception as e:
    raise UserError(_config_message(e, argv)) from e
  return rest[1:]


def _flag_message(text: str, argv: list[str]) -> str:
  unusable = f'--config={_config_path(argv)} cannot be used'
  if 'Error whilst parsing config file' in text:
    return f'{unusable}: {text.splitlines()[-1]}'
  missing = re.findall(r'flag --(\w+)=None: Flag --\w+ must have', text)
  if 'config' in missing and _config_path(argv):
    return f'{unusable}: get_config() returned nothing'
  if missing:
    return f'required: {", ".join(f"--{name}=..." for name in missing)}'
  if text.startswith('Unknown command line flag'):
    text += '. A field of the config is set by --config.GROUP.FIELD=VALUE.'
  return text


def _config_message(error: Exception, argv: list[str]) -> str:
  # A locked config that is asked for a new field says its name and the
  # nearest one, wrapped in an error or two.
  kind, text = type(error).__name__, error
  while isinstance(text, Exception) and text.args:
    text = text.args[0]
  name, *hint = str(text).splitlines() or ['']
  name = name.strip('\'"')
  for given in argv:
    path = given.split('=')[0]
    if path.startswith('--config.') and name in path.split('.'):
      advice = ' '.join(hint) or _advice(path.removeprefix('--config.'))
      return f'{given}: there is no config field {name!r}. {advice}'
  why = ' '.join([name, *hint])
  return f'--config={_config_path(argv)} cannot be used: {kind}: {why}'


def _advice(field: str) -> str:
  group = field.rpartition('.')[0]
  beside = []
  for kind, schema in (
      ("a training's config, such as configs/digits.py", training.schema()),
      (
          "an evaluation's config, such as configs/eval_knn.py",
          evaluation.schema(),
      ),
  ):
    fields = knobs.flatten(schema)
    if field in fields:
      return f'It is a field of {kind}.'
    beside += [f for f in fields if group and f.rpartition('.')[0] == group]
  if not beside:
    return 'See mocov3_jax/config/training.py for all fields.'
  return f'Allowed: {", ".join(sorted(set(beside)))}.'


def _config_path(argv: list[str]) -> str | None:
  for given, following in zip(argv, argv[1:] + [''], strict=True):
    if given in ('--config', '-config'):
      value = following
    elif given.startswith(('--config=', '-config=')):
      value = given.split('=', 1)[1]
    else:
      continue
    return value.split(':')[0]  # The rest is the argument of get_config.
  return None


def _check_config_file(argv: list[str]) -> None:
  # ml_collections reports a missing file only once a field is read, and then
  # as an attribute error.
  path = _config_path(argv)
  if path is None or os.path.isfile(path):
    return
  what = 'is a folder' if os.path.isdir(path) else 'does not exist'
  there = ', '.join(sorted(glob.glob('configs/*.py')))
  raise UserError(
      f'--config={path} {what}. Allowed: a config file, such as '
      f'{there or "those of the repository"}.'
  )
