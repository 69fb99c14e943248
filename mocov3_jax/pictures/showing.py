"""Opens the network and the images that a picture shows, and reads them."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import sources
from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.data import pipeline
from mocov3_jax.evals import features
from mocov3_jax.evals.opened import (
  RANDOM,
  Opened,
  check_flags,
  open_checkpoint,
)
from mocov3_jax.method import augment
from mocov3_jax.parallel import sharding
from mocov3_jax.pictures import attention, sheets
from mocov3_jax.runs import network
from mocov3_jax.sources import Source

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options:
  """The options that all pictures of a checkpoint share.

  Attributes:
    checkpoint: a workdir or one checkpoints/<step>.
    out: the path of the PNG, which must not exist; '' = none is drawn.
    source: like `config.data.source`; '' = what the run was trained on.
    labels: like `config.data.labels`; '' = those of the run, or 'auto' for
      another source.
    encoder: 'query', 'momentum' or 'random'.
    images: the number of images; None = the default of the picture.
    batch_size: images per forward pass over all devices.
    threads: threads that read and decode images; 0 = one per core.
  """

  checkpoint: str
  out: str = ''
  source: str = ''
  labels: str = ''
  encoder: str = 'query'
  images: int | None = None
  batch_size: int = 256
  threads: int = 0

  def check(self, default: int, fewest: int, most: int | None = None) -> int:
    """Checks the options, and returns how many images to show.

    Args:
      default: the number of images if the options give none.
      fewest, most: the range that is allowed; most None = no limit.

    Raises:
      UserError: for any error that can be found without opening the checkpoint
        or the images.
    """
    check_flags(self.encoder, self.batch_size, self.threads)
    count = default if self.images is None else self.images
    if count < fewest or most is not None and count > most:
      raise UserError(
          f'--images={count} is out of range. Allowed: {fewest} '
          + ('or more.' if most is None else f'to {most}.')
      )
    files.new_output(self.out, '.png')
    return count

  @property
  def path(self) -> epath.Path:
    """The absolute path of the PNG."""
    return files.absolute(self.out, '--out')


@dataclasses.dataclass(frozen=True)
class Shown:
  """The network and the images that a picture shows.

  Attributes:
    options: the options of the picture.
    opened: the checkpoint and the images.
    params, batch_stats: the variables of the backbone, under the key 'backbone'
      as in `Network`.
  """

  options: Options
  opened: Opened
  params: PyTree
  batch_stats: PyTree

  @property
  def run(self) -> network.Trained:
    """The checkpoint and its network."""
    return self.opened.run

  @property
  def splits(self) -> sources.Splits:
    """The splits of the images."""
    return self.opened.splits

  @property
  def source_name(self) -> str:
    """The name of the source in a picture; for a folder, the folder's name."""
    if not self.opened.spec.startswith('folder:'):
      return sheets.printable(self.opened.spec)
    path = files.absolute(self.opened.spec.partition(':')[2])
    return sheets.printable(path.name)

  def title(self, what: str) -> str:
    """Returns the first line of the title: `what` is shown of which network."""
    name = self.run.config.model.name
    if self.options.encoder == RANDOM:
      return f'{what}: {name}, random'
    return (
        f'{what}: {name} after {self.run.step:,} steps, '
        f'{self.options.encoder} encoder'
    )

  def save(self, sheet: sheets.Sheet, **result: Any) -> dict[str, Any]:
    """Writes the picture, and returns a flat dict about it and its network.

    Raises:
      UserError: if it cannot be written.
    """
    sheet.save(self.options.path)
    return {
        'out': str(self.options.path), 'checkpoint': str(self.run.folder),
        'step': self.run.step, 'encoder': self.options.encoder,
        'source': self.opened.spec, **result,
    }

  def extract(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features and the indices of the images that could be read.

    Raises:
      UserError: if no image could be read.
    """
    return self._extract(self.params, self.batch_stats, source)

  @functools.cached_property
  def _extract(self) -> features.Extract:
    # All sources share one extractor, so that it is compiled only once.
    return self.opened.extractor(
        self.options.batch_size, log=self._log
    )

  @functools.cached_property
  def _log(self) -> features.ReadingLog:
    return features.ReadingLog()

  def attend(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Computes the attention of the class token; see `class_attention`.

    Returns:
      float32 [n, heads, 1 + patches], and the indices of the images that could
      be read, int64 [n].

    Raises:
      UserError: if no image could be read, or the attention is not finite.
    """
    mesh = self.opened.mesh

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def forward(params, batch_stats, images):
      images = augment.whole_images(images, self.run.config.data)
      return attention.class_attention(
          self.run.model.backbone, params, batch_stats, images
      )

    parts = [
        x['backbone'] if 'backbone' in x else {}
        for x in (self.params, self.batch_stats)
    ]
    maps, unreadable = zip(*(
        (jax.device_get(forward(*parts, batch.images)), batch.unreadable)
        for batch in self._batches(source)
    ), strict=True)
    maps = np.concatenate(maps)
    readable = self._log.readable(source, np.concatenate(unreadable))
    maps = maps[readable]
    finite = np.isfinite(maps).all(axis=(1, 2))
    features.require_finite(finite, source, readable)
    return maps, readable

  def _batches(self, source: Source) -> Iterator[pipeline.Batch]:
    # At most as many as there are images, rounded up to fill all devices.
    devices = self.opened.mesh.size
    size = min(self.options.batch_size, -(-len(source) // devices) * devices)
    for batch in pipeline.eval_batches(
        source, sharding.local_positions(self.opened.mesh, size), size,
        self.run.config.data.image_size, self.opened.workers,
    ):
      images = sharding.to_global(batch.images, self.opened.mesh)
      yield batch._replace(images=images)

  def read(self, source: Source, indices: np.ndarray) -> list[np.ndarray]:
    """Returns images as a picture shows them, uint8 [H, W, C].

    They show what the network saw: the central crop, or the whole image if all
    have one size. A crop is read at the resolution of the picture rather than
    that of the network.
    """
    subset = sources.Subset(source, indices)
    everywhere = np.arange(len(subset))
    batches = pipeline.eval_batches(
        subset, everywhere, len(subset), sheets.SIDE, self.opened.workers
    )
    return [image for batch in batches for image in batch.images]


def open_shown(
    options: Options, require: Callable[[ConfigDict], None] = lambda model: None
) -> Shown:
  """Opens the images and restores the network.

  Args:
    options: the options of the picture.
    require: checks `config.model` of the run before the network is restored.

  Raises:
    UserError: if either cannot be opened, or they do not fit together.
  """
  opened = open_checkpoint(
      options.checkpoint, options.source, options.labels, options.threads
  )
  require(opened.run.config.model)
  params, batch_stats = opened.variables(options.encoder)
  return Shown(options, opened, params, batch_stats)
