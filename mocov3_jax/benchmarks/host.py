"""Benchmarks the input pipeline and the augmentation."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import statistics
import time
from typing import Any
from unittest import mock

import cv2
import jax
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.benchmarks import pillow_chain
from mocov3_jax.benchmarks.timing import take_turns
from mocov3_jax.config import checks
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import channels, pipeline, workers
from mocov3_jax.method.build import build_method, image_shape
from mocov3_jax.parallel import chips, sharding
from mocov3_jax.sources import Source, Unreadable
from mocov3_jax.training import flops, pretrain

# OpenCV functions of the reading code that release the interpreter's lock, and
# the number of images on which the time that holds the lock is measured.
LOCK_FREE = 'imdecode', 'resize', 'sepFilter2D', 'warpAffine', 'cvtColor'
LOCKED_IMAGES = 200
# Calls of the augmentation per turn.
REPEATS = 10


def encoded_source(config: ConfigDict) -> Source:
  """Opens the training images; refuses images that the host does not crop.

  Raises:
    UserError: for bad input, for images that all have one size, or for images
      that are not RGB.
  """
  checks.validate(config, jax.device_count())
  source = pretrain.load_splits(config).train
  config_lib.plan(config, len(source))
  if source.shape:
    raise UserError(
        f'data.source={config.data.source!r} has images of one size, which the '
        'host does not crop. Allowed: folder:PATH, wds:, hf:, or a TFDS set of '
        'photographs.'
    )
  if source.channels != 3:
    raise UserError(
        f'data.mean has {source.channels} values, but the original pipeline, '
        'which is measured for comparison, is only for RGB. Allowed: 3.'
    )
  return source


def benchmark_input(
    config: ConfigDict, images: int, rounds: int
) -> dict[str, Any]:
  """Times reading as in training beside the original's Pillow chain.

  Args:
    config: a `default_config()`, with any overrides.
    images: images to read per turn, rounded up to whole batches.
    rounds: number of turns.

  Returns:
    Images per second by number of threads and of processes, and those of the
    Pillow chain by number of processes; the ratio of the two, on one core and
    on all cores; the images per second that the interpreter's lock allows; and
    those that chips need at their peak.

  Raises:
    UserError: for bad input, or a source that is not of encoded photographs.
  """
  source = encoded_source(config)
  steps = -(-images // config.batch_size)
  cores = workers.cores()
  numbers = pipeline.epoch_order(config.seed, 0, len(source))
  numbers = np.resize(numbers, steps * config.batch_size).tolist()

  def ours(threads, processes=1):
    threaded = config.copy_and_resolve_references().unlock()
    threaded.data.threads, threaded.data.processes = threads, processes
    positions = np.arange(config.batch_size)
    reader = pretrain.make_reader(threaded, source, positions)

    def run():
      batches = pipeline.train_batches(reader, 0, steps, config.data.prefetch)
      return sum(len(batch.images) for batch in batches)

    return run

  contenders = {('threads', n): ours(n) for n in sorted({1, 2, 4, cores})}
  several = max(2, workers.processes_for(0, source))
  contenders['processes', several] = ours(0, several)
  with contextlib.ExitStack() as stack:
    for n in sorted({1, cores}):
      read = stack.enter_context(
          pillow_chain.processes(n, source, config)
      )
      contenders['Pillow processes', n] = functools.partial(read, numbers)
    rates = take_turns(contenders, rounds)
  ratios = {
      n: rates['threads', n] / rates['Pillow processes', n]
      for n in sorted({1, cores})
  }
  for (kind, n), rate in rates.items():
    console.say(f'{n:3} {kind:17} {rate:7.0f} img/s')
  for n, ratio in ratios.items():
    console.say(f'on {n} cores {ratio:.2f} times the Pillow chain')
  held = lock_seconds(config, source, numbers[:LOCKED_IMAGES])
  most = workers.MOST_PROCESSES
  console.say(
      f"the interpreter's lock is held for {1e6 * held:.0f} us per image: at "
      f'most {1 / held:.0f} img/s with one process, {most / held:.0f} with '
      f'{most}, given enough cores'
  )
  needs = needed(config)
  console.say(f'{config.model.name} at the peak of a chip needs, in img/s: ' + (
      ', '.join(f'{name} {rate:.0f}' for name, rate in needs.items())
  ))
  return {
      'lock_seconds_per_image': held,
      'most_images_per_second': {'1': 1 / held, str(most): most / held},
      'images_per_second_needed_by_chip': needs,
      'source': config.data.source, 'cores': cores,
      'images_per_second': {
          f'{n} {kind}': rate for (kind, n), rate in rates.items()
      },
      'ratio_by_cores': ratios,
  }


class _InMemory:
  """The readable ones of some images of a source, held in memory."""

  shape = None

  def __init__(self, source: Source, numbers: list[int]):
    self._data, self.channels = {}, source.channels
    for number in numbers:
      with contextlib.suppress(Unreadable):
        data = source.read(number)
        channels.opened(data, source.channels).pixels()
        self._data[number] = data

  def __iter__(self) -> Iterator[int]:
    return iter(self._data)

  def read(self, index: int) -> bytes:
    return self._data[index]


def lock_seconds(
    config: ConfigDict, source: Source, numbers: list[int]
) -> float:
  """Returns the seconds per image that hold the interpreter's lock.

  While the lock is held, other threads have to wait. This is the time of one
  thread without what releases the lock: OpenCV's functions, whose time is
  subtracted, and reading files, since the images are in memory. It is the
  median of three passes.

  Args:
    config: a `default_config()`.
    source: the source of the images.
    numbers: the indices of the images.
  """
  images = _InMemory(source, numbers)
  reader = dataclasses.replace(
      pretrain.make_reader(config, source, np.arange(1)), source=images,
      workers=None,
  )
  out = np.empty(reader.shape, np.uint8)
  free = 0.0

  def timed(function):
    def call(*args, **kwargs):
      nonlocal free
      start = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        free += time.perf_counter() - start

    return call

  seconds = []
  with contextlib.ExitStack() as stack:
    for name in LOCK_FREE:
      stack.enter_context(
          mock.patch.object(cv2, name, timed(cv2.__dict__[name]))
      )
    for _ in range(4):
      start, free = time.perf_counter(), 0.0
      count = 0
      for place, number in enumerate(images):
        reader.read_into(out, number, place)
        count += 1
      seconds.append((time.perf_counter() - start - free) / max(count, 1))
  return statistics.median(seconds[1:])  # The first one warms up.


def needed(config: ConfigDict) -> dict[str, float]:
  """Returns the images per second that each chip needs at its peak FLOP/s."""
  plan = config_lib.plan(config, 10**6)
  method = build_method(config, plan)
  cost = flops.step_flops(
      method, image_shape(config.data), config.batch_size
  ) / config.batch_size
  return {name: chip.flops / cost for name, chip in chips.CHIPS.items()}


def benchmark_augment(config: ConfigDict, rounds: int) -> dict[str, Any]:
  """Compares the augmentation with the step that contains it.

  Args:
    config: a `default_config()`, with any overrides; its source is not read.
    rounds: turns of each.

  Returns:
    FLOPs and seconds of both, and the augmentation's shares of the step's.

  Raises:
    UserError: for a bad config.
  """
  checks.validate(config, jax.device_count())
  mesh = sharding.make_mesh(fsdp=config.fsdp_devices)
  plan = config_lib.plan(config, 10**6)
  method, jitted = pretrain.build_step(config, plan, mesh)
  shape = (config.batch_size, 2, *image_shape(config.data))
  noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  batch = sharding.to_global(
      pipeline.Batch(noise, np.full(config.batch_size, -1, np.int32)), mesh
  )
  key = jax.random.key(0)
  state = jitted.init()
  step = jitted.trace(batch).lower().compile()
  augment = jax.jit(method.augment).lower(batch.images, key).compile()

  def run_step():
    nonlocal state
    state, values = step(state, batch)
    jax.block_until_ready(values)
    return config.batch_size

  def run_augment():
    # Repeated, since after a step the first call has to allocate its memory.
    for _ in range(REPEATS):
      jax.block_until_ready(augment(batch.images, key))
    return REPEATS * config.batch_size

  rates = take_turns({'step': run_step, 'augment': run_augment}, rounds)
  result = {}
  for name, compiled in ('step', step), ('augment', augment):
    result[f'{name}_flops'] = compiled.cost_analysis()['flops']
    result[f'{name}_seconds'] = config.batch_size / rates[name]
  for unit in 'flops', 'seconds':
    result[f'share_of_{unit}'] = (
        result[f'augment_{unit}'] / result[f'step_{unit}']
    )
  for name, value in result.items():
    console.say(f'{name:20} {value:.4g}')
  return result | {'device': jax.devices()[0].device_kind,
                   'batch_size': config.batch_size}
