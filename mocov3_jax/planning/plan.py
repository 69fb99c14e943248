"""Compiles a run for a slice, and for changes that make it fit."""

from collections.abc import Iterator
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import chips as chips_lib
from mocov3_jax.planning import cost as cost_lib
from mocov3_jax.planning import topology as topology_lib


def plan(
    config: ConfigDict, topology: str, images: int = config_lib.IMAGENET_IMAGES,
    price: float = 0.0, propose: bool = True,
) -> dict[str, Any]:
  """Compiles for a slice, and for changes of the config until one fits.

  Args:
    config: as `default_config()`, after overrides.
    topology: chip and shape, such as 'v5e:16x16'.
    images: in the training set.
    price: of a chip for an hour; 0 = unknown.
    propose: whether to try changes if it does not fit.

  Returns:
    The report, flat, for JSON; of the config, or of the first change of it
    that fits, which 'changes' names.

  Raises:
    UserError: for bad input, or without the compiler.
  """
  if images < 1 or price < 0:
    raise UserError(
        f'--images={images} --price={price}. Allowed: at least 1, and 0 or '
        'more.'
    )
  chips = topology_lib.get_slice(topology)
  checks.validate(config, len(chips.devices))
  schedule = config_lib.plan(config, images)
  report = measured(config, schedule, chips, price)
  show(report)
  if report['fits'] or not propose:
    return report
  for changes in proposals(config, len(chips.devices)):
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict(changes)
    other = measured(changed, schedule, chips, price) | {'changes': changes}
    show(other)
    if other['fits']:
      return other
  return report


def proposals(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
  """Changes that need less memory, those that cost the least time first."""
  if config.model.name in models.VITS and not config.model.remat:
    yield {'model.remat': True}
  split = {'fsdp_devices': devices} if devices > 1 else {}
  if split and config.fsdp_devices < devices:
    yield split
  backbone = models.build_backbone(config.model, config.data.image_size)
  if backbone.has_batch_norm:
    return
  share = config.micro_batch or config.batch_size // devices
  for parts in (2, 4, 8, 16, 32, 64, 128):
    if share % parts == 0:
      yield {'micro_batch': share // parts} | split


def measured(
    config: ConfigDict, schedule: config_lib.Plan, chips: topology_lib.Slice,
    price: float,
) -> dict[str, Any]:
  """Compiles one config, and reports."""
  cost = cost_lib.measure(config, schedule, chips)
  count = len(chips.devices)
  report = {
      'topology': chips.name, 'chips': count, 'model': config.model.name,
      'batch_size': config.batch_size,
      'images_per_chip': config.batch_size // count,
      'micro_batch': config.micro_batch, 'remat': config.model.remat,
      'fsdp_devices': config.fsdp_devices,
      'hbm_gib': chips.chip.memory / chips_lib.GIB,
  }
  for field in dataclasses.fields(cost):
    if field.name != 'collectives':
      report[field.name] = dataclasses.asdict(cost)[field.name]
  report['collectives'] = {
      kind: dataclasses.asdict(c) for kind, c in cost.collectives.items()
  }
  if not cost.fits:
    return report
  bounds = cost_lib.seconds(cost, chips)
  least = max(bounds['compute'], bounds['interconnect'])
  most = max(bounds.values())
  hours = schedule.total_steps / 3600
  report |= {f'seconds_{name}': value for name, value in bounds.items()}
  report |= {
      'bound_by': max(bounds, key=bounds.__getitem__),
      'images_per_second': [
          config.batch_size / most, config.batch_size / least
      ],
      'mfu': [
          cost.model_flops / x / chips.chip.flops for x in (most, least)
      ],
      'steps': schedule.total_steps,
      'hours': [least * hours, most * hours],
      'chip_hours': [least * hours * count, most * hours * count],
  }
  if price:
    report['cost'] = [x * price for x in report['chip_hours']]
  return report


def show(report: dict[str, Any]) -> None:
  """Prints the report for people."""
  gib = lambda field: (
      '?' if report[field] is None
      else f'{report[field] / chips_lib.GIB:.2f} GiB'
  )
  tera = lambda field, unit='': (
      'not counted (loops)' if report[field] is None
      else f'{report[field] / 1e12:.3f} T{unit}'
  )
  lines = [
      f'{report["model"]}, batch {report["batch_size"]}, on '
      f'{report["topology"]}: {report["chips"]} chips, '
      f'{report["images_per_chip"]} images each; micro_batch '
      f'{report["micro_batch"]}, remat {report["remat"]}, fsdp_devices '
      f'{report["fsdp_devices"]}',
      f'  memory per chip    {gib("total")} of {report["hbm_gib"]:.0f} GiB: '
      + ('fits' if report['fits'] else 'DOES NOT FIT'),
      f'    state            {gib("state")}',
      f'    state and batch  {gib("arguments")}',
      f'    temporary        {gib("temporary")}',
      f'  FLOPs per chip     model {tera("model_flops")}, traced '
      f'{tera("traced_flops")}, compiled {tera("compiled_flops")}',
      f'  memory traffic     {tera("hbm_bytes", "B")} per chip',
  ]
  for kind, c in report['collectives'].items():
    lines.append(
        f'  {kind:18} {c["count"]} of {c["bytes"] / 2**20:.2f} MiB in all'
    )
  if report['fits']:
    between = lambda field, form: ' to '.join(
        format(x, form) for x in report[field]
    )
    lines += [
        '  by the roofline, not measured; the first is a bound, the second '
        'has all of the memory traffic:',
        '    a step           '
        + ', '.join(
            f'{name} {1e3 * report[f"seconds_{name}"]:.1f} ms'
            for name in ('compute', 'interconnect', 'memory')
            if name != 'memory' or report['hbm_bytes'] is not None
        ),
        f'    {report["steps"]} steps     {between("hours", ".1f")} hours, '
        f'{between("chip_hours", ".0f")} chip-hours'
        + (f', costing {between("cost", ".0f")}' if 'cost' in report else ''),
        f'    img/s            {between("images_per_second", ",.0f")}, MFU '
        f'{between("mfu", ".0%")} (the bound last)',
    ]
  console.say('\n'.join(lines))
