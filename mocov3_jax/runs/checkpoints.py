"""Checkpoints of a run, by Orbax: async save, newest intact restore."""

from collections.abc import Callable
import json
import math
import textwrap
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.metadata import ArrayMetadata

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError, is_of_environment

PyTree = Any
# Name of the state within checkpoints/<step>/.
ITEM = 'state'
# Bytes that the arrays of a checkpoint may have for each byte of its files, and
# those that they may have in any case. Trained weights hardly compress; what is
# constant, such as fresh moments, compresses to almost nothing.
MOST_GROWTH, ALWAYS_ALLOWED = 64, 2**26


# By which Orbax tells a complete checkpoint of a bucket, and what it knows of
# any; there, the time at which a checkpoint was complete.
MARK, METADATA = 'commit_success.txt', '_CHECKPOINT_METADATA'
COMPLETE = 'commit_timestamp_nsecs'


class Checkpoints:
  """The checkpoints/<step> folders of a run, <step> being updates done."""

  def __init__(
      self, workdir: epath.Path, keep_latest: int, keep_best: int,
      warn: Callable[[str], None], best_metric: str | None = None,
      keep_initial: bool = False,
  ):
    """Opens checkpoints/ in `workdir`, removing what a kill left half-written.

    Args:
      workdir: of the run.
      keep_latest: newest checkpoints kept.
      keep_best: best ones kept beside those.
      warn: is told of each damaged checkpoint.
      best_metric: by which they are the best; None = by none.
      keep_initial: whether one of step 0 is kept beside all of them.
    """
    self._warn = warn
    self._folder = workdir / 'checkpoints'
    self._damaged = workdir / 'checkpoints_damaged'
    self._best_metric = best_metric
    best = lambda metrics: metrics[best_metric]
    policies = checkpoint_managers.AnyPreservationPolicy([
        checkpoint_managers.CustomSteps([0] if keep_initial else []),
        checkpoint_managers.LatestN(keep_latest),
        checkpoint_managers.BestN(
            get_metric_fn=best, n=keep_best,
            keep_checkpoints_without_metrics=False,
        ),
    ])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies,
        best_fn=best,
        cleanup_tmp_directories=True,
        # A checkpoint is complete once its folder has its name; where folders
        # cannot be renamed in one piece, once a file in it says so.
        temporary_path_class=None if files.is_on_disk(workdir) else (
            ocp.path.atomicity.CommitFileTemporaryPath
        ),
    )
    if jax.process_index() == 0:
      files.make_folder(self._folder)
      _mark_copies(self._folder)
      self._check_metrics()
    _all_arrive('checkpoints opened')
    self._manager = ocp.CheckpointManager(
        self._folder, options=options,
        item_handlers={ITEM: ocp.StandardCheckpointHandler()},
    )

  def _check_metrics(self) -> None:
    # Orbax reads all of them when it starts, and gives up at a broken one.
    for folder in files.entries(self._folder):
      file = folder / 'metrics' / 'metrics'
      if _is_step(folder.name) and file.exists():
        try:
          json.loads(file.read_text())
        except ValueError as e:
          self._set_aside(int(folder.name), first_line(e))

  def save(self, step: int, state: PyTree, metrics: dict[str, float]) -> None:
    """Saves in the background; the state may be donated right after.

    Args:
      step: updates done.
      state: of jax.Arrays.
      metrics: the best metric among them makes it a candidate for the best.
    """
    known = None
    if self._best_metric in metrics:
      known = {self._best_metric: metrics[self._best_metric]}
    if step == self._manager.latest_step():
      if known and not self._manager.metrics(step):
        self._add_metrics(step, known)
      return
    args = ocp.args.Composite(**{ITEM: ocp.args.StandardSave(state)})
    self._manager.save(step, args=args, metrics=known, force=True)

  def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds what was measured after the save, as when a stop came between."""
    self.wait()
    if jax.process_index() == 0:
      folder = self._folder / str(step) / 'metrics'
      files.make_folder(folder)
      (folder / 'metrics').write_text(json.dumps(metrics))
      (folder / MARK).write_text('complete')
    _all_arrive('metrics added')
    self._manager.reload()

  def restore(
      self, abstract_state: PyTree, init: Callable[[], PyTree] | None = None,
      monitors: tuple[str, ...] = (),
  ) -> tuple[PyTree, int] | None:
    """Restores the newest checkpoint that can be read.

    Damaged newer ones are moved to checkpoints_damaged/. If none can be read,
    none is moved: then the cause may be another than damage.

    Args:
      abstract_state: of jax.ShapeDtypeStruct with shardings; any number of
        devices.
      init: makes a fresh state.
      monitors: fields of the state that are taken from a fresh one where a
        checkpoint lacks them, such as one that was converted.

    Returns:
      The state and its step, or None if there is no checkpoint.

    Raises:
      UserError: if there are checkpoints, and none can be read.
    """
    failures = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = self._restore_step(step, abstract_state, init, monitors)
      except Exception as e:  # Orbax and TensorStore raise many kinds.
        if is_of_environment(e):
          raise
        failures[step] = first_line(e)
        continue
      for damaged, reason in failures.items():
        if jax.process_count() > 1:
          # Another process may have read it; they must not part here.
          raise UserError(
              f'checkpoint {self._folder / str(damaged)} is damaged '
              f'({reason}). Move it away, and start all processes '
              'again.'
          )
        self._set_aside(damaged, reason)
      if failures:
        self._manager.reload()
      return state, step
    if failures:
      raise UserError(
          f'no checkpoint in {self._folder} can be read:\n  '
          + '\n  '.join(f'{step}: {why}' for step, why in failures.items())
          + '\nUse another workdir, to start anew. (Weights alone, as '
          'convert writes them without a recipe, can be evaluated and '
          'extracted, not trained on.)'
      )
    return None

  def _restore_step(
      self, step: int, abstract_state: PyTree,
      init: Callable[[], PyTree] | None, monitors: tuple[str, ...],
  ) -> PyTree:
    folder = self._folder / str(step)
    fields = _metadata(folder).keys()
    own = [name for name in monitors if hasattr(abstract_state, name)]
    if any(name not in fields for name in own):
      part = {name: abstract_state.__dict__[name] for name in fields}
      return init().replace(**restore_part(folder, part))
    args = ocp.args.Composite(
        **{ITEM: ocp.args.StandardRestore(abstract_state)}
    )
    return self._manager.restore(step, args=args)[ITEM]

  def newest_before(self, step: int) -> int | None:
    """Returns the newest checkpoint before `step`; later ones are moved aside.

    For a run whose state was found broken at `step`.
    """
    self.wait()
    if jax.process_index() == 0:
      for later in [s for s in self._manager.all_steps() if s >= step]:
        self._set_aside(later, f'the training diverged at step {step}')
    _all_arrive('diverged checkpoints set aside')
    self._manager.reload()
    return self._manager.latest_step()

  def _set_aside(self, step: int, reason: str) -> None:
    files.make_folder(self._damaged)
    target = self._damaged / str(step)
    if target.exists():
      target.rmtree()
    files.move_folder(self._folder / str(step), target)
    self._warn(
        f'warning: checkpoint {self._folder / str(step)} is damaged and was '
        f'moved to {self._damaged} ({reason})'
    )

  def wait(self) -> None:
    """Blocks until every save is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the threads."""
    self._manager.close()


def _mark_copies(folder: epath.Path) -> None:
  """Marks complete checkpoints that lack the file by which buckets tell them.

  Where folders cannot be renamed, Orbax takes a checkpoint without that file
  for one that a kill cut off, and removes it. Older versions of Orbax wrote no
  such file on a disk, from where a run may have been copied. (METADATA has the
  time at which a checkpoint was complete, in all versions.)
  """
  for step in files.entries(folder):
    if _is_step(step.name) and _has_ended(step):
      if not (step / MARK).exists():
        (step / MARK).write_text('complete')


def _has_ended(step: epath.Path) -> bool:
  """Returns whether the metadata of a checkpoint say that it is complete."""
  try:
    found = files.read_object(step / METADATA)
  except UserError:  # Cut off, or damaged.
    return False
  return COMPLETE in found and bool(found[COMPLETE])


def _is_complete(step: epath.Path) -> bool:
  """Returns whether a checkpoint is no longer being written.

  Where a folder can be renamed, one of that name is complete.
  """
  return (
      files.is_on_disk(step) or (step / MARK).exists() or _has_ended(step)
  )


def _all_arrive(where: str) -> None:
  # All processes of a run see the same folder.
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)


def first_line(error: Exception) -> str:
  """Returns the kind of an error and the first line of its text, shortened."""
  lines = str(error).strip().splitlines() or ['']
  text = textwrap.shorten(lines[0], 160, placeholder=' ...')
  return f'{type(error).__name__}: {text}'


def find(path: str) -> tuple[epath.Path, epath.Path]:
  """Finds the run and the checkpoint that `path` names.

  Args:
    path: a workdir (then its newest checkpoint) or one checkpoints/<step>.

  Returns:
    The workdir of the run, and the folder of the checkpoint.

  Raises:
    UserError: if `path` is neither, or holds links.
  """
  run, checkpoint = _found(path)
  files.require_plain(run)
  return run, checkpoint


def _found(path: str) -> tuple[epath.Path, epath.Path]:
  if path:
    folder = files.run_path(path, 'checkpoint')
    if folder.is_file():
      raise UserError(
          f'checkpoint={path!r} is a file. Use a run; weights become one '
          f'by: python -m mocov3_jax.convert --from={path} --to=runs/NEW.'
      )
    steps = [
        int(p.name) for p in files.entries(folder / 'checkpoints')
        if _is_step(p.name) and _is_complete(p)
    ]
    if steps:
      return folder, folder / 'checkpoints' / str(max(steps))
    run = folder.parent.parent
    if _is_step(folder.name) and folder.is_dir():
      if (run / 'config.json').exists():
        return run, folder
  raise UserError(
      f'checkpoint={path!r} is not a checkpoint. Use the workdir of a '
      'run that has saved one, or one of its folders checkpoints/<step>.'
  )


def _is_step(name: str) -> bool:
  # Other digits, such as a superscript two, are no numbers to int().
  return name.isascii() and name.isdigit() and len(name) <= 10


def held(folder: epath.Path) -> set[tuple[str, str]]:
  """Returns what a checkpoint holds: ('params', 'backbone'), ...

  Raises:
    UserError: if it cannot be read.
  """
  return {path[:2] for path in shapes(folder) if len(path) > 1}


def shapes(folder: epath.Path) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shape of each array of a checkpoint, by its path.

  Raises:
    UserError: if it cannot be read.
  """
  return {
      path: tuple(leaf.shape)
      for path, leaf in _arrays(_metadata(folder)).items()
  }


def _claimed_bytes(array: ArrayMetadata) -> int:
  # A chunk is read whole, even where the array has less.
  chunk = array.storage.chunk_shape if array.storage else None
  values = max(math.prod(array.shape), math.prod(chunk or ()))
  return values * array.dtype.itemsize


def _arrays(tree: PyTree) -> dict[tuple[str, ...], Any]:
  return {
      path: leaf for path, leaf in flatten_dict(tree).items()
      if isinstance(leaf, ArrayMetadata) and leaf.shape is not None
  }


def _metadata(folder: epath.Path) -> PyTree:
  """Returns the tree of a checkpoint, without its arrays.

  Raises:
    UserError: if it cannot be read, or claims arrays that its files cannot
      hold.
  """
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      tree = checkpointer.metadata(folder / ITEM).item_metadata.tree
  except Exception as e:  # Orbax and TensorStore raise many kinds.
    if is_of_environment(e):
      raise
    raise _unreadable(folder, e) from e
  claimed = sum(map(_claimed_bytes, _arrays(tree).values()))
  held = files.allocated(folder)
  if claimed > max(ALWAYS_ALLOWED, MOST_GROWTH * held):
    raise UserError(
        f'checkpoint={str(folder)!r} claims arrays of {claimed:,} bytes, which '
        f'its files of {held:,} bytes cannot hold. It is damaged or forged; '
        'use another one.'
    )
  return tree


def _unreadable(folder: epath.Path, e: Exception) -> UserError:
  return UserError(
      f'checkpoint={str(folder)!r} cannot be read ({first_line(e)}).'
  )


def restore_part(folder: epath.Path, abstract_part: PyTree) -> PyTree:
  """Restores the named part of a checkpoint alone, such as the parameters.

  Args:
    folder: a checkpoints/<step>.
    abstract_part: nested dicts of ShapeDtypeStructs, a subtree of the state.

  Raises:
    UserError: if it cannot be read, or does not fit.
  """
  found = shapes(folder)
  for path, x in flatten_dict(abstract_part).items():
    if path in found and found[path] != x.shape:
      raise UserError(
          f'checkpoint={str(folder)!r} does not fit: {"/".join(path)} has the '
          f'shape {found[path]}, not {x.shape} as its config says.'
      )
  restore_args = jax.tree.map(
      lambda x: ocp.ArrayRestoreArgs(
          sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
      ),
      abstract_part,
  )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
          folder / ITEM,
          args=ocp.args.PyTreeRestore(
              item=abstract_part, restore_args=restore_args,
              partial_restore=True,
          ),
      )
  except Exception as e:  # Orbax and TensorStore raise many kinds.
    if is_of_environment(e):
      raise
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
  restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(folder)
  )
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
          folder / ITEM,
          args=ocp.args.PyTreeRestore(restore_args=restore_args),
      )
  except Exception as e:  # Orbax and TensorStore raise many kinds.
    if is_of_environment(e):
      raise
    raise _unreadable(folder, e) from e
