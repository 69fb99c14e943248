"""Checks of a config that need neither data nor model."""

import functools
import math
from typing import Any

from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.config.evaluation import eval_config

# Fields that steer what a training run reports and keeps, or how it computes
# (but for rounding), not what: they may change when it is continued.
FREE_ON_RESUME = (
    'micro_batch', 'fsdp_devices', 'model.remat', 'model.scan',
    'data.prefetch', 'data.threads', 'data.max_unreadable', 'knn.every_steps',
    'log.', 'save.',
)

_VIEWS = ('augment.view1', 'augment.view2')
_AT_LEAST_ONE = (
    'batch_size fsdp_devices data.image_size data.prefetch model.patch_size '
    'head.projector_layers head.hidden_dim head.out_dim '
    'objective.sinkhorn_iterations '
    'knn.k log.every_steps save.every_steps save.keep_latest'
).split()
_NOT_NEGATIVE = (
    'seed micro_batch head.predictor_layers head.prototypes model.depth '
    'model.dim model.num_heads objective.queue '
    'optimizer.lr_per_256 optimizer.weight_decay '
    'optimizer.trust_coefficient schedule.epochs '
    'schedule.steps schedule.warmup_epochs knn.every_steps knn.bank_images '
    'knn.query_images data.threads save.keep_best'
).split()
_POSITIVE = (
    'objective.temperature objective.sinkhorn_epsilon optimizer.eps '
    'optimizer.patch_embed_clip knn.temperature'
).split()
_AT_MOST_ONE = (
    'objective.momentum', 'optimizer.momentum', 'data.max_unreadable',
    'knn.queue_share',
)
_BELOW_ONE = ('optimizer.b1', 'optimizer.b2')
_EVAL_AT_LEAST_ONE = (
    'batch_size knn.k logistic.iterations data.prefetch log.every_steps '
    'save.every_steps save.keep_latest'
).split()
_EVAL_NOT_NEGATIVE = (
    'seed knn.bank_images knn.query_images data.threads data.labels_per_class '
    'schedule.epochs schedule.steps schedule.warmup_epochs test_every_steps '
    'save.keep_best finetune.lr_per_256 finetune.warmup_lr finetune.min_lr '
    'finetune.weight_decay finetune.mixup finetune.cutmix'
).split()
_EVAL_SHARES = 'data.max_unreadable finetune.erase linear.momentum'.split()
_EVAL_BELOW_ONE = (
    'finetune.drop_path', 'finetune.smoothing', 'finetune.ema'
)
_EVAL_POSITIVE_NUMBERS = (
    'knn.more_k', 'knn.more_temperatures', 'linear.lr_per_256',
    'logistic.inverse_penalties',
)
_VIEW_NOT_NEGATIVE = 'brightness contrast saturation'.split()
_VIEW_AT_MOST_ONE = (
    'crop_min jitter_prob gray_prob blur_prob solarize_prob flip_prob'
).split()


def validate(config: ConfigDict, device_count: int | None = None) -> None:
  """Checks the numbers of a `default_config()`.

  Names (model, optimizer, source, ...) are checked by what builds them.

  Args:
    config: of a run.
    device_count: on which it is to run; None = not here.

  Raises:
    UserError: for a field too many or too few, or the first out of its range.
  """
  require_fields(config, config_lib.default_config())
  for field in _AT_LEAST_ONE:
    _require(field, config, lambda v: v >= 1, 'at least 1')
  for field in _POSITIVE:
    _require(field, config, lambda v: v > 0, 'above 0')
  for field in _NOT_NEGATIVE:
    _require(field, config, lambda v: v >= 0, '0 or more')
  for field in _AT_MOST_ONE:
    _require(field, config, lambda v: 0 <= v <= 1, 'from 0 to 1')
  for field in _BELOW_ONE:
    _require(field, config, lambda v: 0 <= v < 1, 'from 0 to below 1')
  _require('seed', config, lambda v: v < 2**32, 'below 2**32')
  name = config.objective.name
  _require(
      'head.prototypes', config, lambda v: (v > 0) == (name == 'swav'),
      f'above 0 if objective.name is swav, and 0 if not; here it is {name!r}',
  )
  _require(
      'head.predictor_layers', config,
      lambda v: v == 0 or not config.head.prototypes,
      '0 with head.prototypes, which take their place',
  )
  _require(
      'objective.queue', config, lambda v: v == 0 or name == 'moco_v3',
      f'0 where objective.name is {name!r}: only moco_v3 keeps a queue',
  )
  for view in _VIEWS:
    _validate_view(view, config)
  _require('data.mean', config, lambda v: len(v) >= 1, 'a number a channel')
  _require(
      'data.std', config,
      lambda v: len(v) == len(config.data.mean) and min(v) > 0,
      'as many numbers as data.mean, each above 0',
  )
  # Of any number all that is known is that it is a multiple of this.
  device_count = device_count or config.fsdp_devices
  _require_multiple('batch_size', config, device_count)
  _require(
      'fsdp_devices', config, lambda v: device_count % v == 0,
      f'a divisor of the {device_count} devices',
  )
  share = config.batch_size // device_count
  _require(
      'micro_batch', config, lambda v: v == 0 or share % v == 0,
      f'0, or a divisor of the {share} images of each device',
  )


def _validate_view(view: str, config: ConfigDict) -> None:
  for field in _VIEW_NOT_NEGATIVE:
    _require(f'{view}.{field}', config, lambda v: v >= 0, '0 or more')
  for field in _VIEW_AT_MOST_ONE:
    _require(f'{view}.{field}', config, lambda v: 0 <= v <= 1, 'from 0 to 1')
  _require(f'{view}.crop_min', config, lambda v: v > 0, 'above 0')
  _require(f'{view}.hue', config, lambda v: 0 <= v <= 0.5, 'from 0 to 0.5')
  for field in 'crop_ratio', 'blur_sigma':
    _require(
        f'{view}.{field}', config,
        lambda v: len(v) == 2 and 0 < v[0] <= v[1],
        'two positive numbers, the smaller first',
    )
  _require(
      f'{view}.blur_sigma', config, lambda v: v[1] <= 2, 'at most 2 pixels'
  )


def validate_eval(config: ConfigDict, device_count: int) -> None:
  """Checks an `eval_config()`, as `validate` does a `default_config()`."""
  require_fields(config, eval_config())
  for field in _EVAL_AT_LEAST_ONE:
    _require(field, config, lambda v: v >= 1, 'at least 1')
  for field in _EVAL_NOT_NEGATIVE:
    _require(field, config, lambda v: v >= 0, '0 or more')
  for field in _EVAL_SHARES:
    _require(field, config, lambda v: 0 <= v <= 1, 'from 0 to 1')
  for field in _EVAL_BELOW_ONE:
    _require(field, config, lambda v: 0 <= v < 1, 'from 0 to below 1')
  _require('seed', config, lambda v: v < 2**32, 'below 2**32')
  _require('knn.temperature', config, lambda v: v > 0, 'above 0')
  _require(
      'finetune.layer_decay', config, lambda v: 0 < v <= 1,
      'above 0, at most 1',
  )
  for field in _EVAL_POSITIVE_NUMBERS:
    _require(
        field, config, lambda v: len(set(v)) == len(v) and all(
            x > 0 for x in v
        ),
        'different numbers above 0',
    )
  for field in 'linear.lr_per_256', 'logistic.inverse_penalties':
    _require(field, config, lambda v: len(v) >= 1, 'at least one number')
  _require(
      'finetune.rand_augment', config, lambda v: 0 <= v <= 10, 'from 0 to 10'
  )
  _validate_view('view', config)
  _require_multiple('batch_size', config, device_count)


def require_fields(config: ConfigDict, schema: ConfigDict) -> None:
  """Checks that a config has the fields of `schema` and no others.

  Raises:
    UserError: with the first of them.
  """
  given, known = flatten(config.to_dict()), flatten(schema.to_dict())
  for verb, fields in (
      ('has unknown', given.keys() - known.keys()),
      ('lacks', known.keys() - given.keys()),
  ):
    if fields:
      shown = sorted(fields)[:5] + ['...'] * (len(fields) > 5)
      raise UserError(
          f'the config {verb} fields: {", ".join(shown)}. Allowed: a config '
          'made for this command, with each of its fields.'
      )


def _require_multiple(field: str, config: ConfigDict, devices: int) -> None:
  _require(
      field, config, lambda v: v % devices == 0,
      f'a multiple of the {devices} devices',
  )


def _require(field: str, config: ConfigDict, check, allowed: str) -> None:
  value = functools.reduce(lambda c, key: c[key], field.split('.'), config)
  numbers = value if isinstance(value, (tuple, list)) else (value,)
  finite = all(
      isinstance(n, (int, float)) and math.isfinite(n) for n in numbers
  )
  if not (finite and check(value)):
    raise UserError(f'{field}={value!r} is out of range. Allowed: {allowed}.')


def differences(
    saved: dict[str, Any], now: dict[str, Any], free: tuple[str, ...]
) -> list[str]:
  """Lists the fields in which two runs compute different things.

  Args:
    saved: a config as nested dicts of JSON values, as config.json holds it.
    now: the same of the present command.
    free: fields, or groups with a final dot, that may differ.

  Returns:
    One 'field: OLD in the workdir, NEW now' per field that differs.
  """
  old, new = flatten(saved), flatten(now)
  return [
      f'{field}: {old.get(field, "absent")!r} in the workdir, '
      f'{new.get(field, "absent")!r} now'
      for field in sorted(old.keys() | new.keys())
      if not field.startswith(free)
      and old.get(field) != new.get(field)
  ]


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one, with dotted names."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat
