"""Opens a checkpoint with images, for the commands that evaluate networks."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mocov3_jax import sources
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.data.workers import Workers, processes_for
from mocov3_jax.evals import features
from mocov3_jax.method.build import image_shape, run_keys
from mocov3_jax.method.train_step import statistics
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import network
from mocov3_jax.sources import catalog, listing

PyTree = Any

# The value of `encoder` for random weights, drawn by the seed of the run. It
# began with these, unless it began with a checkpoint.
RANDOM = 'random'
ENCODERS = (*network.ENCODERS, RANDOM)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint, whose weights are not restored yet, and images.

  Attributes:
    run: the checkpoint and its network.
    spec: the source of the images, like `config.data.source`.
    labels: like `config.data.labels`.
    splits: the images.
    mesh: a mesh of all devices.
    workers: read and decode the images.
  """

  run: network.Trained
  spec: str
  labels: str
  splits: sources.Splits
  mesh: Mesh
  workers: Workers

  def extractor(
      self, batch_size: int, method: str = 'features',
      log: features.ReadingLog | None = None,
      stop_asked: Callable[[], bool] = lambda: False,
  ) -> features.Extract:
    """Returns a function that extracts features; see `features.extractor`."""
    return features.extractor(
        self.run.model, self.run.config.data, self.mesh, batch_size,
        self.workers, method, log, stop_asked,
    )

  def variables(
      self, encoder: str, parts: tuple[str, ...] = ('backbone',)
  ) -> tuple[PyTree, PyTree]:
    """Returns params and batch_stats of one encoder, on every device.

    Args:
      encoder: one of ENCODERS.
      parts: the parts of the network; see `network.restore`.

    Raises:
      UserError: see `network.restore`.
    """
    if encoder != RANDOM:
      return network.restore(self.run, self.mesh, encoder, parts)
    key, _ = run_keys(self.run.config.seed)
    views = jnp.zeros((2, 2, *image_shape(self.run.config.data)))

    @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
    def init():
      made = self.run.model.init(key, views, train=True)
      return tuple(
          {part: tree[part] for part in parts if part in tree}
          for tree in (made['params'], statistics(made))
      )

    return init()


def open_checkpoint(
    checkpoint: str, source: str = '', labels: str = '', threads: int = 0,
    processes: int = 1,
) -> Opened:
  """Finds a checkpoint and opens images that fit its network.

  Args:
    checkpoint: a workdir (then its newest checkpoint) or one
      checkpoints/<step>.
    source: like `config.data.source`; '' = the training data of the run.
    labels: like `config.data.labels`; '' = that of the run, or 'auto' if
      `source` is given.
    threads: number of threads that read and decode images; 0 = one per core.
    processes: number of processes that share these threads; 0 = chosen by the
      number of cores.

  Raises:
    UserError: if there is no such checkpoint, the images cannot be opened, or
      their number of channels is not that of the network.
  """
  run = network.find(checkpoint)
  data = run.config.data
  spec = source or data.source
  labels = labels or ('auto' if source else data.labels)
  splits = catalog.load(
      spec, labels, listing.cache_folder(data.listing_cache), len(data.mean)
  )
  sources.check_channels(splits, spec, len(data.mean))
  return Opened(
      run, spec, labels, splits, sharding.make_mesh(),
      Workers(threads, processes_for(processes, splits.train)),
  )


def check_flags(encoder: str, batch_size: int, threads: int) -> None:
  """Checks the flags that all commands on a checkpoint share.

  Raises:
    UserError: for the first value that is not allowed.
  """
  if encoder not in ENCODERS:
    raise unknown('--encoder', encoder, ENCODERS)
  devices = jax.device_count()
  if batch_size < 1 or batch_size % devices or threads < 0:
    raise UserError(
        f'--batch_size={batch_size} --threads={threads}. Allowed: for '
        f'--batch_size, a multiple of the {devices} devices; for --threads, 0 '
        'or more.'
    )
