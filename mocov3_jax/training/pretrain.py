"""Pre-training: builds everything a run needs from its config, and trains."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import evals, models, sources
from mocov3_jax.base import exits
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks, knobs
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.data.workers import workers_for
from mocov3_jax.evals import knn_queue
from mocov3_jax.evals.evaluator import EvalContext
from mocov3_jax.method import augment
from mocov3_jax.method.build import build_method, image_shape, run_keys
from mocov3_jax.method.train_step import Method, init_state, train_step
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.sources import catalog, listing
from mocov3_jax.training import attention_choice, flops, initial
from mocov3_jax.training.trainer import Trainer


def pretrain(config: ConfigDict, path: str) -> dict[str, Any]:
  """Trains to the end, from the newest checkpoint in `path` if there is one.

  Args:
    config: `default_config()` with any overrides applied.
    path: the workdir.

  Returns:
    The results, as a flat dictionary.

  Raises:
    UserError: if the input is bad, before anything is written to the workdir;
      or if training diverges.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  checks.validate(config, jax.device_count())
  # Before anything that all processes must do together.
  processes.require_same(knobs.flatten(workdir_lib.to_json(config)))
  splits = load_splits(config)
  plan = config_lib.plan(config, len(splits.train))
  mesh = sharding.make_mesh(fsdp=config.fsdp_devices)
  chosen, notes = attention_choice.choose(config, mesh, path)
  method = build_method(config, plan, mesh.size, chosen)
  reader = make_reader(
      config, splits.train, sharding.local_positions(mesh, config.batch_size)
  )
  watched = splits.train if config.knn.queue_share else None
  init, step = make_step(config, method, watched)
  beginning = initial.find(config, mesh, path)
  stop = exits.StopRequest()
  context = EvalContext(
      config, method.model, method.augment, splits, mesh, reader, stop
  )
  return Trainer(
      config=config, schema=config_lib.schema(), plan=plan, mesh=mesh,
      init=init, step=step, reader=reader, fingerprint=splits.fingerprint(),
      evaluators=evals.build_evaluators(context), monitors=knn_queue.FIELDS,
      flops_per_image=lambda: flops.step_flops(
          method, image_shape(config.data), config.batch_size
      ) / config.batch_size,
      advice='a lower optimizer.lr_per_256, a longer schedule.warmup_epochs, '
      'model.patch_embed=frozen',
      notes=(*_notes(config, splits, method), *notes, *beginning.notes),
      begin=beginning.change,
      environment={'attention': chosen.attention, **beginning.environment},
      stop=stop,
  ).run(
      path, lambda results, workdir, _: workdir_lib.write_result(
          results, workdir
      ),
  )


def make_step(
    config: ConfigDict, method: Method, watched: sources.Source | None = None
) -> tuple[Callable[[], Any], Callable[..., Any]]:
  """Returns the functions init and step, not yet jitted.

  Args:
    config: the run's config.
    method: the parts of a step.
    watched: the training images, if the kNN queue of `knn.queue_share` is to
      monitor the run; else None.

  Returns:
    () -> TrainState, and (TrainState, Batch) -> (TrainState, scalar metrics).
  """
  init_key, augment_key = run_keys(config.seed)

  def init():
    return init_state(method, init_key, image_shape(config.data))

  def step(state, batch):
    return train_step(method, augment_key, state, batch.images)

  if watched is not None:
    return knn_queue.watching(init, step, config, method.model, watched)
  # Without the queue nothing uses the features, so the compiler drops them.
  return init, lambda state, batch: step(state, batch)[:2]


def build_step(
    config: ConfigDict, plan: config_lib.Plan, mesh: Mesh
) -> tuple[Method, sharding.JittedStep]:
  """Returns the training step alone, to plan or benchmark it without a run.

  Args:
    config: the run's config.
    plan: the run's schedule in steps.
    mesh: the mesh to run on.

  Returns:
    The parts of the step, and the step jitted over the mesh.

  Raises:
    UserError: if no step can be built from the config.
  """
  method = build_method(
      config, plan, mesh.size,
      models.execution_on(mesh, config.model, config.data.image_size),
  )
  return method, sharding.jit_step(*make_step(config, method), mesh)


def load_splits(config: ConfigDict) -> sources.Splits:
  """Opens the data, and checks that the config fits it.

  Args:
    config: the run's config.

  Raises:
    UserError: if the source is unknown, the number of channels is wrong, or a
      monitor needs labels and the source has none.
  """
  splits = catalog.load(
      config.data.source, config.data.labels,
      listing.cache_folder(config.data.listing_cache), len(config.data.mean),
  )
  channels = splits.train.channels
  if len(config.data.mean) != channels:
    raise UserError(
        f'data.mean={config.data.mean} has {len(config.data.mean)} values, but '
        f'data.source={config.data.source!r} has {channels} channels. Allowed: '
        'one value per channel.'
    )
  if config.knn.queue_share and splits.test is None:
    raise UserError(
        f'knn.queue_share={config.knn.queue_share} needs labels, and '
        f'data.source={config.data.source!r} has none. Allowed: 0.'
    )
  return splits


def make_reader(
    config: ConfigDict, source: sources.Source, positions: np.ndarray
) -> pipeline.BatchReader:
  """Returns a reader of the examples at `positions` in each global batch."""
  return pipeline.BatchReader(
      source, positions, config.batch_size, config.seed,
      augment.both_views(config.augment), config.data.image_size,
      workers_for(config.data, source), labelled=config.knn.queue_share > 0,
  )


def _notes(
    config: ConfigDict, splits: sources.Splits, method: Method
) -> Iterator[str]:
  """Yields the lines to print when a run begins."""
  if splits.note:
    yield splits.note
  if splits.test is None:
    yield (
        'no labels, hence no kNN: alignment, uniformity and effective rank '
        'of the features are logged instead'
    )
  if config.optimizer.lr_per_256 == 0:
    yield 'optimizer.lr_per_256=0: nothing will be learned'
  cost = flops.network_cost(method.model, image_shape(config.data))
  yield f'{config.model.name}: {cost}'
