"""Checkpoints by Orbax: saved in the background, newest intact one restored."""

from collections.abc import Callable
import json
import math
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
from mocov3_jax.base.errors import UserError, first_line, is_of_environment

PyTree = Any
# Name of the state within checkpoints/<step>/.
ITEM = 'state'
# The most bytes that the arrays of a checkpoint may take per byte of its files,
# and the bytes that are always allowed. Trained weights hardly compress, but
# constant arrays, such as fresh moments, compress to almost nothing.
MOST_GROWTH, ALWAYS_ALLOWED = 64, 2**26
# If many devices hold the same array, each writes a part of it, provided that
# the parts have at least this many bytes. Splitting smaller arrays costs more
# time than it saves.
LEAST_PART = 2**20


# The file by which Orbax recognises a complete checkpoint in a bucket; the file
# of its metadata; and the entry in that file of the time of completion.
MARK, METADATA = 'commit_success.txt', '_CHECKPOINT_METADATA'
COMPLETE = 'commit_timestamp_nsecs'


class Checkpoints:
  """The folders checkpoints/<step> of a run; <step> counts updates done."""

  def __init__(
      self, workdir: epath.Path, keep_latest: int, keep_best: int,
      warn: Callable[[str], None], best_metric: str | None = None,
      keep_initial: bool = False,
  ):
    """Opens checkpoints/ in `workdir`, and removes incomplete checkpoints.

    Args:
      workdir: the run's workdir.
      keep_latest: how many of the newest checkpoints to keep.
      keep_best: how many of the best checkpoints to keep in addition.
      warn: called with a message for each damaged checkpoint.
      best_metric: the metric that decides which are the best; None = no metric.
      keep_initial: whether to keep a checkpoint of step 0 in addition.
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
        # On a disk, a complete checkpoint is renamed to its final name. Where
        # renaming is not atomic, a file in it marks it as complete.
        temporary_path_class=None if files.is_on_disk(workdir) else (
            ocp.path.atomicity.CommitFileTemporaryPath
        ),
    )
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler()),
        (jax.Array, types.ArrayHandler(
            min_slice_bytes_for_replica_parallel=LEAST_PART
        )),
    )
    if jax.process_index() == 0:
      files.make_folder(self._folder)
      _mark_copies(self._folder)
      self._check_metrics()
    _all_arrive('checkpoints opened')
    self._manager = ocp.CheckpointManager(
        self._folder, options=options,
        item_handlers={ITEM: ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry
        )},
    )

  def _check_metrics(self) -> None:
    # Orbax reads the metrics of all checkpoints when it starts, and fails if
    # one file is broken.
    for folder in files.entries(self._folder):
      file = folder / 'metrics' / 'metrics'
      if is_step(folder.name) and file.exists():
        try:
          json.loads(file.read_text())
        except ValueError as e:
          self._set_aside(int(folder.name), first_line(e))

  def save(self, step: int, state: PyTree, metrics: dict[str, float]) -> None:
    """Saves in the background; the state may be donated right after.

    Args:
      step: the number of updates done.
      state: a pytree of jax.Arrays or numpy arrays.
      metrics: if they contain the best metric, the checkpoint is a candidate
        for the best ones.
    """
    known = None
    if self._best_metric in metrics:
      known = {self._best_metric: metrics[self._best_metric]}
    if step == self._manager.latest_step():
      if known and not self._manager.metrics(step):
        self._add_metrics(step, known)
      return
    args = ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(state)})
    self._manager.save(step, args=args, metrics=known, force=True)

  def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds metrics to a saved checkpoint, such as one saved before a stop."""
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

    Newer checkpoints that are damaged are moved to checkpoints_damaged/. If
    none can be read, none is moved, because the cause may not be damage.

    Args:
      abstract_state: a pytree of jax.ShapeDtypeStruct with shardings; the
        number of devices may differ from that of the save.
      init: makes a fresh state.
      monitors: fields of the state that are taken from a fresh state if the
        checkpoint lacks them; a converted checkpoint does, for example.

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
          # Another process may have read it; all must restore the same step.
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
          + '\nUse another workdir, to start anew. (A checkpoint that holds '
          'only weights, as convert writes without a recipe, can be used by '
          'evaluate and extract, but train cannot continue from it.)'
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
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    args = ocp.args.Composite(**{ITEM: ocp.args.PyTreeRestore(
        abstract_state, restore_args=restore_args
    )})
    return self._manager.restore(step, args=args)[ITEM]

  def newest_before(self, step: int) -> int | None:
    """Returns the newest checkpoint before `step`, and moves later ones away.

    It is used when the state turns out to be broken at `step`.
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
    """Waits for saves and releases the threads."""
    self._manager.close()


def _mark_copies(folder: epath.Path) -> None:
  """Adds the file MARK to complete checkpoints that lack it.

  Where folders cannot be renamed, Orbax takes a checkpoint without MARK for an
  incomplete one and removes it. Older versions of Orbax did not write MARK on a
  disk, and the run may have been copied from there. (METADATA records the time
  of completion in all versions.)
  """
  for step in files.entries(folder):
    if is_step(step.name) and _has_ended(step):
      if not (step / MARK).exists():
        (step / MARK).write_text('complete')


def _has_ended(step: epath.Path) -> bool:
  """Returns whether a checkpoint is complete according to its metadata."""
  try:
    found = files.read_object(step / METADATA)
  except UserError:  # Cut off, or damaged.
    return False
  return COMPLETE in found and bool(found[COMPLETE])


def _is_complete(step: epath.Path) -> bool:
  """Returns whether a checkpoint is no longer being written.

  On a disk, a folder gets its final name only when it is complete.
  """
  return (
      files.is_on_disk(step) or (step / MARK).exists() or _has_ended(step)
  )


def _all_arrive(where: str) -> None:
  # All processes of a run see the same folder.
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)


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
          f'checkpoint={path!r} is a file. Use the workdir of a run; to make '
          'one from a file of weights: '
          f'python -m mocov3_jax.convert --from={path} --to=runs/NEW.'
      )
    steps = [
        int(p.name) for p in files.entries(folder / 'checkpoints')
        if is_step(p.name) and _is_complete(p)
    ]
    if steps:
      return folder, folder / 'checkpoints' / str(max(steps))
    run = folder.parent.parent
    if is_step(folder.name) and folder.is_dir():
      if (run / 'config.json').exists():
        return run, folder
  raise UserError(
      f'checkpoint={path!r} is not a checkpoint. Use the workdir of a '
      'run that has saved one, or one of its folders checkpoints/<step>.'
  )


def is_step(name: str) -> bool:
  """Returns whether the name of a folder in checkpoints/ is a step number."""
  # int() rejects other characters that are digits, such as a superscript two.
  return name.isascii() and name.isdigit() and len(name) <= 10


def held(folder: epath.Path) -> set[tuple[str, str]]:
  """Returns the parts of a checkpoint, such as ('params', 'backbone').

  Raises:
    UserError: if it cannot be read.
  """
  return {path[:2] for path in shapes(folder) if len(path) > 1}


def shapes(folder: epath.Path) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shape of each array in a checkpoint, by path.

  Raises:
    UserError: if it cannot be read.
  """
  return {
      path: tuple(leaf.shape)
      for path, leaf in _arrays(_metadata(folder)).items()
  }


def _claimed_bytes(array: ArrayMetadata) -> int:
  # A chunk is read as a whole, even if the array is smaller.
  chunk = array.storage.chunk_shape if array.storage else None
  values = max(math.prod(array.shape), math.prod(chunk or ()))
  return values * array.dtype.itemsize


def _arrays(tree: PyTree) -> dict[tuple[str, ...], Any]:
  return {
      path: leaf for path, leaf in flatten_dict(tree).items()
      if isinstance(leaf, ArrayMetadata) and leaf.shape is not None
  }


def _metadata(folder: epath.Path) -> PyTree:
  """Returns the metadata tree of a checkpoint, without reading its arrays.

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
  """Restores only a part of a checkpoint, such as the parameters.

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
  """Restores a whole checkpoint to the host, whatever it contains.

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
