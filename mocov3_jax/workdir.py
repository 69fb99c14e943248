"""The folder of a run: who may write into it, and what its config was."""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mocov3_jax import checks
from mocov3_jax.errors import UserError

# What a command writes beside config.json, and must not write over.
OUTPUTS = ('checkpoints', 'metrics.jsonl', 'result.json', 'tensorboard')


def to_json(config: ConfigDict) -> dict[str, Any]:
  """The config as nested dicts of JSON values (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def claim(path: str, config: ConfigDict) -> epath.Path:
  """Makes `path` the workdir of this run, or finds that it already is.

  Writes config.json on the first claim and nothing afterwards.

  Args:
    path: of the workdir; made if absent.
    config: of the run, after overrides.

  Returns:
    The workdir.

  Raises:
    UserError: if it cannot be written, or holds a run that computes something
      else; the fields that differ are listed.
  """
  workdir = epath.Path(path)
  if (workdir / 'config.json').exists():
    saved = json.loads((workdir / 'config.json').read_text())
    differ = checks.differences(saved, to_json(config))
    if differ:
      raise UserError(
          f'--workdir={path} holds another run; the two differ in\n  '
          + '\n  '.join(differ)
          + '\nAllowed: the same config (to continue it), or another workdir.'
      )
    return workdir
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    taken = sorted(p.name for p in workdir.iterdir() if p.name in OUTPUTS)
    if taken:
      raise UserError(
          f'--workdir={path} has {", ".join(taken)} but no config.json, so it '
          'is no run to continue. Allowed: a folder without these, or that of '
          'a run.'
      )
    part = workdir / 'config.json.part'
    part.write_text(json.dumps(to_json(config), indent=2) + '\n')
    part.replace(workdir / 'config.json')
  except OSError as e:
    raise UserError(
        f'--workdir={path} cannot be written: {e.strerror or e}. Allowed: a '
        'folder this user may write to.'
    ) from e
  return workdir


def read_config(workdir: epath.Path) -> ConfigDict:
  """Reads the config of the run in `workdir`.

  Raises:
    UserError: if there is none.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise UserError(
        f'{workdir} is not the workdir of a run: it has no config.json.'
    )
  saved = json.loads(path.read_text())
  return ConfigDict(saved)
