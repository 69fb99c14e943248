"""Extracts the features of all images of a source, for evaluators."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base import console
from mocov3_jax.base.errors import Preempted, UserError
from mocov3_jax.data import pipeline
from mocov3_jax.data.workers import Workers
from mocov3_jax.method import augment
from mocov3_jax.models import Network
from mocov3_jax.parallel import processes, sharding
from mocov3_jax.sources import Source

PyTree = Any
# (params, batch_stats, source) -> features [n, D] of the images that could be
# read, in the memory of each host, and their indices in the source, int64 [n].
Extract = Callable[[PyTree, PyTree, Source], tuple[np.ndarray, np.ndarray]]
# How many unreadable images are named individually at a time.
NAMED = 10
STOPPED = 'stopped during an evaluation; the same command starts it again'


def width(
    model: Network, variables: PyTree, image_shape: tuple[int, int, int]
) -> int:
  """Returns the width of the features of an image."""
  forward = functools.partial(model.apply, train=False, method='features')
  images = jnp.zeros((1, *image_shape))
  return jax.eval_shape(forward, variables, images).shape[-1]


class NonFiniteFeatures(UserError):
  """Features are NaN or infinite, so the network cannot be evaluated."""


@dataclasses.dataclass
class ReadingLog:
  """Records unreadable images, and enforces a limit on their number.

  Attributes:
    most: the fraction of a source's images that may be unreadable.
    unreadable: the images that could not be read, {name: reason}.
  """

  most: float = 1.0
  unreadable: dict[str, str] = dataclasses.field(default_factory=dict)

  def readable(self, source: Source, unreadable: np.ndarray) -> np.ndarray:
    """Returns the indices of the images that could be read, int64 [n].

    It prints the names of the others, once each.

    Args:
      source: the images.
      unreadable: `Batch.unreadable` of all batches of the source, concatenated.
        The padding of the last batch is ignored.

    Raises:
      UserError: if none or too few could be read.
    """
    bad = np.flatnonzero(unreadable[: len(source)] >= 0)
    new = []
    for index in bad.tolist():
      name = source.name(index)
      if name not in self.unreadable:
        self.unreadable[name] = pipeline.why_unreadable(source, index)
        new.append(name)
    if processes.is_primary():
      for name in new[:NAMED]:
        console.say(
            f'unreadable: {console.shown(name)}: {self.unreadable[name]}'
        )
      if len(new) > NAMED:
        console.say(f'unreadable: {len(new) - NAMED} more')
    if len(bad) == len(source):
      raise UserError(
          f'none of the {len(source)} images could be read; the first is '
          f'{console.shown(source.name(0))}'
      )
    if len(bad) > self.most * len(source):
      raise UserError(
          f'{len(bad)} of {len(source)} images to evaluate on could not be '
          f'read, more than data.max_unreadable={self.most} of them; '
          f'{console.shown(source.name(bad[0]))} is the first. Repair or '
          'remove the files; or use a higher data.max_unreadable, which leaves '
          'them out of all accuracies.'
      )
    return np.flatnonzero(unreadable[: len(source)] < 0)


def require_finite(
    finite: np.ndarray, source: Source, places: np.ndarray
) -> None:
  """Checks that the features of all images are finite.

  Args:
    finite: bool [n], whether the features of each image are finite.
    source: the source of the images.
    places: int64 [n], the indices of the images in the source.

  Raises:
    NonFiniteFeatures: if some are not; names the first such image.
  """
  bad = np.flatnonzero(~finite)
  if len(bad):
    raise NonFiniteFeatures(
        f'the features of {len(bad)} of {len(places)} images are not finite, '
        f'those of {console.shown(source.name(places[bad[0]]))} first: the '
        "network's output for them is NaN or infinite. Use other weights, an "
        'earlier checkpoint, or model.dtype=float32.'
    )


def extractor(
    model: Network, data: ConfigDict, mesh: Mesh, batch_size: int,
    workers: Workers, method: str = 'features', log: ReadingLog | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Extract:
  """Returns an `Extract` that runs the network in evaluation mode.

  The `Extract` raises UserError if too few images can be read, and
  NonFiniteFeatures if features are not finite. If one process is asked to stop,
  it raises Preempted in all processes, after the same batch.

  Args:
    model: the network.
    data: `config.data` of the run, for image size and normalisation.
    mesh: the mesh to compute on.
    batch_size: images per forward pass on the whole mesh.
    workers: read and decode the images.
    method: method of the network, 'features' or 'project'.
    log: records the images that cannot be read.
    stop_asked: returns whether this process has been asked to stop.
  """
  log = log or ReadingLog()
  positions = sharding.local_positions(mesh, batch_size)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def forward(params, batch_stats, batch):
    variables = {'params': params, 'batch_stats': batch_stats}
    images = augment.whole_images(batch.images, data)
    features = model.apply(variables, images, train=False, method=method)
    return features, batch.unreadable, jnp.max(batch.stop)

  def computed(params, batch_stats, source):
    for batch in pipeline.eval_batches(
        source, positions, batch_size, data.image_size, workers
    ):
      stop = np.full(len(batch.unreadable), stop_asked(), np.int32)
      batch = sharding.to_global(batch._replace(stop=stop), mesh)
      yield forward(params, batch_stats, batch)

  def extract(params, batch_stats, source):
    features, unreadable = None, []
    for number, found in enumerate(
        _one_late(computed(params, batch_stats, source))
    ):
      rows, bad, stop = jax.device_get(found)
      if stop:
        raise Preempted(STOPPED)
      if features is None:
        features = np.empty((len(source), *rows.shape[1:]), rows.dtype)
      part = features[number * batch_size:(number + 1) * batch_size]
      part[...] = rows[: len(part)]
      unreadable.append(bad)
    places = log.readable(source, np.concatenate(unreadable))
    if len(places) < len(source):
      features = features[places]
    require_finite(np.isfinite(features).all(axis=1), source, places)
    return features, places

  return extract


def _one_late(results: Iterator[Any]) -> Iterator[Any]:
  """Yields each result after the next one has been requested.

  The devices thus compute one batch while the next one is read, and never hold
  more than two.
  """
  last = next(results)
  for result in results:
    yield last
    last = result
  yield last
