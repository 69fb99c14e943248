"""`benchmark losses`: compares a run's first losses on device and CPU."""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.benchmarks import step_process
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.parallel import sharding
from mocov3_jax.training import pretrain


def benchmark_losses(config: ConfigDict, steps: int) -> dict[str, Any]:
  """Takes the first steps of a run on this machine's device and on its CPU.

  Args:
    config: the config of the run, such as configs/digits.py.
    steps: the number of steps.

  Returns:
    A dict of 'here' and 'cpu', lists of one loss per step; 'difference', the
    largest relative difference between them; and 'device', its kind.

  Raises:
    UserError: for a bad config, or losses that are not finite.
  """
  found = {}
  for place in 'here', 'cpu':
    build = functools.partial(first_losses, config, steps, place == 'cpu')
    with step_process.stepper(build) as ask:
      found[place], device = ask(step_process.whole)
    if place == 'here':
      found['device'] = device
  for place in 'here', 'cpu':
    if not np.isfinite(found[place]).all():
      where = 'this device' if place == 'here' else 'the CPU'
      raise UserError(
          f'the losses on {where} are not finite: {found[place]}. Use a lower '
          'optimizer.lr_per_256; if only those of this device are not finite, '
          'it computes incorrectly.'
      )
  found['difference'] = max(
      abs(a - b) / abs(b)
      for a, b in zip(found['here'], found['cpu'], strict=True)
  )
  console.say(
      f'{steps} losses on {found["device"]} and on the CPU differ by at most '
      f'{found["difference"]:.1e} of their value'
  )
  return found


def first_losses(
    config: ConfigDict, steps: int, on_cpu: bool
) -> tuple[list[float], str]:
  """Returns the losses of the first steps, and the kind of the device."""
  if on_cpu:
    jax.config.update('jax_platforms', 'cpu')
  checks.validate(config, 1)
  mesh = sharding.make_mesh(jax.devices()[:1])
  splits = pretrain.load_splits(config)
  plan = config_lib.plan(config, len(splits.train))
  _, step = pretrain.build_step(config, plan, mesh)
  reader = pretrain.make_reader(
      config, splits.train, sharding.local_positions(mesh, config.batch_size)
  )
  state, losses = step.init(), []
  for batch in pipeline.train_batches(reader, 0, steps, 2):
    state, values = step(state, sharding.to_global(batch, mesh))
    losses.append(float(values['train/loss']))
  return losses, jax.devices()[0].device_kind
