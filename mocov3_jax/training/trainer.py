"""Carries out a training: pre-training, a linear probe or fine-tuning.

One order of events for all of them: claim the workdir, restore or initialise,
loop, evaluate and save between steps, save once more when stopped.
"""

from collections.abc import Callable, Iterator
import contextlib
import importlib.metadata
import json
import platform
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mocov3_jax.base import console, exits, files
from mocov3_jax.base.errors import Preempted, UserError
from mocov3_jax.config import checks
from mocov3_jax.data.pipeline import Batch
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.runs import checkpoints as checkpoints_lib
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.training import loop
from mocov3_jax.training.job import Job
from mocov3_jax.training.recorder import Recorder

State = Any


@processes.peers_watched()
def carry_out(
    job: Job, path: str,
    finish: Callable[[State, dict[str, Any], Any], None] = lambda *_: None,
) -> dict[str, Any]:
  """Trains to the end, from the newest checkpoint in `path` if there is one.

  Args:
    job: the training.
    path: the workdir.
    finish: is given the last state, the results and the workdir, while that
      is still claimed.

  Returns:
    The results, flat.

  Raises:
    UserError: for a workdir that cannot be used, before anything is written;
      or on divergence.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  total, save = job.plan.total_steps, job.config.save
  config = checks.flatten(workdir_lib.to_json(job.config))
  processes.require_same(config | {'the data': job.fingerprint})
  # Signals are noted before anything is written, and until all is saved.
  claim = workdir_lib.claimed(path, job.config, job.free, job.fingerprint)
  with exits.stop_noted() as stop, processes.led(
      claim, files.absolute(path)
  ) as workdir:
    checkpoints = checkpoints_lib.Checkpoints(
        workdir, save.keep_latest, save.keep_best, console.say, job.best
    )
    with contextlib.closing(checkpoints):
      state, start = initial_state(job.init, checkpoints, job.mesh)
      if start < total and processes.is_primary():
        # It is not done, even if it was before its last checkpoint was lost.
        (workdir / 'result.json').unlink(missing_ok=True)
        write_environment(workdir, job.mesh)
      run = Recorder(job, workdir, checkpoints, start)
      with contextlib.closing(run.writer):
        run.announce(start)
        if start == 0:
          run.between_steps(0, state)
        batches = run.watch(start, stop)
        with divergence_explained(run, checkpoints, job.advice):
          state, done = loop.run(
              state, job.step,
              (sharding.to_global(batch, job.mesh) for batch in batches),
              start=start, stop=total, log=run.log,
              hooks=[loop.Hook(run.is_due, run.between_steps)],
              should_stop=lambda: run.stopping or run.too_many_unreadable,
          )
        if done < total:
          checkpoints.save(done, state, {})
          checkpoints.wait()
          run.check_readable(done)
          raise Preempted(f'stopped: saved step {done} in {workdir}')
        results = run.results() | {'step': done, 'workdir': str(workdir)}
        finish(state, results, workdir)
        return results


def keep_results(
    state: State, results: dict[str, Any], workdir: epath.Path
) -> None:
  """A `finish`: writes result.json, which says that the run is done.

  Not again when a run that is done is repeated: that one knows less of it.
  """
  del state
  path = workdir / 'result.json'
  if processes.is_primary() and not path.exists():
    files.write_whole(path, json.dumps(results, indent=2) + '\n')


def write_environment(workdir: epath.Path, mesh: Mesh) -> None:
  """Writes environment.json: with what the run was last begun or continued."""
  found = {
      package: importlib.metadata.version(package)
      for package in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
  } | {
      'python': platform.python_version(),
      'backend': jax.default_backend(),
      'device': mesh.devices.flat[0].device_kind,
      'devices': mesh.size,
      'processes': jax.process_count(),
  }
  text = json.dumps(found, indent=2) + '\n'
  files.write_whole(workdir / 'environment.json', text)


def from_batch(batch: Batch) -> dict[str, jax.Array]:
  """What the run must hear of a batch, within the jitted step.

  Over all processes, since the batch is global: they all learn of it at the
  same step.
  """
  values = {'data/unreadable': jnp.sum(batch.unreadable >= 0)}
  if batch.stop is not None:
    values['train/stop'] = jnp.max(batch.stop)
  return values


def initial_state(
    init: Callable[[], State], checkpoints: checkpoints_lib.Checkpoints,
    mesh: Mesh,
) -> tuple[State, int]:
  """The newest intact checkpoint of the workdir, or else a fresh start.

  Returns:
    The state on the mesh, and the updates done.

  Raises:
    UserError: if there are checkpoints, and none can be read.
  """
  shapes = jax.eval_shape(init)
  abstract = checkpoints_lib.abstract(
      shapes, sharding.state_sharding(mesh, shapes)
  )
  return checkpoints.restore(abstract) or (init(), 0)


@contextlib.contextmanager
def divergence_explained(
    run: Recorder, checkpoints: checkpoints_lib.Checkpoints, advice: str
) -> Iterator[None]:
  """Turns a non-finite metric into a message that says what to do."""
  try:
    yield
  except loop.NonFinite as e:
    # What was saved at this very step is the state that broke.
    saved = checkpoints.newest_before(e.step)
    run.writer.write(e.step, {'train/diverged': 1.0})
    raise UserError(
        f'training diverged at step {e.step}: loss {e.values["train/loss"]}, '
        f'gradient norm {e.values["grad_norm/global"]}, learning rate '
        f'{e.values["train/lr"]:.3g}. Last good checkpoint: '
        f'{"none" if saved is None else f"step {saved}"}. What helps: '
        f'{advice}, in a new workdir.'
    ) from e
