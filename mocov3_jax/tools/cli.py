"""Flags in, one JSON line and an exit code out: the frame of each command."""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import signal
import sys
from typing import Any

from absl import flags, logging

from mocov3_jax.errors import Preempted, UserError

BAD_INPUT, INTERRUPTED, PREEMPTED = 2, 130, 143


def run(main: Callable[[], dict[str, Any]]) -> None:
  """Runs a command and exits.

  Prints the result of `main` as one JSON object on the last line of stdout.
  Exit codes: 0 done; 2 bad input (one message on stderr); 130 Ctrl-C; 143
  preempted after a complete save. Anything else is a bug, with a traceback.

  Args:
    main: the command; reads its flags.
  """
  # Orbax's and JAX's informative messages would drown the progress.
  logging.set_verbosity(logging.ERROR)
  try:
    if {'--help', '-h', '--helpfull'} & set(sys.argv[1:]):
      print(sys.modules['__main__'].__doc__)
      print(flags.FLAGS.main_module_help())
      return
    _parse_flags(sys.argv)
    print(json.dumps(main()), flush=True)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(BAD_INPUT)
  except Preempted as e:
    print(e, file=sys.stderr)
    sys.exit(PREEMPTED)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(INTERRUPTED)


def _parse_flags(argv: list[str]) -> None:
  """Parses flags and the config file; whatever goes wrong is bad input."""
  _check_config_file(argv)
  try:
    rest = flags.FLAGS(argv)
  except UserError:
    raise
  except flags.Error as e:
    raise UserError(str(e)) from e
  except Exception as e:
    # A locked config that is asked for a new field says its name, and the
    # nearest one. Else it is the config file, which may raise anything.
    name, *hint = str(e).splitlines() or ['']
    name = name.strip('\'"')
    for given in argv:
      path = given.split('=')[0]
      if path.startswith('--config.') and name in path.split('.'):
        raise UserError(
            f'{given}: there is no config field {name!r}. {" ".join(hint)}'
        ) from e
    raise UserError(
        f'the config file cannot be used: {type(e).__name__}: {e}'
    ) from e
  if len(rest) > 1:
    raise UserError(
        f'unexpected argument {rest[1]!r}. Allowed: flags, as --name=value.'
    )


def _check_config_file(argv: list[str]) -> None:
  # ml_collections reports a missing file only once a field is read, and then
  # as an attribute error.
  for given, following in zip(argv, argv[1:] + [''], strict=True):
    if given in ('--config', '-config'):
      value = following
    elif given.startswith(('--config=', '-config=')):
      value = given.split('=', 1)[1]
    else:
      continue
    path = value.split(':')[0]  # The rest is the argument of get_config.
    if os.path.isfile(path):
      continue
    folder = os.path.dirname(path) or '.'
    names = os.listdir(folder) if os.path.isdir(folder) else []
    there = ', '.join(sorted(f for f in names if f.endswith('.py')))
    raise UserError(
        f'--config={path} does not exist. Allowed: a config file, such as '
        f'those in {folder}: {there or "none"}.'
    )


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
  """Turns SIGTERM into a question: yields f() -> whether it has come."""
  noted = []
  before = signal.signal(signal.SIGTERM, lambda *_: noted.append(True))
  try:
    yield lambda: bool(noted)
  finally:
    signal.signal(signal.SIGTERM, before)
