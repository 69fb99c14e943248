"""Features of all images of a source: what evaluators start from."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base import console
from mocov3_jax.base.errors import UserError
from mocov3_jax.data import pipeline
from mocov3_jax.data.sources import Source
from mocov3_jax.data.workers import Workers
from mocov3_jax.method import augment
from mocov3_jax.models import Network
from mocov3_jax.parallel import sharding

PyTree = Any
# (params, batch_stats, source) -> features [n, D] of the images that could be
# read, and their places in the source, int64 [n].
Extract = Callable[[PyTree, PyTree, Source], tuple[jax.Array, np.ndarray]]


def readable(source: Source, unreadable: np.ndarray) -> np.ndarray:
  """Returns the places of the images that could be read, int64 [n].

  Args:
    source: the images.
    unreadable: of its batches, one after another, as `Batch` has it; what
      filled up the last one is left out.

  Raises:
    UserError: if none could.
  """
  found = np.flatnonzero(unreadable[: len(source)] < 0)
  if not len(found):
    raise UserError(
        f'none of {len(source)} images could be read, from {source.name(0)} on'
    )
  return found


def width(
    model: Network, variables: PyTree, image_shape: tuple[int, int, int]
) -> int:
  """Returns how many numbers the features of an image are."""
  forward = functools.partial(model.apply, train=False, method='features')
  images = jnp.zeros((1, *image_shape))
  return jax.eval_shape(forward, variables, images).shape[-1]


def extractor(
    model: Network, data: ConfigDict, mesh: Mesh, batch_size: int,
    workers: Workers, method: str = 'features',
) -> Extract:
  """Returns an `Extract`, in evaluation mode.

  Args:
    model: the network.
    data: of the run: image size and normalisation.
    mesh: to work on; the features end up on every device.
    batch_size: images at a time, over the whole mesh.
    workers: read and decode.
    method: of the network, 'features' or 'project'.
  """
  positions = sharding.local_positions(mesh, batch_size)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def forward(params, batch_stats, batch):
    variables = {'params': params, 'batch_stats': batch_stats}
    images = augment.whole_images(batch.images, data)
    features = model.apply(variables, images, train=False, method=method)
    return features, batch.unreadable

  def extract(params, batch_stats, source):
    batches = pipeline.eval_batches(
        source, positions, batch_size, data.image_size, workers
    )
    features, unreadable = zip(*(
        forward(params, batch_stats, sharding.to_global(batch, mesh))
        for batch in batches
    ), strict=True)
    features = jnp.concatenate(features)[: len(source)]
    places = readable(source, np.concatenate(jax.device_get(unreadable)))
    if len(places) < len(source):
      features = features[jnp.asarray(places)]
    return features, places

  return extract


def say_unreadable(source: Source, readable: np.ndarray) -> None:
  """Names the images of a source that are not among those places."""
  for index in np.setdiff1d(np.arange(len(source)), readable).tolist():
    console.say(f'unreadable: {source.name(index)}')
