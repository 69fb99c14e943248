"""Pre-trains: python -m mocov3_jax.train --config=FILE --workdir=DIR

Run the same line again to continue, exactly. The last line on stdout is one
JSON object with the results.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import sys
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
import numpy as np

from mocov3_jax import (
  augment,
  checkpoint,
  checks,
  loop,
  models,
  objectives,
  optim,
  sharding,
)
from mocov3_jax import config as config_lib
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.data import catalog, pipeline, sources
from mocov3_jax.errors import Preempted, UserError
from mocov3_jax.evals import features, knn, label_free
from mocov3_jax.passes import Passes
from mocov3_jax.tools import cli, compilation, distributed
from mocov3_jax.tools.recorder import Recorder
from mocov3_jax.train_step import Method, TrainState, init_state, train_step


def build_method(
    config: ConfigDict, plan: config_lib.Plan, devices: int = 1
) -> Method:
  """Assembles what the config names into the parts of a step.

  Args:
    config: of the run.
    plan: of the run.
    devices: over which the batch will lie.

  Raises:
    UserError: for an unknown name or numbers that do not fit together.
  """
  learning_rate = optim.warmup_cosine(
      plan.peak_lr, plan.warmup_steps, plan.total_steps
  )
  passes = Passes()
  if config.micro_batch:
    count = config.batch_size // (devices * config.micro_batch)
    passes = Passes(count, devices)
  model = models.build(
      config.model, config.head, config.data.image_size, passes
  )
  return Method(
      model=model,
      objective=objectives.build(config.objective),
      optimizer=optim.build(
          config.optimizer, learning_rate, model.backbone.freeze_patch_embed
      ),
      augment=augment.build(
          config.augment, config.data, models.DTYPES[config.model.dtype],
          passes,
      ),
      learning_rate=learning_rate,
      momentum=optim.build_momentum(config.objective, plan.total_steps),
  )


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """The keys of a run's initialisation and of its augmentation."""
  init_key, augment_key = jax.random.split(jax.random.key(seed))
  return init_key, augment_key


def compile_functions(config: ConfigDict, method: Method, mesh: Mesh):
  """Returns jitted (init, step): () -> state, (state, Batch) -> both.

  The state lies on the mesh as `sharding.state_sharding` says, batches are
  split over it, and the state given to a step is donated.
  """
  init_key, augment_key = run_keys(config.seed)
  size, channels = config.data.image_size, len(config.data.mean)
  make = functools.partial(
      init_state, method, init_key, (size, size, channels)
  )
  placed = sharding.state_sharding(mesh, jax.eval_shape(make))
  init = jax.jit(make, out_shardings=placed)

  @functools.partial(
      jax.jit,
      in_shardings=(placed, sharding.batch_sharding(mesh)),
      out_shardings=(placed, sharding.replicated(mesh)),
      donate_argnums=0,
  )
  def step(state, batch):
    state, values = train_step(method, augment_key, state, batch.images)
    # Over all processes, since the batch is global: they all learn of it at
    # the same step.
    values['data/unreadable'] = jnp.sum(batch.unreadable >= 0)
    if batch.stop is not None:
      values['train/stop'] = jnp.max(batch.stop)
    return state, values

  return init, step


def load_source(config: ConfigDict, cache: Any = None) -> sources.Splits:
  """Opens the data, and checks that the normalisation fits its channels.

  Args:
    config: of the run.
    cache: where listings of image folders are kept; None = nowhere.

  Raises:
    UserError: for an unknown source, or the wrong number of channels.
  """
  splits = catalog.load(config.data.source, config.data.labels, cache)
  channels = sources.channels(splits.train)
  if len(config.data.mean) != channels:
    raise UserError(
        f'data.mean={config.data.mean} has {len(config.data.mean)} values, but '
        f'data.source={config.data.source!r} has {channels} channels. Allowed: '
        f'one a channel.'
    )
  return splits


def make_reader(
    config: ConfigDict, source: sources.Source, positions: np.ndarray
) -> pipeline.BatchReader:
  """Returns the reader of the places `positions` of each global batch."""
  return pipeline.BatchReader(
      source, positions, config.batch_size, config.seed, config.augment,
      config.data.image_size, pipeline.Workers(config.data.threads),
  )


def build_monitor(
    config: ConfigDict, method: Method, splits: sources.Splits, mesh: Mesh,
    reader: pipeline.BatchReader,
):
  """Returns the evaluator between steps: kNN, or, without labels, others."""
  if splits.test is None:
    _, key = run_keys(config.seed)
    return label_free.build(method.model, method.augment, mesh, reader, key)
  extract = features.extractor(
      method.model, config.data, mesh, config.batch_size, reader.workers
  )
  return knn.build(config.knn, extract, splits)


@contextlib.contextmanager
def divergence_explained(
    run: Recorder, checkpoints: checkpoint.Checkpoints
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
        f'{"none" if saved is None else f"step {saved}"}. What helps: a lower '
        'optimizer.lr_per_256, a longer schedule.warmup_epochs, '
        'model.patch_embed=frozen, in a new workdir.'
    ) from e


def initial_state(
    init: Callable[[], TrainState], checkpoints: checkpoint.Checkpoints,
    mesh: Mesh,
) -> tuple[TrainState, int]:
  """The newest intact checkpoint of the workdir, or else a fresh start.

  Returns:
    The state on the mesh, and the updates done.

  Raises:
    UserError: if there are checkpoints, and none can be read.
  """
  shapes = jax.eval_shape(init)
  abstract = checkpoint.abstract(shapes, sharding.state_sharding(mesh, shapes))
  return checkpoints.restore(abstract) or (init(), 0)


def train(config: ConfigDict, path: str) -> dict[str, Any]:
  """Trains to the end, from the newest checkpoint in `path` if there is one.

  Args:
    config: as `default_config()`, after overrides.
    path: the workdir.

  Returns:
    The results, flat.

  Raises:
    UserError: for bad input, before anything is written (but a listing of an
      image folder, beside the workdir); or on divergence.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  checks.validate(config, jax.device_count())
  splits = load_source(config, workdir_lib.absolute(path).parent / '.listings')
  plan = config_lib.plan(config, len(splits.train))
  mesh = sharding.make_mesh(fsdp=config.fsdp_devices)
  method = build_method(config, plan, mesh.size)
  reader = make_reader(
      config, splits.train, sharding.local_positions(mesh, config.batch_size)
  )
  monitor = build_monitor(config, method, splits, mesh, reader)
  init, step_fn = compile_functions(config, method, mesh)
  # Signals are noted before anything is written, and until all is saved.
  claim = workdir_lib.claimed(
      path, config, checks.FREE_ON_RESUME, splits.fingerprint()
  )
  with distributed.peers_watched(), cli.stop_noted() as stop, distributed.led(
      claim, workdir_lib.absolute(path)
  ) as workdir:
    checkpoints = checkpoint.Checkpoints(
        workdir, config.save.keep_latest, config.save.keep_best, _warn
    )
    with contextlib.closing(checkpoints):
      state, start = initial_state(init, checkpoints, mesh)
      run = Recorder(config, plan, workdir, checkpoints, monitor, start)
      with contextlib.closing(run.writer):
        run.announce(splits, method, mesh, start)
        if start == 0:
          run.between_steps(0, state)
        run.check_readable(start)
        batches = run.watch(reader, start, stop)
        with divergence_explained(run, checkpoints):
          state, done = loop.run(
              state, step_fn,
              (sharding.to_global(batch, mesh) for batch in batches),
              start=start, stop=plan.total_steps, log=run.log,
              hooks=[loop.Hook(run.is_due, run.between_steps)],
              should_stop=lambda: run.stopping or run.too_many_unreadable,
          )
        if done < plan.total_steps:
          checkpoints.save(done, state, {})
          checkpoints.wait()
          run.check_readable(done)
          raise Preempted(f'stopped: saved step {done} in {workdir}')
        return run.results() | {'step': done, 'workdir': str(workdir)}


def main(
    config: ConfigDict, path: str, coordinator: str | None,
    num_processes: int | None, process_id: int | None,
) -> dict[str, Any] | None:
  """Trains as one of the processes of a run; the first one has the results."""
  distributed.start(coordinator, num_processes, process_id)
  compilation.keep_compiled()
  results = train(config, path)
  return results if distributed.is_primary() else None


def _warn(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/digits.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder of the run.', required=True
  )
  COORDINATOR = flags.DEFINE_string(
      'coordinator', None, 'Of several processes: host:port of the first.'
  )
  NUM_PROCESSES = flags.DEFINE_integer(
      'num_processes', None, 'How many there are.'
  )
  PROCESS_ID = flags.DEFINE_integer(
      'process_id', None, 'Which one this is, from 0.'
  )
  flags.mark_flag_as_required('config')
  cli.run(
      lambda: main(
          CONFIG.value, WORKDIR.value, COORDINATOR.value, NUM_PROCESSES.value,
          PROCESS_ID.value,
      )
  )
