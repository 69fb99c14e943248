"""Builds the parts of a training step from a config."""

import functools

import jax
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method import augment, monitors, objectives, optimizers
from mocov3_jax.method.train_step import Method
from mocov3_jax.models.execution import REFERENCE, Execution
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel.microbatch import ONE_BATCH, MicroBatches


def build_method(
    config: ConfigDict, plan: config_lib.Plan, devices: int = 1,
    execution: Execution = REFERENCE,
) -> Method:
  """Builds the parts of a training step that the config describes.

  Args:
    config: the run's config.
    plan: the run's schedule in steps.
    devices: the number of devices that share the batch.
    execution: how the network is computed on them.

  Raises:
    UserError: if a name is unknown or numbers do not fit together.
  """
  learning_rate = optimizers.warmup_cosine(
      plan.peak_lr, plan.warmup_steps, plan.total_steps
  )
  micro_batches = ONE_BATCH
  if config.micro_batch:
    count = config.batch_size // (devices * config.micro_batch)
    micro_batches = MicroBatches(count, devices)
  model = models.build(
      config.model, config.head, config.data.image_size, micro_batches,
      execution,
  )
  if config.optimizer.layer_decay != 1 and not isinstance(
      model.backbone, ViT
  ):
    raise UserError(
        f'optimizer.layer_decay={config.optimizer.layer_decay} is for ViTs, '
        f'and model.name is {config.model.name!r}. Allowed: 1.0.'
    )
  return Method(
      model=model,
      objective=objectives.build(config.objective),
      optimizer=optimizers.build(
          config.optimizer, learning_rate, model.backbone.frozen,
          model.backbone.clip_patch_embed, len(model.backbone.blocks),
          round(config.init.freeze_backbone_epochs * plan.steps_per_epoch),
      ),
      augment=augment.build(
          augment.both_views(config.augment), config.data,
          models.DTYPES[config.model.dtype], micro_batches,
      ),
      learning_rate=learning_rate,
      momentum=optimizers.build_momentum(config.objective, plan.total_steps),
      monitor=_monitor(config, model),
  )


def _monitor(config: ConfigDict, model: models.Network) -> monitors.Monitor:
  layers = monitors.layers_of(model.backbone, config.log.blocks)
  gradients = monitors.gradients(layers)
  if not config.log.updates:
    return gradients
  clip = lambda grads: grads
  if model.backbone.clip_patch_embed:
    clip = functools.partial(optimizers.clipped, config.optimizer)
  return monitors.both(
      gradients, monitors.updates(config.optimizer, layers, clip)
  )


def image_shape(data: ConfigDict) -> tuple[int, int, int]:
  """Returns the shape of a view, (S, S, C)."""
  return data.image_size, data.image_size, len(data.mean)


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """Returns the random keys of a run's initialisation and augmentation."""
  init_key, augment_key = jax.random.split(jax.random.key(seed))
  return init_key, augment_key
