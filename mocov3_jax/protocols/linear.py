"""The linear probe as a training job."""

import functools
from typing import Any

import jax
import numpy as np

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline, sources
from mocov3_jax.data.workers import Workers
from mocov3_jax.evals import features
from mocov3_jax.method import augment, optimizers
from mocov3_jax.method.build import image_shape
from mocov3_jax.models.layers import BatchNorm
from mocov3_jax.parallel import sharding
from mocov3_jax.protocols import linear_step
from mocov3_jax.protocols import setup as setup_lib
from mocov3_jax.protocols.setup import Setup
from mocov3_jax.runs import metrics
from mocov3_jax.training import trainer
from mocov3_jax.training.job import Job

PyTree = Any


def make_job(setup: Setup, lr_per_256: float, recolour=None, **parts) -> Job:
  """What the trainings of an evaluation have in common.

  Args:
    setup: of the evaluation.
    lr_per_256: of the peak of the schedule.
    recolour: as that of `BatchReader`.
    **parts: the rest of `Job`.

  Raises:
    UserError: for a batch or a schedule that does not fit the images.
  """
  config, mesh = setup.config, setup.mesh
  plan = make_plan(setup, lr_per_256)
  reader = pipeline.BatchReader(
      setup.splits.train,
      sharding.local_positions(mesh, config.batch_size), config.batch_size,
      config.seed, (config.view,), setup.run.config.data.image_size,
      Workers(config.data.threads), labelled=True, recolour=recolour,
  )
  return Job(
      config=config, free=setup_lib.FREE, plan=plan, mesh=mesh, reader=reader,
      fingerprint=setup_lib.fingerprint(setup), best='test/top1',
      evaluate_every=config.test_every_steps or plan.steps_per_epoch,
      flops_per_image=None,
      notes=(setup.splits.note,) if setup.splits.note else (), **parts,
  )


def make_plan(setup: Setup, lr_per_256: float) -> config_lib.Plan:
  """The steps of a training on the images of `setup`.

  Raises:
    UserError: if they do not fill a batch.
  """
  count, config = len(setup.splits.train), setup.config
  if count < config.batch_size:
    raise UserError(
        f'batch_size={config.batch_size} is larger than the {count} labelled '
        f'training images (data.source={config.data.source!r}, '
        f'data.labels_per_class={config.data.labels_per_class}). Allowed: at '
        f'most {count}.'
    )
  return config_lib.plan(config, count, lr_per_256)


def probe(setup: Setup, path: str) -> dict[str, Any]:
  """Trains a linear classifier for each learning rate.

  Args:
    setup: of the evaluation.
    path: the workdir.

  Returns:
    'linear/top1', after the last epoch at the rate that is best then, on the
    test images ([P] s5 sweeps likewise); 'linear/top1_best', the best of all
    epochs and rates, which the PyTorch release reports; 'linear/by_rate', last
    and best of each rate; and the hash of the backbone, which is the same
    before and after.

  Raises:
    UserError: for bad input, before anything is written.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  config, mesh = setup.config, setup.mesh
  rates = config.linear.lr_per_256
  parts = build(setup)
  init_key, step_key = jax.random.split(jax.random.key(config.seed))
  width = features.width(
      setup.run.model, setup.variables, image_shape(setup.run.config.data)
  )
  init = functools.partial(
      linear_step.init_state, parts, init_key, len(rates), width,
      setup.splits.train.num_classes,
  )
  placed = sharding.state_sharding(mesh, jax.eval_shape(init))

  @functools.partial(
      jax.jit, donate_argnums=1,
      in_shardings=(
          sharding.replicated(mesh), placed, sharding.batch_sharding(mesh)
      ),
      out_shardings=(placed, sharding.replicated(mesh)),
  )
  def step(frozen, state, batch):
    state, values = linear_step.probe_step(
        parts, frozen, step_key, state, batch.images, batch.labels
    )
    return state, values | trainer.from_batch(batch)

  job = make_job(
      setup, 1.0, init=jax.jit(init, out_shardings=placed),
      step=functools.partial(step, setup.variables),
      evaluate=_tester(setup, parts), advice='lower linear.lr_per_256',
  )
  results = trainer.carry_out(
      job, path, finish=lambda state, results, workdir: results.update(
          summary(rates, workdir)
      ),
  )
  before = job.fingerprint['backbone_sha256']
  if setup_lib.digest(setup.variables) != before:
    raise RuntimeError('the probe changed the backbone')
  return results | {'backbone_sha256': before}


def build(setup: Setup) -> linear_step.Probe:
  """The parts of the probe."""
  config, run = setup.config, setup.run
  view = augment.build(
      (config.view,), run.config.data, models.DTYPES[run.config.model.dtype]
  )

  def frozen_features(frozen, images, key):
    return run.model.apply(
        frozen, view(images, key)[:, 0], train=False, method='features'
    )

  plan = make_plan(setup, 1.0)
  schedule = optimizers.cosine_by_epochs(
      plan.peak_lr, plan.steps_per_epoch, plan.total_steps
  )
  return linear_step.Probe(
      features=frozen_features,
      optimizer=linear_step.build_optimizer(
          config.linear.lr_per_256, schedule, config.linear.momentum
      ),
      learning_rate=schedule,
      norm=BatchNorm(affine=False) if config.linear.batch_norm else None,
  )


def _tester(setup: Setup, parts: linear_step.Probe):
  """Returns state -> accuracy of each head on the test images."""
  rates = setup.config.linear.lr_per_256

  predict = jax.jit(functools.partial(linear_step.predict, parts))

  @functools.cache
  def test():  # The same at every time: the backbone is frozen.
    source, labels = sources.labelled(setup.splits.test)
    found, read = setup.extract(
        setup.variables['params'], setup.variables['batch_stats'], source
    )
    return found, labels[read]

  def evaluate(state):
    known, labels = test()
    found = jax.device_get(predict(state, known))  # [L, n]
    top1 = np.mean(found == labels, axis=1)
    return {
        'test/top1': float(np.max(top1)), 'test/images': len(labels)
    } | {
        f'test/top1_rate_{rate:g}': float(x)
        for rate, x in zip(rates, top1, strict=True)
    }

  return evaluate


def summary(rates: tuple[float, ...], workdir: Any) -> dict[str, Any]:
  """Last and best accuracies, from the metrics of the whole training."""
  rows = metrics.read_metrics(workdir / 'metrics.jsonl')
  by_rate = {}
  for rate in rates:
    name = f'test/top1_rate_{rate:g}'
    found = after_training(rows, name)
    by_rate[f'{rate:g}'] = {'last': found[-1], 'best': max(found)}
  rate = max(by_rate, key=lambda r: by_rate[r]['last'])
  return {
      'linear/top1': by_rate[rate]['last'],
      'linear/top1_best': max(r['best'] for r in by_rate.values()),
      'linear/lr_per_256': float(rate), 'linear/by_rate': by_rate,
  }


def after_training(rows: list[dict[str, Any]], name: str) -> list[float]:
  """The values of a metric in metrics.jsonl, but for that before step 1."""
  return [row[name] for row in rows if name in row and row['step']]
