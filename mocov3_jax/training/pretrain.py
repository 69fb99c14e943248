"""Pre-training: what it is made of."""

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import catalog, pipeline, sources
from mocov3_jax.data.workers import Workers
from mocov3_jax.evals import features, knn, knn_queue, label_free
from mocov3_jax.method import augment
from mocov3_jax.method.build import build_method, image_shape, run_keys
from mocov3_jax.method.train_step import Method, init_state, train_step
from mocov3_jax.parallel import sharding
from mocov3_jax.training import flops, trainer
from mocov3_jax.training.job import Job


def compile_functions(
    config: ConfigDict, method: Method, mesh: Mesh,
    train: sources.Source | None = None,
):
  """Returns jitted (init, step): () -> state, (state, Batch) -> both.

  The state lies on the mesh as `sharding.state_sharding` says, batches are
  split over it, and the state given to a step is donated.

  Args:
    config: of the run.
    method: the parts of a step.
    mesh: to train on.
    train: the images; without them there is no queue of `knn.queue_share`.
  """
  init_key, augment_key = run_keys(config.seed)
  knn_c = config.knn
  size = 0
  if train is None:
    method = method.replace(keep_features=False)
  if method.keep_features:
    size = knn_queue.length(knn_c.queue_share, len(train), config.batch_size)

  def make():
    state = init_state(method, init_key, image_shape(config.data))
    if not size:
      return state
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    width = features.width(method.model, variables, image_shape(config.data))
    return knn_queue.with_queue(state, size, width)

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
    if size:
      state, found = knn_queue.watch(
          state, values.pop('features'), batch.labels,
          k=knn.capped_k(knn_c.k, size, train.num_classes),
          temperature=knn_c.temperature, num_classes=train.num_classes,
      )
      values |= found
    return state, values | trainer.from_batch(batch)

  return init, step


def load_source(config: ConfigDict, cache: Any = None) -> sources.Splits:
  """Opens the data, and checks that the config fits it.

  Args:
    config: of the run.
    cache: where listings of image folders are kept; None = nowhere.

  Raises:
    UserError: for an unknown source, the wrong number of channels, or a
      monitor that needs labels where there are none.
  """
  splits = catalog.load(config.data.source, config.data.labels, cache)
  channels = sources.channels(splits.train)
  if len(config.data.mean) != channels:
    raise UserError(
        f'data.mean={config.data.mean} has {len(config.data.mean)} values, but '
        f'data.source={config.data.source!r} has {channels} channels. Allowed: '
        f'one a channel.'
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
  """Returns the reader of the places `positions` of each global batch."""
  return pipeline.BatchReader(
      source, positions, config.batch_size, config.seed,
      augment.both_views(config.augment), config.data.image_size,
      Workers(config.data.threads), labelled=config.knn.queue_share > 0,
  )


def build_monitor(
    config: ConfigDict, method: Method, splits: sources.Splits, mesh: Mesh,
    reader: pipeline.BatchReader,
):
  """Returns the evaluator between steps: kNN, or, without labels, others."""
  if splits.test is None:
    _, key = run_keys(config.seed)
    return label_free.build(method.model, method.augment, mesh, reader, key)
  # No more at a time than in a pass of the training.
  count = config.micro_batch * mesh.size or config.batch_size
  extract = features.extractor(
      method.model, config.data, mesh, count, reader.workers
  )
  return knn.build(config.knn, extract, splits, mesh)


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
  splits = load_source(config, files.absolute(path).parent / '.listings')
  plan = config_lib.plan(config, len(splits.train))
  mesh = sharding.make_mesh(fsdp=config.fsdp_devices)
  method = build_method(config, plan, mesh.size)
  reader = make_reader(
      config, splits.train, sharding.local_positions(mesh, config.batch_size)
  )
  monitor = build_monitor(config, method, splits, mesh, reader)
  init, step_fn = compile_functions(config, method, mesh, splits.train)
  return trainer.carry_out(
      Job(
          config=config, free=checks.FREE_ON_RESUME, plan=plan, mesh=mesh,
          reader=reader, fingerprint=splits.fingerprint(), init=init,
          step=step_fn,
          evaluate=lambda s: monitor(s.params, s.batch_stats),
          evaluate_every=config.knn.every_steps, best='knn/top1',
          flops_per_image=lambda: flops.step_flops(
              method, image_shape(config.data), config.batch_size
          ) / config.batch_size,
          advice='a lower optimizer.lr_per_256, a longer '
          'schedule.warmup_epochs, model.patch_embed=frozen',
          notes=tuple(notes(config, splits, method)),
      ),
      path,
      finish=trainer.keep_results,
  )


def notes(
    config: ConfigDict, splits: sources.Splits, method: Method
) -> Iterator[str]:
  """What to say of a run as it begins."""
  if splits.note:
    yield splits.note
  if splits.test is None:
    yield (
        'no labels, hence no kNN: alignment, uniformity and effective rank '
        'of the features are logged instead'
    )
  cost = flops.summarise(method.model, image_shape(config.data))
  yield f'{config.model.name}: {cost}'
