"""Finds and reads what a run has saved, in whole or in part."""

from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from mocov3_jax import checkpoint
from mocov3_jax.errors import UserError
from mocov3_jax.workdir import absolute

PyTree = Any


def find(path: str) -> tuple[epath.Path, epath.Path]:
  """Finds the run and the checkpoint that `path` names.

  Args:
    path: a workdir (then its newest checkpoint) or one checkpoints/<step>.

  Returns:
    The workdir of the run, and the folder of the checkpoint.

  Raises:
    UserError: if `path` is neither.
  """
  if path:
    folder = absolute(path)
    if folder.is_file():
      raise UserError(
          f'checkpoint={path!r} is a file. Allowed: a run; weights become one '
          f'by: python -m mocov3_jax.convert --from={path} --to=runs/NEW.'
      )
    if (folder / 'checkpoints').is_dir():
      steps = [
          int(p.name) for p in (folder / 'checkpoints').iterdir()
          if p.name.isdigit()
      ]
      if steps:
        return folder, folder / 'checkpoints' / str(max(steps))
    run = folder.parent.parent
    if folder.name.isdigit() and folder.is_dir():
      if (run / 'config.json').exists():
        return run, folder
  raise UserError(
      f'checkpoint={path!r} is not a checkpoint. Allowed: the workdir of a '
      'run that has saved one, or one of its folders checkpoints/<step>.'
  )


def held(folder: epath.Path) -> set[tuple[str, str]]:
  """What a checkpoint holds: ('params', 'backbone'), ('params', ...), ...

  Raises:
    UserError: if it cannot be read.
  """
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(folder / checkpoint.ITEM).item_metadata.tree
  except Exception as e:  # Orbax and TensorStore raise many kinds.
    raise _unreadable(folder, e) from e
  return {
      (field, part) for field, parts in tree.items()
      if isinstance(parts, dict) for part in parts
  }


def _unreadable(folder: epath.Path, e: Exception) -> UserError:
  return UserError(
      f'checkpoint={str(folder)!r} cannot be read ({checkpoint.summary(e)}).'
  )


def restore_part(folder: epath.Path, abstract_part: PyTree) -> PyTree:
  """Restores the named part of a checkpoint alone, such as the parameters.

  Args:
    folder: a checkpoints/<step>.
    abstract_part: nested dicts of ShapeDtypeStructs, a subtree of the state.

  Raises:
    UserError: if it cannot be read, or does not fit.
  """
  restore_args = jax.tree.map(
      lambda x: ocp.ArrayRestoreArgs(
          sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
      ),
      abstract_part,
  )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
          folder / checkpoint.ITEM,
          args=ocp.args.PyTreeRestore(
              item=abstract_part, restore_args=restore_args,
              partial_restore=True,
          ),
      )
  except Exception as e:  # Orbax and TensorStore raise many kinds.
    raise _unreadable(folder, e) from e


def restore_whole(folder: epath.Path) -> PyTree:
  """Restores all of a checkpoint on the host, whatever it holds.

  Args:
    folder: a checkpoints/<step>.

  Returns:
    Nested dicts and lists of numpy arrays.

  Raises:
    UserError: if it cannot be read.
  """
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      known = checkpointer.metadata(folder / checkpoint.ITEM).item_metadata.tree
      return checkpointer.restore(
          folder / checkpoint.ITEM,
          args=ocp.args.PyTreeRestore(
              restore_args=jax.tree.map(
                  lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known
              )
          ),
      )
  except Exception as e:  # Orbax and TensorStore raise many kinds.
    raise _unreadable(folder, e) from e
