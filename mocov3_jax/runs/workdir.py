"""The workdir of a run: claiming it, and its config, data and result files."""

from collections.abc import Iterator
import contextlib
import importlib.metadata
import json
import platform
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax.base import buckets, console, files
from mocov3_jax.base.errors import UserError, is_disk_full, may_pass
from mocov3_jax.config import knobs
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import processes
from mocov3_jax.runs import locks

# What commands write beside config.json, and must not overwrite.
OUTPUTS = (
    'bad_images.txt', 'checkpoints', 'data.json', 'environment.json',
    'metrics.jsonl', 'network', 'result.json', 'results.jsonl', 'tensorboard',
    'tracker.json',
)

# The entries of environment.json: versions of these packages, and the machine.
PACKAGES = 'jax', 'jaxlib', 'flax', 'optax', 'numpy'
ENVIRONMENT = (
    *PACKAGES, 'python', 'backend', 'device', 'devices', 'processes',
    'attention', 'init', 'init_sha256',
)

# The entry of data.json for the version of image reading that a run began with.
READING = 'reading'
LONGER = (
    ' A run cannot be prolonged: the learning rate falls to 0 at the end of '
    'the schedule, so a longer run is different from its first step on.'
)


def to_json(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as nested dicts of JSON values (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def claimed(
    path: str, config: ConfigDict, schema: knobs.Schema,
    data: dict[str, Any] | None = None,
) -> Iterator[epath.Path]:
  """Makes `path` the workdir of this run, or finds that it already is.

  It writes config.json on the first claim. While a run holds its claim, no
  other run can claim the same folder. File system errors inside become
  UserError. If a run has several processes, the first one claims for all.

  Args:
    path: the workdir; created if absent.
    config: the run's config with overrides applied.
    schema: the schema of the config.
    data: the fingerprint of the training data. It is stored in data.json and
      must not change.

  Yields:
    The workdir.

  Raises:
    UserError: if the workdir cannot be written, is in use, or holds a run with
      another config, whose differences are listed; or if the processes of the
      run do not agree on config and data.
  """
  workdir = files.run_path(path, '--workdir')
  processes.require_same(
      knobs.flatten(to_json(config)) | {'the data': data}
  )
  with processes.primary_only(
      _claimed_here(path, workdir, config, schema, data), workdir
  ) as claim:
    yield claim


@contextlib.contextmanager
def _claimed_here(
    path: str, workdir: epath.Path, config: ConfigDict, schema: knobs.Schema,
    data: dict[str, Any] | None,
) -> Iterator[epath.Path]:
  try:
    files.make_folder(workdir)
    files.require_plain(workdir)
    with locks.held(workdir, path):
      if (workdir / 'config.json').exists():
        _check_same(path, workdir, config, schema)
      else:
        _check_unused(path, workdir)
        files.write_json(workdir / 'config.json', to_json(config))
      if data is not None:
        _check_data(workdir, data)
      yield workdir
  except (ConnectionError, TimeoutError):  # A closed pipe, or the network.
    raise
  except OSError as e:
    if may_pass(e) or is_disk_full(e):
      raise
    place = 'a folder this user may write to'
    if buckets.is_in_bucket(workdir):
      place = 'a bucket that is there, as an account that may write to it'
    raise UserError(
        f'--workdir={path} cannot be written: {e.strerror or e} '
        f'({e.filename or workdir}). Use {place}.'
    ) from e


def _check_same(
    path: str, workdir: epath.Path, config: ConfigDict, schema: knobs.Schema
) -> None:
  saved = read_config(workdir)
  if ('protocol' in saved) == ('protocol' in config):
    saved = complete(saved, schema, workdir)
  differ = knobs.differences(
      to_json(saved), to_json(config), knobs.free_fields(schema)
  )
  if differ:
    shown = differ[:20] + [f'({len(differ) - 20} more)'] * (len(differ) > 20)
    raise UserError(
        f'--workdir={path} holds another run; the two differ in\n  '
        + '\n  '.join(shown)
        + '\nUse the same config (to continue it), or another workdir.'
        + LONGER * any(field.startswith('schedule.') for field in differ)
    )


def _check_unused(path: str, workdir: epath.Path) -> None:
  taken = [p.name for p in files.entries(workdir) if p.name in OUTPUTS]
  if taken:
    raise UserError(
        f'--workdir={path} has {", ".join(taken)} but no config.json, so there '
        'is no run to continue. Use a folder without these files, or the '
        'workdir of a run.'
    )


def _check_data(workdir: epath.Path, found: dict[str, Any]) -> None:
  path = workdir / 'data.json'
  before = files.read_object(path)
  if before == found:
    return
  # Entries that an earlier version did not record are compared from now on.
  new = found.keys() - before.keys()
  differ = [
      f'{field}: {_short(value)} then, '
      f'{_short(found[field]) if field in found else "none"} now'
      for field, value in before.items()
      if field not in found or found[field] != value
  ]
  if differ:
    others = ''
    if READING in new:
      others = (
          ' (Earlier versions skipped links, and took Train/ and training/ for '
          'classes.)'
      )
    raise UserError(
        f'the data is not what this run began with ({path}):\n  '
        + '\n  '.join(differ)
        + '\nUse the same images, by name, with the same labels, to '
        f'continue the run; or another workdir.{others}'
    )
  if before and READING in new:
    console.say(
        f'{workdir} was begun by an earlier version, whose crops of large '
        'JPEGs were up to a pixel off the box that was drawn. The run goes on '
        'with exact crops.'
    )
  files.write_json(path, found)


def _short(value: Any) -> str:
  return value[:12] if isinstance(value, str) else str(value)


def read_config(workdir: epath.Path) -> ConfigDict:
  """Reads the config of the run in `workdir`.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  path = workdir / 'config.json'
  found = files.read_object(path)
  if not found and not path.exists():
    raise UserError(
        f'{workdir} is not the workdir of a run: it has no config.json.'
    )
  try:
    return ConfigDict(found)
  except (ValueError, TypeError, AttributeError) as e:
    raise UserError(
        f'{path} is damaged: {e}. Use the JSON object that a run wrote.'
    ) from e


def refuse_evaluation(config: ConfigDict, workdir: epath.Path) -> None:
  """Raises UserError unless the config is that of a pre-training run."""
  if 'protocol' in config:
    raise UserError(
        f'{workdir} is the workdir of an evaluation. Use that of the '
        'training run.'
    )


def read_training_config(workdir: epath.Path) -> ConfigDict:
  """Reads the config of the training run in `workdir`.

  Raises:
    UserError: see `read_config`; or if this version cannot use the config.
  """
  config = read_config(workdir)
  refuse_evaluation(config, workdir)
  return complete(config, config_lib.schema(), workdir)


def complete(
    config: ConfigDict, schema: knobs.Schema, where: epath.Path | str
) -> ConfigDict:
  """Fills in the fields that a config of an earlier version lacks.

  It prints one line that names these fields.

  Args:
    config: the config as stored in a run or a file.
    schema: the schema of this version.
    where: the run or file, for messages.

  Raises:
    UserError: see `knobs.completed` and `knobs.check`.
  """
  try:
    found, absent = knobs.completed(config.to_dict(), schema)
    knobs.check(schema, ConfigDict(found))
  except UserError as e:
    raise UserError(f'{where}: {e}') from e
  if absent:
    console.say(
        f'{where} was written by an earlier version; using the defaults for '
        f'{", ".join(absent)}'
    )
  return ConfigDict(found)


def begin(
    workdir: epath.Path, mesh: Mesh, more: dict[str, str] | None = None
) -> None:
  """Records the environment of a run, and that the run is not done.

  It writes environment.json (versions, devices and `more`), and removes
  result.json.
  """
  # result.json exists if the run was done and then lost its last checkpoint.
  (workdir / 'result.json').unlink(missing_ok=True)
  found = {
      package: importlib.metadata.version(package)
      for package in PACKAGES
  } | {
      'python': platform.python_version(),
      'backend': jax.default_backend(),
      'device': mesh.devices.flat[0].device_kind,
      'devices': mesh.size,
      'processes': jax.process_count(),
      **(more or {}),
  }
  files.write_json(workdir / 'environment.json', found)


def write_result(results: dict[str, Any], workdir: epath.Path) -> None:
  """Writes result.json, which marks the run as done.

  Repeating a finished run does not overwrite it, because the repetition has
  fewer results.
  """
  path = workdir / 'result.json'
  # A crash of the machine may leave an empty file.
  known = path.exists() and path.stat().length
  if processes.is_primary() and not known:
    files.write_json(path, results)
