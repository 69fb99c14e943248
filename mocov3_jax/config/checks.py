"""Checks of a config that need neither data nor model.

The range of each field stands beside its default; here is what depends on
several fields, or on the number of devices.
"""

from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import evaluation, knobs, training
from mocov3_jax.config.knobs import Range, require


def validate(config: ConfigDict, device_count: int | None = None) -> None:
  """Checks the numbers of a `default_config()`.

  Names (model, optimizer, source, ...) are checked by what builds them.

  Args:
    config: of a run.
    device_count: on which it is to run; None = not here.

  Raises:
    UserError: for a field too many or too few, or the first out of its range.
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
  # Of any number of devices all that is known is that it is a multiple of this.
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
  """Checks that a view does to images only what their channels allow.

  Saturation, hue and grayscale are of RGB. They leave gray as it is.

  Args:
    name: of the view's table, for the message.
    view: its table.
    channels: of the images.

  Raises:
    UserError: with each field that needs RGB.
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
        'values, one a channel. Allowed: 0 for each of them.'
    )


def validate_eval(config: ConfigDict, device_count: int) -> None:
  """Checks an `eval_config()`, as `validate` does a `default_config()`."""
  knobs.check(evaluation.schema(), config)
  _require_multiple(config, device_count)
  if config.protocol == 'linear' and config.linear.batch_norm:
    require('batch_size', config.batch_size, Range(
        'at least 2 with linear.batch_norm: one image has no statistics',
        lambda v: v >= 2,
    ))


def _require_multiple(config: ConfigDict, devices: int) -> None:
  require('batch_size', config.batch_size, Range(
      f'a multiple of the {devices} devices', lambda v: v % devices == 0
  ))
