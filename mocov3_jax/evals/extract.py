"""Features of the images of a source, in a file."""

from typing import Any

import jax
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.data import catalog, sources
from mocov3_jax.data.workers import Workers
from mocov3_jax.evals import features
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import network

# What a layer needs of the network, and the method that computes it.
LAYERS = {
    'backbone': (('backbone',), 'features'),
    'projector': (('backbone', 'projector'), 'project'),
}


def extract(
    checkpoint: str, source: str, out: str, *, layer: str = 'backbone',
    encoder: str = 'query', labels: str = '', batch_size: int = 256,
    threads: int = 0,
) -> dict[str, Any]:
  """Writes the features of all images of a source.

  Args:
    checkpoint: a workdir or one checkpoints/<step>.
    source: 'digits', 'folder:PATH' or 'tfds:NAME[:SPLIT]'; '' = what the run
      was trained on.
    out: the .npz file; must not exist.
    layer: 'backbone' or 'projector'.
    encoder: 'query' or 'momentum'.
    labels: as `config.data.labels`; '' = those of the run, or 'auto' of another
      source.
    batch_size: images per forward pass over all devices.
    threads: that read and decode images; 0 = one a core.

  Returns:
    What was written, flat.

  Raises:
    UserError: for bad input; nothing is written then (but a listing of an
      image folder, beside the file).
  """
  _check(layer, encoder, batch_size, threads)
  path = files.absolute(out, '--out')
  if path.suffix != '.npz' or path.exists():
    what = 'exists' if path.exists() else 'does not end with .npz'
    raise UserError(
        f'--out={out} {what}. Allowed: a new file that ends with .npz.'
    )
  run = network.find(checkpoint)
  data = run.config.data
  splits = catalog.load(
      source or data.source,
      labels or ('auto' if source else data.labels),
      path.parent / '.listings',
  )
  sources.check_channels(splits, source or data.source, len(data.mean))
  parts, method = LAYERS[layer]
  mesh = sharding.make_mesh()
  params, batch_stats = network.restore(run, mesh, encoder, parts)
  forward = features.extractor(
      run.model, data, mesh, batch_size, Workers(threads), method
  )
  rows = []
  for split, images in ('train', splits.train), ('test', splits.test):
    if images is not None:
      rows.append(_rows(forward, params, batch_stats, split, images))
  table = {key: np.concatenate([r[key] for r in rows]) for key in rows[0]}
  _write(path, table)
  total = len(splits.train) + (len(splits.test) if splits.test else 0)
  return {
      'out': str(path), 'checkpoint': str(run.folder), 'step': run.step,
      'layer': layer, 'encoder': encoder, 'images': len(table['names']),
      'dim': table['features'].shape[1],
      'unreadable': total - len(table['names']),
  }


def _check(layer: str, encoder: str, batch_size: int, threads: int) -> None:
  if layer not in LAYERS:
    raise unknown('--layer', layer, LAYERS)
  if encoder not in network.ENCODERS:
    raise unknown('--encoder', encoder, network.ENCODERS)
  if batch_size < 1 or batch_size % jax.device_count() or threads < 0:
    raise UserError(
        f'--batch_size={batch_size} --threads={threads}. Allowed: a multiple '
        f'of the {jax.device_count()} devices, and 0 or more.'
    )


def _rows(
    forward: features.Extract, params: Any, batch_stats: Any, split: str,
    images: sources.Source,
) -> dict[str, np.ndarray]:
  values, readable = forward(params, batch_stats, images)
  features.say_unreadable(images, readable)
  return {
      'features': np.asarray(jax.device_get(values)),
      'names': np.array([images.name(i) for i in readable.tolist()]),
      'labels': images.labels(readable).astype(np.int32),
      'splits': np.full(len(readable), split),
  }


def _write(path: Any, table: dict[str, np.ndarray]) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    with part.open('wb') as file:
      np.savez(file, **table)
    part.replace(path)
  except OSError as e:
    raise UserError(f'--out={path} cannot be written: {e.strerror}') from e
