"""The linear probe: heads on a frozen backbone, one for each learning rate."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocov3_jax import models, sources
from mocov3_jax.evals import features
from mocov3_jax.method import augment, optimizers
from mocov3_jax.method.build import image_shape
from mocov3_jax.models.layers import BatchNorm
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.protocols import linear_step
from mocov3_jax.protocols.setup import Setup
from mocov3_jax.protocols.supervised import (
  after_training,
  leave_network,
  make_plan,
  make_trainer,
)
from mocov3_jax.runs import metrics, network

PyTree = Any


def probe(setup: Setup, path: str) -> dict[str, Any]:
  """Trains a linear classifier for each learning rate.

  Args:
    setup: setup of the evaluation.
    path: the workdir.

  Returns:
    'linear/top1', the accuracy on the test images after the last epoch, at the
    rate that is best then (paper s5 sweeps the rate likewise);
    'linear/top1_best', the best accuracy of all epochs and rates, which the
    PyTorch release reports; 'linear/by_rate', the last and best accuracy of
    each rate; and 'backbone_sha256', the hash of the backbone, which the
    training does not change.

  Raises:
    UserError: for bad input, before anything is written.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  config = setup.config
  rates = config.linear.lr_per_256
  parts = build(setup)
  init_key, step_key = jax.random.split(jax.random.key(config.seed))
  width = features.width(
      setup.run.model, setup.variables, image_shape(setup.run.config.data)
  )

  def init(frozen):
    del frozen
    return linear_step.init_state(
        parts, init_key, len(rates), width, len(setup.splits.train.classes)
    )

  def step(state, batch, frozen):
    return linear_step.probe_step(
        parts, frozen, step_key, state, batch.images, batch.labels
    )

  trainer = make_trainer(
      setup, max(rates), _tester(setup, parts), init=init, step=step,
      constants=(setup.variables,), advice='lower linear.lr_per_256',
  )

  def finish(results, workdir, state):
    # Only the first process has written the metrics that are read here.
    results |= processes.from_primary(lambda: accuracies(rates, workdir))
    best = [f'{rate:g}' for rate in rates].index(
        f'{results["linear/lr_per_256"]:g}'
    )
    leave_network(
        setup, workdir, results['step'], setup.variables,
        linear_step.classifier(parts, state, best),
    )

  results = trainer.run(path, finish)
  before = trainer.fingerprint['backbone_sha256']
  if network.digest(setup.variables) != before:
    raise RuntimeError('the probe changed the backbone')
  return results | {'backbone_sha256': before}


def build(setup: Setup) -> linear_step.Probe:
  """Returns the parts of the probe."""
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
      rates=jnp.asarray(config.linear.lr_per_256),
      learning_rate=schedule,
      norm=BatchNorm(affine=False) if config.linear.batch_norm else None,
  )


def _tester(setup: Setup, parts: linear_step.Probe):
  """Returns state -> accuracy of each head on the test images."""
  rates = setup.config.linear.lr_per_256

  predict = jax.jit(
      functools.partial(linear_step.predict, parts),
      out_shardings=sharding.replicated(setup.mesh),
  )

  @functools.cache
  def test():  # Computed once: the backbone is frozen.
    source, labels = sources.labelled(setup.splits.test)
    found, read = setup.extract(
        setup.variables['params'], setup.variables['batch_stats'], source
    )
    known = sharding.spread(found, setup.mesh)
    return known, labels[read], len(source) - len(read)

  def evaluate(state):
    known, labels, unreadable = test()
    # [L, n]; the columns after these are padding.
    found = jax.device_get(predict(state, known))[:, : len(labels)]
    top1 = np.mean(found == labels, axis=1)
    return {
        'test/top1': float(np.max(top1)), 'test/images': len(labels),
        'test/unreadable': unreadable,
    } | {
        f'test/top1_rate_{rate:g}': float(x)
        for rate, x in zip(rates, top1, strict=True)
    }

  return evaluate


def accuracies(rates: tuple[float, ...], workdir: Any) -> dict[str, Any]:
  """Returns the last and best accuracies, from the metrics of the training."""
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
