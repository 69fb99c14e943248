"""Flags in, one JSON line and an exit code out: the frame of each command."""

from collections.abc import Callable, Iterator
import difflib
import json
import logging as logging_lib
import os
import pathlib
import re
import sys
import types
from typing import Any
import warnings

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mocov3_jax.base import console, exits
from mocov3_jax.base.errors import (
  Preempted,
  UserError,
  is_disk_full,
  is_no_backend,
  is_of_bucket,
  is_out_of_memory,
  may_pass,
  unknown,
)
from mocov3_jax.base.exits import (
  BAD_INPUT,
  INTERRUPTED,
  PREEMPTED,
  UNREACHABLE,
)
from mocov3_jax.config import evaluation, knobs, recipes, training

LESS_MEMORY = (
    'Try less at a time. A training needs less with micro_batch, '
    'model.remat=True or fsdp_devices, and may go on with them in the same '
    'workdir; or with a smaller batch_size or objective.queue, in a new one.'
)
MORE_SPACE = (
    'Make room, and run the same line again. What was saved before is '
    'whole.'
)
OTHER_BACKEND = (
    'Use a backend that this machine has, by JAX_PLATFORMS=cpu and the '
    'like; without that variable JAX takes the best one.'
)

BUCKET = (
    'Use a bucket that is there and that this account may read and write '
    '(`gcloud auth application-default login`; on a VM, its service account), '
    'and run the same line again. What was saved before is whole.'
)

# Google's number on the PCI bus.
TPU_VENDOR = '0x1ae0'

# What a command does once its flags are read: returns the results, or None in
# all processes of a run but the first.
Action = Callable[..., dict[str, Any] | None]


class Flags:
  """The flags of one command.

  Each method defines a flag and returns its holder, whose `value` is known
  once the command line is parsed. Without a default a flag is None, and has to
  be given if it is `required`.
  """

  def __init__(self, argv: list[str]):
    """Begins without flags.

    Args:
      argv: the command line; it says which fields of a config are flags.
    """
    self._argv = argv
    self._values = flags.FlagValues()

  def string(
      self, name: str, default: str | None, about: str, required: bool = False
  ) -> flags.FlagHolder[str]:
    """Defines --name=TEXT."""
    return flags.DEFINE_string(
        name, default, about, required=required, flag_values=self._values
    )

  def integer(
      self, name: str, default: int | None, about: str,
      at_least: int | None = None,
  ) -> flags.FlagHolder[int]:
    """Defines --name=NUMBER."""
    return flags.DEFINE_integer(
        name, default, about, lower_bound=at_least, flag_values=self._values
    )

  def number(
      self, name: str, default: float, about: str
  ) -> flags.FlagHolder[float]:
    """Defines --name=NUMBER, which may have a fraction."""
    return flags.DEFINE_float(name, default, about, flag_values=self._values)

  def switch(
      self, name: str, default: bool, about: str
  ) -> flags.FlagHolder[bool]:
    """Defines --name and --noname."""
    return flags.DEFINE_bool(name, default, about, flag_values=self._values)

  def names(self, name: str, about: str) -> flags.FlagHolder[list[str]]:
    """Defines --name=TEXT,TEXT,...; none by default."""
    return flags.DEFINE_list(name, [], about, flag_values=self._values)

  def repeated(self, name: str, about: str) -> flags.FlagHolder[list[str]]:
    """Defines --name=TEXT, which may be given several times."""
    return flags.DEFINE_multi_string(
        name, [], about, flag_values=self._values
    )

  def config(
      self, about: str, required: bool = True
  ) -> flags.FlagHolder[ConfigDict]:
    """Defines --config=FILE[:argument] and --config.FIELD=VALUE.

    Raises:
      UserError: if the command line names a file that is not there.
    """
    self._config_file, self._argv = _resolve_config(self._argv)
    holder = config_flags.DEFINE_config_file(
        'config', help_string=about, flag_values=self._values,
        sys_argv=self._argv,
    )
    if required:
      flags.mark_flag_as_required('config', self._values)
    return holder

  def processes(
      self
  ) -> Callable[[], tuple[str | None, int | None, int | None]]:
    """Defines the three flags of a run of several processes.

    Returns:
      () -> address of the first, how many, and which this is; None where they
      are not given.
    """
    holders = (
        self.string(
            'coordinator', None, 'Of several processes: host:port of the first.'
        ),
        self.integer('num_processes', None, 'How many there are.'),
        self.integer('process_id', None, 'Which one this is, from 0.'),
    )
    return lambda: tuple(holder.value for holder in holders)

  @property
  def config_file(self) -> str:
    """FILE[:argument], as --config was given."""
    return self._config_file

  @property
  def overrides(self) -> dict[str, Any]:
    """The fields of the config that the command line has set."""
    return self._values['config'].override_values

  def help(self) -> str:
    """Returns all flags with what they are for."""
    return self._values.get_help(include_special_flags=False)

  def parse(self) -> list[str]:
    """Parses the command line; whatever goes wrong is bad input.

    Returns:
      The words that are no flags.

    Raises:
      UserError: for an unknown flag or field, a wrong value, or a config file
        that cannot be used.
    """
    try:
      return self._values(self._argv)[1:]
    except flags.Error as e:
      raise UserError(_flag_message(str(e), self._argv)) from e
    except Exception as e:
      raise UserError(_config_message(e, self._argv)) from e


# Defines flags; returns the action, or actions by the word that chooses one of
# them, `python -m mocov3_jax.benchmark input`.
Define = Callable[[Flags], Action | dict[str, Action]]


def run(
    doc: str, define: Define, argv: list[str], words: bool = False
) -> int:
  """Runs a command.

  Prints its results as one JSON object on the last line of stdout.

  Args:
    doc: what --help shows above the flags.
    define: the command.
    argv: the command line, the program's name first.
    words: whether the action is given, as its one argument, the words that are
      no flags.

  Returns:
    The exit code: 0 done; 2 bad input, no memory, no space on the disk, or no
    such backend (one message on stderr); 130 Ctrl-C where there is nothing to
    save; 143 stopped by SIGTERM or Ctrl-C after a complete save; 1 a bucket
    that may be reached again in a while. (1 is also that of a lost process, see
    `parallel.processes`.) Anything else is a bug, and raised.
  """
  _quieten()
  quieten_libtpu()
  try:
    command_flags = Flags(argv)
    action = define(command_flags)
    if {'--help', '-h', '--helpfull'} & set(argv[1:]):
      print(doc)
      print(command_flags.help())
      return 0
    given = command_flags.parse()
    if isinstance(action, dict):
      action = action[_choose(given, action)]
    elif given and not words:
      raise UserError(
          f'unexpected argument {given[0]!r}. Use flags, as --name=value.'
      )
    result = action(given) if words else action()
    if result is not None:  # One process of several speaks for all.
      print(json.dumps(result), flush=True)
    return 0
  except UserError as e:
    console.say(f'error: {e}')
    return BAD_INPUT
  except Preempted as e:
    console.say(str(e))
    return PREEMPTED
  except KeyboardInterrupt:
    console.say('interrupted')
    return INTERRUPTED
  except Exception as e:
    what = (str(e).splitlines() or [type(e).__name__])[0][:200].rstrip('.')
    if is_disk_full(e):
      console.say(f'error: no space is left on the disk: {what}. {MORE_SPACE}')
    elif is_no_backend(e):
      platforms = os.getenv('JAX_PLATFORMS')
      console.say(
          f'error: JAX_PLATFORMS={platforms}: {what}. {OTHER_BACKEND}'
      )
    elif is_of_bucket(e):
      console.say(f'error: the bucket cannot be used: {what}. {BUCKET}')
      if may_pass(e):
        return UNREACHABLE
    elif is_out_of_memory(e):
      console.say(f'error: {what}. {LESS_MEMORY}')
    else:
      raise
    return BAD_INPUT


def execute(main: Callable[[list[str]], int]) -> None:
  """Runs the command of this process, and exits with its code."""
  console.hide_decoders()
  code = main(sys.argv)
  if code == INTERRUPTED:
    # Past Python's own exit, which can crash while XLA compiles in a thread.
    os._exit(code)
  elif code == PREEMPTED:
    exits.leave_saved(code)
  elif code:
    exits.leave(code)


def _quieten() -> None:
  # Orbax's and JAX's informative messages would drown the progress. What ends
  # one of Orbax's threads, it prints whole, and raises as well.
  logging.set_verbosity(logging.FATAL)
  # Pillow's remarks on damaged metadata do not say of which file.
  warnings.filterwarnings('ignore', module=r'PIL\.')
  # Orbax and TensorStore leave hundreds of broken asyncio tasks and coroutines
  # behind a checkpoint that cannot be read, and each is reported beside our one
  # message.
  logging_lib.getLogger('asyncio').setLevel(logging_lib.CRITICAL)
  warnings.filterwarnings('ignore', message='coroutine .* was never awaited')
  default = sys.unraisablehook

  def hook(unraisable):
    if not (
        str(unraisable.exc_value) == 'Event loop is closed'
        or isinstance(unraisable.object, types.CoroutineType)
    ):
      default(unraisable)

  sys.unraisablehook = hook


def quieten_libtpu(devices: str = '/sys/bus/pci/devices') -> None:
  """Tells libtpu not to look for a TPU that this machine does not have.

  Where it is installed, as `plan` wants it, each start of JAX would print
  several lines about the host names of a slice.

  Args:
    devices: the folder of the machine's PCI devices.
  """
  vendors = pathlib.Path(devices).glob('*/vendor')
  if 'tpu' in os.getenv('JAX_PLATFORMS', '') or any(
      vendor.read_text().strip() == TPU_VENDOR for vendor in vendors
  ):
    return
  for name, value in (
      ('TPU_SKIP_MDS_QUERY', '1'), ('TPU_WORKER_ID', '0'),
      ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_ACCELERATOR_TYPE', 'v5e-1'),
  ):
    os.environ.setdefault(name, value)


def _choose(words: list[str], allowed: dict[str, Action]) -> str:
  if len(words) != 1:
    raise UserError(
        f'{len(words)} words were given ({" ".join(words) or "none"}). '
        f'Allowed: one of {", ".join(allowed)}.'
    )
  if words[0] not in allowed:
    raise unknown('command', words[0], allowed)
  return words[0]


def _flag_message(text: str, argv: list[str]) -> str:
  unusable = f'--config={_config_path(argv)} cannot be used'
  if 'Error whilst parsing config file' in text:
    return f'{unusable}: {text.splitlines()[-1]}'
  missing = re.findall(r'flag --(\w+)=None: Flag --\w+ must have', text)
  if 'config' in missing and _config_path(argv):
    return f'{unusable}: get_config() returned nothing'
  if missing:
    return f'required: {", ".join(f"--{name}=..." for name in missing)}'
  negated = re.search(r"Unknown command line flag 'noconfig\.([\w.]+)'", text)
  if negated:
    return (
        f'--noconfig.{negated[1]} is for fields that are True or False. Use '
        f'--config.{negated[1]}=VALUE.'
    )
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
    field = re.match(r'--?(?:no)?config\.([^=]*)', given)
    if field and name in field[1].split('.'):
      advice = _advice(field[1])
      return f'{given}: there is no config field {name!r}. {advice}'
  why = ' '.join([name, *hint])
  if not isinstance(error, UserError):
    why = f'{kind}: {why}'
  return f'--config={_config_path(argv)} cannot be used: {why}'


def _advice(field: str) -> str:
  group, _, name = field.rpartition('.')
  beside, known = [], {}
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
    known |= fields
    beside += [f for f in fields if group and f.rpartition('.')[0] == group]
  # By the name of the field, whole or begun, in whichever group; or as it was
  # typed.
  names = {f: f.rpartition('.')[2] for f in known}
  near = (
      [f for f in known if names[f] == name]
      or [f for f in known if names[f].startswith(name) and f.startswith(group)]
      or difflib.get_close_matches(field, known, n=1)
      or [f for f in known
          if names[f] in difflib.get_close_matches(name, names.values(), n=1)]
  )
  near.sort(key=lambda f: -difflib.SequenceMatcher(None, field, f).ratio())
  hint = f'Did you mean {" or ".join(near[:3])}? ' if near else ''
  if not beside:
    return f'{hint}See mocov3_jax/config/training.py for all fields.'
  return f'{hint}Allowed: {", ".join(sorted(set(beside)))}.'


def _config_path(argv: list[str]) -> str | None:
  for _, _, given in _config_words(argv):
    return given.split(':')[0]  # The rest is the argument of get_config.
  return None


def _config_words(argv: list[str]) -> Iterator[tuple[int, str, str]]:
  # Where the command line has --config=FILE, or the FILE of --config FILE: the
  # place, what stands before FILE, and FILE.
  for place, word in enumerate(argv):
    if word.startswith(('--config=', '-config=')):
      flag, equals, given = word.partition('=')
      yield place, flag + equals, given
    elif place and argv[place - 1] in ('--config', '-config'):
      yield place, '', word


def _resolve_config(argv: list[str]) -> tuple[str, list[str]]:
  # ml_collections reports a missing file only once a field is read, and then
  # as an attribute error.
  given, resolved = '', list(argv)
  for place, before, given in _config_words(argv):
    resolved[place] = before + recipes.resolve(given)
  return given, resolved
