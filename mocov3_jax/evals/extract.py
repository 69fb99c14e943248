"""Features of the images of a source, in a file."""

from typing import Any

import jax
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import unknown
from mocov3_jax.data import sources
from mocov3_jax.evals import features
from mocov3_jax.evals.opened import check_flags, open_checkpoint

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
    source: as `config.data.source`; '' = what the run was trained on.
    out: the .npz file; must not exist.
    layer: 'backbone' or 'projector'.
    encoder: 'query', 'momentum' or 'random'.
    labels: as `config.data.labels`; '' = those of the run, or 'auto' of another
      source.
    batch_size: images per forward pass over all devices.
    threads: that read and decode images; 0 = one a core.

  Returns:
    What was written, flat.

  Raises:
    UserError: for bad input; nothing is written then.
  """
  if layer not in LAYERS:
    raise unknown('--layer', layer, LAYERS)
  check_flags(encoder, batch_size, threads)
  path = files.new_output(out, '.npz')
  opened = open_checkpoint(
      checkpoint, source, labels, threads
  )
  run, splits = opened.run, opened.splits
  parts, method = LAYERS[layer]
  params, batch_stats = opened.variables(encoder, parts)
  forward = opened.extractor(batch_size, method)
  rows = []
  for split, images in ('train', splits.train), ('test', splits.test):
    if images is not None:
      rows.append(_rows(forward, params, batch_stats, split, images))
  table = {key: np.concatenate([r[key] for r in rows]) for key in rows[0]}
  with files.open_whole(path, '--out', parents=True) as file:
    np.savez(file, **table, classes=np.array(splits.train.classes, np.str_))
  total = len(splits.train) + (len(splits.test) if splits.test else 0)
  return {
      'out': str(path), 'checkpoint': str(run.folder), 'step': run.step,
      'layer': layer, 'encoder': encoder, 'images': len(table['names']),
      'dim': table['features'].shape[1],
      'unreadable': total - len(table['names']),
  }


def _rows(
    forward: features.Extract, params: Any, batch_stats: Any, split: str,
    images: sources.Source,
) -> dict[str, np.ndarray]:
  values, readable = forward(params, batch_stats, images)
  return {
      'features': np.asarray(jax.device_get(values)),
      'names': np.array([images.name(i) for i in readable.tolist()]),
      'labels': images.labels(readable).astype(np.int32),
      'splits': np.full(len(readable), split),
  }


