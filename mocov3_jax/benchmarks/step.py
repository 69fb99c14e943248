"""`benchmark step`: times our training step against the same in PyTorch."""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

from ml_collections import ConfigDict

from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.benchmarks import step_process
from mocov3_jax.benchmarks.timing import take_turns

AGAINST = ('compiled', 'eager', 'none')
# What the suite changes in the given config, by network. The batch size is a
# first try.
SUITE = {
    'vit_s': {'model.name': 'vit_s', 'batch_size': 1024},
    'vit_b': {'model.name': 'vit_b', 'batch_size': 512},
    'vit_l': {'model.name': 'vit_l', 'batch_size': 256},
    'resnet50': {
        'model.name': 'resnet50', 'batch_size': 1024,
        'head.projector_layers': 2, 'head.predictor_out_bn': False,
        'optimizer.name': 'lars', 'optimizer.weight_decay': 1e-6,
    },
}


def benchmark_step(
    config: ConfigDict, against: str, rounds: int, steps: int,
    profile: str | None = None,
) -> dict[str, Any]:
  """Times the training step of a config, and the same step in PyTorch.

  Our step contains the augmentation and the metrics of each step. PyTorch's
  step gets finished views and has neither. If both are timed, each has one
  device, or all cores of a CPU. If ours is timed alone, it has all devices.

  Args:
    config: a `default_config()`, with any overrides; its source is not read.
    against: one of `AGAINST`.
    rounds: turns of each.
    steps: steps per turn.
    profile: folder for a profile of our step, or None.

  Returns:
    For each of the two: images per second (median over the turns), seconds of
    the first step, peak memory in bytes (of the device; on a CPU, of the
    process while it takes steps), and the model's FLOP/s as a share of the
    published peak and of what a large matrix product reaches. Also the ratio of
    the two rates, ours over PyTorch's.

  Raises:
    UserError: for bad input, or without PyTorch.
    OutOfMemory: if the batch does not fit.
  """
  if against not in AGAINST:
    raise unknown('--against', against, AGAINST)
  build = _steps(config, against)
  with contextlib.ExitStack() as stack:
    ask = {
        name: stack.enter_context(step_process.stepper(make))
        for name, make in build.items()
    }
    result = _timed(ask, config.batch_size, rounds, steps)
    if profile:
      ask['jax'](step_process.profile, profile, steps)
    about = ask['jax'](step_process.about)
  for measured in result.values():
    rate = measured['images_per_second'] / config.batch_size
    for of in 'peak', 'ceiling':
      flops = about[f'{of}_flops']
      measured[f'mfu_{of}'] = (
          about['step_flops'] * rate / flops if flops else None
      )
  if 'torch' in result:
    ours, theirs = (result[x]['images_per_second'] for x in ('jax', 'torch'))
    result['ratio'] = ours / theirs
  result |= about | {
      'model': config.model.name, 'dtype': config.model.dtype,
      'batch_size': config.batch_size, 'against': against,
  }
  show_step(result)
  return result


def _steps(config: ConfigDict, against: str) -> dict[str, Callable[[], Any]]:
  if against == 'none':
    return {
        'jax': functools.partial(
            step_process.jax_step, config, 0.9, alone=False
        )
    }
  return {  # PyTorch comes first, to fail early if it is not installed.
      'torch': functools.partial(
          step_process.torch_step, config, against == 'compiled'
      ),
      # PyTorch's step uses one device, so ours does too.
      'jax': functools.partial(step_process.jax_step, config, 0.45, alone=True),
  }


def _timed(
    ask: dict[str, step_process.Ask], batch_size: int, rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
  result = {
      name: {'first_step_seconds': each(step_process.warm_up)}
      for name, each in ask.items()
  }

  def run(each):
    each(step_process.advance, steps)
    return steps * batch_size

  rates = take_turns(
      {name: functools.partial(run, each) for name, each in ask.items()},
      rounds,
  )
  for name, rate in rates.items():
    result[name] |= {
        'images_per_second': rate,
        'peak_memory': ask[name](step_process.peak_memory),
    }
  return result


def show_step(result: dict[str, Any]) -> None:
  """Prints the result of `benchmark_step` for humans."""
  lines = [
      f'{result["model"]}, {result["dtype"]}, batch {result["batch_size"]}, on '
      f'{result["devices"]} x {result["device"]}; a matrix product reaches '
      f'{result["ceiling_flops"] / 1e12:.3g} TFLOP/s'
  ]
  share = lambda x: '   -  ' if x is None else f'{x:6.1%}'
  for name in 'jax', 'torch':
    if name in result:
      r = result[name]
      memory = r['peak_memory']
      lines.append(
          f'{name:6} {r["images_per_second"]:9.1f} img/s  MFU '
          f'{share(r["mfu_peak"])} of the peak, {share(r["mfu_ceiling"])} of '
          'that product  '
          + ('' if memory is None else f'{memory / 2**30:.2f} GiB  ')
          + f'first step {r["first_step_seconds"]:.0f} s'
      )
  if 'ratio' in result:
    lines.append(
        f'{result["ratio"]:.2f} times PyTorch ({result["against"]}), which '
        'has neither augmentation nor metrics in its step'
    )
  console.say('\n'.join(lines))


def benchmark_suite(
    config: ConfigDict, against: str, rounds: int, steps: int
) -> dict[str, Any]:
  """Runs `benchmark_step` for `SUITE`, halving each batch until it fits."""
  results = {}
  for name, changes in SUITE.items():
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict(changes)
    while name not in results:
      try:
        results[name] = benchmark_step(changed, against, rounds, steps)
      except step_process.OutOfMemory as e:
        console.say(f'{name}: batch {changed.batch_size} does not fit ({e})')
        if changed.batch_size < 2:
          results[name] = None  # It does not fit at all; others may.
        changed.batch_size //= 2
  return results


def main(
    config: ConfigDict, against: str, rounds: int, steps: int,
    profile: str | None, suite: bool,
) -> dict[str, Any]:
  """Runs the benchmark of one network, or of the suite.

  Raises:
    UserError: for bad input, or a batch that does not fit.
  """
  if suite:
    return benchmark_suite(config, against, rounds, steps)
  try:
    return benchmark_step(config, against, rounds, steps, profile)
  except step_process.OutOfMemory as e:
    raise UserError(
        f'batch_size={config.batch_size} does not fit the memory ({e}). '
        'Use a smaller one, micro_batch, or model.remat=True.'
    ) from e
