"""The frame of every command: flags in, one JSON line and an exit code out."""

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
    'Try less at a time. A training run needs less memory with micro_batch, '
    'model.remat=True or fsdp_devices, and can continue with them in the same '
    'workdir; or with a smaller batch_size or objective.queue, in a new one.'
)
MORE_SPACE = (
    'Free some space, and run the same command again. What was saved before '
    'is intact.'
)
OTHER_BACKEND = (
    'Use a backend that this machine has, such as JAX_PLATFORMS=cpu; without '
    'that variable, JAX chooses the best one.'
)

BUCKET = (
    'Use a bucket that exists and that this account may read and write '
    '(`gcloud auth application-default login`; on a VM, its service account), '
    'and run the same command again. What was saved before is intact.'
)

# Google's PCI vendor ID.
TPU_VENDOR = '0x1ae0'

# The work of a command, called after its flags are parsed. Returns the results,
# or None in every process of a run except the first.
Action = Callable[..., dict[str, Any] | None]


class Flags:
  """The flags of one command.

  Each method defines a flag and returns its holder, whose `value` is known
  once the command line is parsed. A flag without a default is None unless it
  is given; a `required` flag must be given.
  """

  def __init__(self, argv: list[str]):
    """Starts without any flags.

    Args:
      argv: the command line. `config` defines a flag for each config field
        that it sets.
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
    """Defines --name=TEXT,TEXT,...; the default is an empty list."""
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
      UserError: if the command line names a file that does not exist.
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
      A function that returns the address of process 0, the number of processes
      and the index of this process; each is None if its flag is not given.
    """
    holders = (
        self.string(
            'coordinator', None,
            'host:port of the first process, if there are several.',
        ),
        self.integer('num_processes', None, 'Number of processes.'),
        self.integer('process_id', None, 'Index of this process, from 0.'),
    )
    return lambda: tuple(holder.value for holder in holders)

  @property
  def config_file(self) -> str:
    """The value of --config, FILE[:argument], as it was given."""
    return self._config_file

  @property
  def overrides(self) -> dict[str, Any]:
    """The config fields that the command line sets, and their values."""
    return self._values['config'].override_values

  def help(self) -> str:
    """Returns the help text of all flags."""
    return self._values.get_help(include_special_flags=False)

  def parse(self) -> list[str]:
    """Parses the command line; every failure counts as bad input.

    Returns:
      The positional arguments.

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


# Defines the flags of a command and returns its action. A command with
# subcommands, such as `python -m mocov3_jax.benchmark input`, returns a dict
# from subcommand to action.
Define = Callable[[Flags], Action | dict[str, Action]]


def run(
    doc: str, define: Define, argv: list[str], words: bool = False
) -> int:
  """Runs a command.

  Prints its results as one JSON object on the last line of stdout.

  Args:
    doc: what --help shows above the flags.
    define: defines the flags of the command and returns its action.
    argv: the command line; its first item is the program's name.
    words: whether the action takes the list of positional arguments as its one
      argument.

  Returns:
    The exit code:
      0: done.
      1: a bucket cannot be reached now but may be reachable later. (A lost
        process also exits with 1, see `parallel.processes`.)
      2: bad input, an unusable bucket, no memory, no space on the disk, or no
        such backend; one message is printed on stderr.
      130: Ctrl-C, with nothing to save.
      143: stopped by SIGTERM or Ctrl-C after a complete save.
    Any other exception is a bug and is raised.
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
          f'unexpected argument {given[0]!r}. Use flags such as --name=value.'
      )
    result = action(given) if words else action()
    if result is not None:  # Only the first process has a result.
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
  """Runs a command on this process's arguments and exits with its code."""
  console.hide_decoders()
  code = main(sys.argv)
  if code == INTERRUPTED:
    # Skips Python's own exit, which can crash while XLA compiles in a thread.
    os._exit(code)
  elif code == PREEMPTED:
    exits.leave_saved(code)
  elif code:
    exits.leave(code)


def _quieten() -> None:
  # Info messages of Orbax and JAX would drown out the progress lines. When an
  # error ends one of its threads, Orbax logs the whole traceback and also
  # raises the error.
  logging.set_verbosity(logging.FATAL)
  # Pillow's warnings about damaged metadata do not name the file.
  warnings.filterwarnings('ignore', module=r'PIL\.')
  # If a checkpoint cannot be read, Orbax and TensorStore leave hundreds of
  # broken asyncio tasks and coroutines behind. Each would be reported in
  # addition to our one message.
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

  If libtpu is installed, which the command `plan` requires, every start of JAX
  would otherwise print several lines about the host names of a TPU slice.

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
  # For an unknown field, a locked config raises an error with the name of the
  # field and the nearest known one, wrapped in one or two other errors.
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
      (
          'the config of a training run, such as configs/digits.py',
          training.schema(),
      ),
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
  # Candidates, best kind first: fields of any group with this name, fields
  # whose name begins with it, and close spellings of the whole field or of its
  # name.
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
  # Finds each --config=FILE and --config FILE. Yields the index of the word
  # with FILE, the part of that word before FILE, and FILE.
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
