"""A knob: the default of a config field, its range, and when it may change."""

from collections.abc import Callable
import dataclasses
import sys
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError


class Range(NamedTuple):
  """The numbers that a field may have.

  Attributes:
    text: completes the sentence "Allowed: ...".
    holds: value -> whether it is within the range.
  """

  text: str
  holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Knob:
  """A field of a config.

  Attributes:
    default: its value unless a recipe or the command line sets another one.
    allowed: the range of a number, or of a tuple of numbers; None for names
      and switches, which are checked by the code that uses them.
    free: whether the field may change when a run is continued. Such a field
      steers what a run reports and keeps, or how it computes (up to
      rounding), but not what it computes.
    added: whether the field was added after the first version, with a default
      that reproduces what versions without it did.
    zero: what 0 means, in words, if it is a special value; else ''.
  """

  default: Any
  allowed: Range | None = None
  free: bool = False
  added: bool = False
  zero: str = ''


# A tree of dicts with knobs as leaves.
Schema = dict[str, Any]

AT_LEAST_ONE = Range('at least 1', lambda v: v >= 1)
NOT_NEGATIVE = Range('0 or more', lambda v: v >= 0)
POSITIVE = Range('above 0', lambda v: v > 0)
SHARE = Range('from 0 to 1', lambda v: 0 <= v <= 1)
SHARE_ABOVE_ZERO = Range('above 0, at most 1', lambda v: 0 < v <= 1)
BELOW_ONE = Range('from 0 to below 1', lambda v: 0 <= v < 1)
SEED = Range('from 0 to below 2**32', lambda v: 0 <= v < 2**32)


def within(low: int, high: int) -> Range:
  """Returns the range of whole numbers from `low` to `high`.

  The upper bounds of sizes are larger than anything that is trained in
  practice. They keep a config from elsewhere from asking for a billion layers.
  """
  return Range(f'from {low:,} to {high:,}', lambda v: low <= v <= high)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
  """Turns nested dicts into one dict with dotted names."""
  return flatten_dict(tree, sep='.')


def defaults(schema: Schema) -> ConfigDict:
  """Returns a config with all defaults, locked."""
  def values(tree):
    return {
        name: values(x) if isinstance(x, dict) else x.default
        for name, x in tree.items()
    }

  return ConfigDict(values(schema)).lock()


def free_fields(schema: Schema) -> frozenset[str]:
  """Returns the dotted names of the fields that may change on resume."""
  return frozenset(f for f, knob in flatten(schema).items() if knob.free)


def check(schema: Schema, config: ConfigDict) -> None:
  """Checks that a config has the fields of `schema`, within their ranges.

  Raises:
    UserError: for unknown or missing fields, or for the first value that has
      another type than its default or is out of its range.
  """
  require_fields(config, schema)
  values = flatten(config.to_dict())
  check_types(schema, values)
  for field, knob in flatten(schema).items():
    if knob.allowed is not None:
      require(field, values[field], knob.allowed)


def check_types(schema: Schema, values: dict[str, Any]) -> None:
  """Checks the types of those config fields that `schema` knows.

  Args:
    schema: the schema of this version.
    values: config values by dotted name, perhaps from another version.

  Raises:
    UserError: for the first value that has another type than its default.
  """
  for field, knob in flatten(schema).items():
    if field in values and not _alike(knob.default, values[field]):
      raise UserError(
          f'{field}={str(values[field])[:200]!r} has the wrong type. Allowed: '
          f'the type of the default, {knob.default!r}.'
      )


def _alike(default: Any, value: Any) -> bool:
  """Returns whether a value, perhaps read from JSON, has the default's type."""
  if isinstance(default, tuple):
    return isinstance(value, (tuple, list))
  if isinstance(default, float):  # An int is accepted, too.
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return type(value) is type(default)


def is_finite(value: Any) -> bool:
  """Returns whether a value is a number that a float can hold."""
  # math.isfinite raises for integers that are too large.
  return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def require(field: str, value: Any, allowed: Range) -> None:
  """Checks that a value consists of finite numbers within a range.

  Raises:
    UserError: naming the field, the value and the range, if it does not.
  """
  numbers = value if isinstance(value, (tuple, list)) else (value,)
  if not (all(map(is_finite, numbers)) and allowed.holds(value)):
    raise UserError(
        f'{field}={value!r} is out of range. Allowed: {allowed.text}.'
    )


def require_fields(config: ConfigDict, schema: Schema) -> None:
  """Checks that a config has the fields of `schema` and no others.

  Raises:
    UserError: naming the first few fields that are unknown or missing.
  """
  given, known = flatten(config.to_dict()), flatten(schema)
  for verb, fields in (
      ('has unknown', given.keys() - known.keys()),
      ('lacks', known.keys() - given.keys()),
  ):
    if fields:
      raise UserError(
          f'the config {verb} fields: {_some(sorted(fields))}. Use a '
          'config made for this command, with each of its fields.'
      )


def completed(
    saved: dict[str, Any], schema: Schema
) -> tuple[dict[str, Any], list[str]]:
  """Adds the default of each field that an earlier version's config lacks.

  Args:
    saved: a config as nested dicts of JSON values, as in config.json.
    schema: the schema of this version.

  Returns:
    The complete config in the same form, and the names of the added fields.

  Raises:
    UserError: for fields that this version does not know, and for missing
      fields whose default may differ from what the run computed.
  """
  given, known = flatten(saved), flatten(schema)
  absent = sorted(known.keys() - given.keys())
  unknown = sorted(given.keys() - known.keys())
  if unknown:
    raise UserError(
        f'the config has fields that this version does not know: '
        f'{_some(unknown)}. Use the config of this version or an earlier '
        'one.'
    )
  lost = [f for f in absent if not (known[f].free or known[f].added)]
  if lost:
    raise UserError(
        f'the config lacks fields: {_some(lost)}, which every version has had. '
        'Use the config as the run wrote it.'
    )
  found = given | {field: known[field].default for field in absent}
  return unflatten_dict(found, sep='.'), absent


def _some(fields: list[str]) -> str:
  return ', '.join(fields[:5] + ['...'] * (len(fields) > 5))


def differences(
    saved: dict[str, Any], now: dict[str, Any], free: frozenset[str]
) -> list[str]:
  """Lists the fields in which two runs compute different things.

  Args:
    saved: a config as nested dicts of JSON values, as in config.json.
    now: the config of the present command, in the same form.
    free: dotted names of the fields that may differ.

  Returns:
    One 'field: OLD in the workdir, NEW now' per field that differs.
  """
  old, new = flatten(saved), flatten(now)
  return [
      f'{field}: {old.get(field, "absent")!r} in the workdir, '
      f'{new.get(field, "absent")!r} now'
      for field in sorted(old.keys() | new.keys())
      if field not in free and old.get(field) != new.get(field)
  ]
