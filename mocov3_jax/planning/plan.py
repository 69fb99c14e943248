"""Compiles a run for a slice, and finds changes that make it fit."""

from collections.abc import Iterator, Sequence
import dataclasses
import fnmatch
import re
from typing import Any

from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import chips as chips_lib
from mocov3_jax.planning import compiler as compiler_lib
from mocov3_jax.planning import cost as cost_lib
from mocov3_jax.planning import timing
from mocov3_jax.planning import topology as topology_lib
from mocov3_jax.training import pretrain


def plan(
    config: ConfigDict, topology: str, images: int = 0, price: float = 0.0,
    mfu: float = 0.4, propose: bool = True, schedule: bool = False,
    dump: str = '', shares: Sequence[str] = (),
) -> dict[str, Any]:
  """Compiles a run for a slice, changing the config until it fits.

  Args:
    config: a `default_config()`, with any overrides.
    topology: chip and shape, such as 'v5e:16x16'.
    images: size of the training set; 0 = as many as the source has.
    price: price of a chip for an hour, dollars; 0 = unknown.
    mfu: model FLOP utilisation to assume, for an estimate besides the lower
      bound: the share of the chips' peak that the model's FLOPs reach.
    propose: whether to try changes of the config if it does not fit.
    schedule: whether to read the compiler's final schedule as well.
    dump: new folder for the texts that the compiler prints; '' = none.
    shares: numbers of images per chip to compare, instead of the config's
      batch size.

  Returns:
    The report, ready for JSON. It is on the config itself or, if that does not
    fit, on the first change that does, which 'changes' names. With `shares`, it
    is on the number of images per chip with the smallest bound per image, and
    'shares' has the bounds of all that fit.

  Raises:
    UserError: for bad input, or if the compiler is not installed.
  """
  if images < 0 or price < 0 or not 0 < mfu <= 1:
    raise UserError(
        f'--images={images} --price={price} --mfu={mfu}. Allowed: --images and '
        '--price of 0 or more, and --mfu above 0 and at most 1.'
    )
  for share in shares:
    if not re.fullmatch(r'[1-9]\d{0,6}', share):
      raise UserError(
          f'--images_per_chip={",".join(shares)}. Allowed: whole numbers of at '
          'least 1, such as 8,16,32.'
      )
  report, config, steps, chips = _planned(
      config, topology, images, price, mfu, propose, schedule, dump, shares
  )
  if 'seconds' in report or report['kernels'] is not None:
    report['seconds_here'] = timing.seconds_here(config, steps, chips)
    if report['seconds_here'] is not None:
      console.say(
          f'  MEASURED on this machine: {1e3 * report["seconds_here"]:.2f} ms '
          'a step'
      )
  return report


def _planned(
    config: ConfigDict, topology: str, images: int, price: float, mfu: float,
    propose: bool, schedule: bool, dump: str, shares: Sequence[str],
) -> tuple[
    dict[str, Any], ConfigDict, config_lib.Plan, topology_lib.Slice
]:
  """Returns the report of `plan`, with its config, schedule and slice."""
  with compiler_lib.printing(schedule, dump) as compiler:
    chips = topology_lib.get_slice(topology)
    if chips.are_gpus and (schedule or shares):
      raise UserError(
          f'--topology={topology}: the time of GPUs cannot be predicted. Leave '
          'out --schedule and --images_per_chip.'
      )
    count = len(chips.devices)

    def changed(changes):
      other = config.copy_and_resolve_references().unlock()
      other.update_from_flattened_dict(changes)
      checks.validate(other, count)
      return other, changes

    def measured(config, changes):
      number = images or images_of(config)
      steps = config_lib.plan(config, number)
      found = report_of(config, steps, chips, price, mfu, compiler)
      found |= {'images': number} | ({'changes': changes} if changes else {})
      show(found)
      return found, config, steps, chips

    if shares:
      # All configs are checked before the first one is compiled.
      others = [
          changed({'batch_size': int(share) * count}) for share in shares
      ]
      return _best_share([measured(*other) for other in others])
    first = measured(*changed({}))
    if first[0]['fits'] or not propose:
      return first
    for changes in proposals(config, count):
      other = measured(*changed(changes))
      if other[0]['fits']:
        return other
    return first


def _best_share(planned: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
  """Prints and selects the images per chip with the least time per image.

  Args:
    planned: what `_planned` returns, for each number of images per chip.

  Returns:
    The best one of `planned`; the first one if none fits.
  """
  reports = [report for report, *_ in planned]
  bounds = {
      r['images_per_chip']: 1e3 * r['seconds_bound'] / r['images_per_chip']
      for r in reports if r['fits']
  }
  for report in reports:
    report['shares'] = {str(n): bound for n, bound in bounds.items()}
  if not bounds:
    return planned[0]
  best = min(bounds, key=bounds.__getitem__)
  lines = ['  bound per image, by images per chip: ' + ', '.join(
      f'{share}: {bound:.3f} ms' for share, bound in bounds.items()
  )]
  if best < max(bounds) and not reports[0]['has_batch_norm']:
    lines.append(
        f'  With more than {best} images per chip, each image takes longer. '
        f'For a larger batch, try --config.micro_batch={best}.'
    )
  console.say('\n'.join(lines))
  return next(p for p in planned if p[0]['images_per_chip'] == best)


def images_of(config: ConfigDict) -> int:
  """Returns the number of training images of the source.

  Raises:
    UserError: if the source is not on this machine and its size is unknown.
  """
  try:
    return len(pretrain.load_splits(config).train)
  except UserError as e:
    # The one data set whose size is known even where it is not installed.
    if config.data.source == 'tfds:imagenet2012':
      return config_lib.IMAGENET_IMAGES
    raise UserError(
        f'the length of the run depends on the number of images: {e} Or use '
        '--images=NUMBER.'
    ) from e


def proposals(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
  """Yields changes that need less memory, the cheapest in time first."""
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


def report_of(
    config: ConfigDict, schedule: config_lib.Plan, chips: topology_lib.Slice,
    price: float, mfu: float, compiler: compiler_lib.Compiler,
) -> dict[str, Any]:
  """Compiles one config, and returns its report."""
  with chips.assumed():
    cost = cost_lib.measure(config, schedule, chips, compiler)
  count = len(chips.devices)
  report = {
      'compiler': chips.compiler, 'libtpu_of_jax': chips.prescribed,
      'topology': chips.name, 'chips': count, 'model': config.model.name,
      'batch_size': config.batch_size,
      'images_per_chip': config.batch_size // count,
      'micro_batch': config.micro_batch, 'remat': config.model.remat,
      'fsdp_devices': config.fsdp_devices,
      'hbm_gib': chips.memory / chips_lib.GIB,
      'has_batch_norm': models.build_backbone(
          config.model, config.data.image_size
      ).has_batch_norm,
  }
  for field in dataclasses.fields(cost):
    if field.name not in ('collectives', 'breakdown'):
      report[field.name] = dataclasses.asdict(cost)[field.name]
  report['collectives'] = {
      kind: dataclasses.asdict(c) for kind, c in cost.collectives.items()
  }
  if cost.kernels is not None or not cost.fits:
    return report
  bounds = cost_lib.seconds(cost, chips)
  report |= {f'seconds_{name}': value for name, value in bounds.items()}
  if cost.breakdown:
    found = dataclasses.asdict(cost.breakdown)
    report |= found.pop('step') | found
  bound = max(bounds.values())
  # The estimate cannot be below the bound, whatever MFU is assumed.
  likely = max(bound, cost.model_flops / (chips.chip.flops * mfu))
  report |= {
      'bound_by': max(bounds, key=bounds.__getitem__),
      'steps': schedule.total_steps, 'assumed_mfu': mfu,
  }
  for suffix, seconds in ('_bound', bound), ('', likely):
    hours = seconds * schedule.total_steps / 3600
    report |= {
        f'seconds{suffix}': seconds,
        f'images_per_second{suffix}': config.batch_size / seconds,
        f'mfu{suffix}': cost.model_flops / seconds / chips.chip.flops,
        f'hours{suffix}': hours,
        f'chip_hours{suffix}': hours * count,
    }
    if price:
      report[f'dollars{suffix}'] = hours * count * price
  return report


def show(report: dict[str, Any]) -> None:
  """Prints the report for humans."""
  gib = lambda field: (
      '?' if report[field] is None
      else f'{report[field] / chips_lib.GIB:.2f} GiB'
  )
  tera = lambda field: (
      'not counted (loops)' if report[field] is None
      else f'{report[field] / 1e12:.3f} T'
  )
  lines = [
      f'{report["model"]}, batch {report["batch_size"]}, on '
      f'{report["topology"]}: {report["chips"]} chips, '
      f'{report["images_per_chip"]} images each; micro_batch '
      f'{report["micro_batch"]}, remat {report["remat"]}, fsdp_devices '
      f'{report["fsdp_devices"]}',
      f'  attention {report["attention"]}, compiled by {report["compiler"]}'
      + (
          '' if not report['libtpu_of_jax'] or fnmatch.fnmatch(
              report['compiler'], f'libtpu {report["libtpu_of_jax"]}'
          ) else f'; with this JAX, TPUs run {report["libtpu_of_jax"]}'
      ),
      f'  memory per chip    {gib("total")} of {report["hbm_gib"]:.0f} GiB: '
      + ('fits' if report['fits'] else 'DOES NOT FIT'),
      f'    state            {gib("state")}',
      f'    state and batch  {gib("arguments")}',
      f'    temporary        {gib("temporary")}',
      f'  FLOPs per chip     model {tera("model_flops")}, traced '
      f'{tera("traced_flops")}, compiled {tera("compiled_flops")}',
  ]
  for kind, c in report['collectives'].items():
    lines.append(
        f'  {kind:18} {c["count"]} of {c["bytes"] / 2**20:.2f} MiB in all'
    )
  if report['kernels'] is not None:
    lines.append('  kernels            ' + ', '.join(
        f'{count} {library}' for library, count in report['kernels'].items()
    ) + '; of their time nothing is known')
  if 'parts' in report:
    lines += _breakdown_lines(report)
  if 'seconds' in report:
    lines += [
        '  a step at the least: ' + ', '.join(
            f'{name} {1e3 * report[f"seconds_{name}"]:.1f} ms'
            for name in ('compute', 'interconnect', 'program')
        ),
        f'  {report["steps"]} steps, {report["images"]} images an epoch',
        f'    lower bound      {_time(report, "_bound")} (by '
        f'{report["bound_by"]})',
        f'    at {report["mfu"]:.0%} MFU        {_time(report, "")} (assumed: '
        f'--mfu={report["assumed_mfu"]:g})',
    ]
  console.say('\n'.join(lines))


def _breakdown_lines(report: dict[str, Any]) -> list[str]:
  """Returns the lines of the table of where the time goes."""
  scheduled = report['schedule_ms'] > 0
  columns = {'bound_ms': 'bound', 'flops_ms': 'FLOPs', 'hbm_ms': 'HBM'}
  if scheduled:
    columns['schedule_ms'] = 'schedule'
  row = lambda name, values: f'    {name:24}' + ''.join(
      f'{values[field]:10.2f}' for field in columns
  )
  lines = [
      '  where the time of the program goes: lower bounds in ms, not measured',
      f'    {"":24}' + ''.join(f'{name:>10}' for name in columns.values()),
      row('step', report),
      *(row(name, t) for name, t in report['parts'].items()),
      '    of which',
      *(row(name, t) for name, t in report['networks'].items()),
      f'    in parallel, {report["copies_ms"]:.2f} ms of copies to and from '
      'HBM',
  ]
  if not scheduled:
    lines.append(
        '    --schedule also reads the final program, which shows far more'
    )
  if report['dynamic_loops']:
    lines.append(
        f'    {report["dynamic_loops"]} operations have loops of unknown '
        'length, counted once, or conditions, not counted'
    )
  if scheduled and report['unscheduled']:
    lines.append(
        f'    {report["unscheduled"]} operations have no instructions of '
        'their own; the other two bounds hold for them'
    )
  return lines


def _time(report: dict[str, Any], suffix: str) -> str:
  dollars = '; for the cost, add --price=DOLLARS per chip-hour'
  if f'dollars{suffix}' in report:
    dollars = f', ${report[f"dollars{suffix}"]:,.0f}'
  return (
      f'{1e3 * report[f"seconds{suffix}"]:.1f} ms a step, '
      f'{report[f"images_per_second{suffix}"]:,.0f} img/s, '
      f'{report[f"hours{suffix}"]:.1f} hours, '
      f'{report[f"chip_hours{suffix}"]:,.0f} chip-hours{dollars}'
  )
