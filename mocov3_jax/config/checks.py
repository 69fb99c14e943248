"""Config checks that need neither the data nor the model.

The range of a single field is defined beside its default. This file checks
what depends on several fields or on the number of devices.
"""

from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.config import evaluation, knobs, training
from mocov3_jax.config.knobs import Range, require


def validate(config: ConfigDict, device_count: int | None = None) -> None:
  """Checks the numeric fields of a pre-training config.

  Names (model, optimizer, source, ...) are checked by the code that uses them.

  Args:
    config: a `default_config()`, perhaps with other values.
    device_count: number of devices that the run will use; None = unknown.

  Raises:
    UserError: for unknown or missing fields, or the first value out of range.
  """
  knobs.check(training.schema(), config)
  name, head = config.objective.name, config.head
  require('head.prototypes', head.prototypes, Range(
      f'2 or more if objective.name is swav, and 0 if not; here it is {name!r}',
      lambda v: v >= 2 if name == 'swav' else v == 0,
  ))
  require('head.predictor_layers', head.predictor_layers, Range(
      '0 with head.prototypes, which take their place',
      lambda v: v == 0 or not head.prototypes,
  ))
  require('head.predictor_layers', head.predictor_layers, Range(
      "0 if objective.name is 'simclr', which has no predictor",
      lambda v: v == 0 or name != 'simclr',
  ))
  require('objective.queue', config.objective.queue, Range(
      f'0 where objective.name is {name!r}: only moco_v3 keeps a queue',
      lambda v: v == 0 or name == 'moco_v3',
  ))
  require('data.std', config.data.std, Range(
      'as many numbers as data.mean, each above 0',
      lambda v: len(v) == len(config.data.mean),
  ))
  for name, view in config.augment.items():
    require_colour(f'augment.{name}', view, len(config.data.mean))
  # An unknown number of devices is at least a multiple of this.
  device_count = device_count or config.fsdp_devices
  _require_multiple(config, device_count)
  require('fsdp_devices', config.fsdp_devices, Range(
      f'a divisor of the {device_count} devices',
      lambda v: device_count % v == 0,
  ))
  share = config.batch_size // device_count
  require('micro_batch', config.micro_batch, Range(
      f'0, or a divisor of the {share} images of each device',
      lambda v: v == 0 or share % v == 0,
  ))


def require_colour(name: str, view: ConfigDict, channels: int) -> None:
  """Checks that the colour operations of a view suit the images' channels.

  Saturation, hue and grayscale are defined for RGB. They leave gray images
  unchanged.

  Args:
    name: config field of the view, for the message.
    view: config table of the view.
    channels: number of channels of the images.

  Raises:
    UserError: naming each active field that needs RGB.
  """
  if channels in (1, 3):
    return
  fields = ('gray_prob',)
  if view.jitter_prob:
    fields += ('saturation', 'hue')
  wrong = [field for field in fields if view[field]]
  if wrong:
    given = ', '.join(f'{name}.{field}={view[field]}' for field in wrong)
    raise UserError(
        f'{given}: these are operations on RGB, and data.mean has {channels} '
        'values, one per channel. Allowed: 0 for each of them.'
    )


def validate_eval(config: ConfigDict, device_count: int) -> None:
  """Checks an evaluation config, as `validate` checks a pre-training one."""
  knobs.check(evaluation.schema(), config)
  if config.protocol not in evaluation.PROTOCOLS:
    raise unknown('protocol', config.protocol, evaluation.PROTOCOLS)
  _require_multiple(config, device_count)
  if config.protocol == 'linear':
    require('schedule.warmup_epochs', config.schedule.warmup_epochs, Range(
        "0: the protocol 'linear' has no warm-up", lambda v: v == 0
    ))
    require('batch_size', config.batch_size, Range(
        'at least 2 with linear.batch_norm: one image has no statistics',
        lambda v: v >= 2 or not config.linear.batch_norm,
    ))


def _require_multiple(config: ConfigDict, devices: int) -> None:
  require('batch_size', config.batch_size, Range(
      f'a multiple of the {devices} devices', lambda v: v % devices == 0
  ))
