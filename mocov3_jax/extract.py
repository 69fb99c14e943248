"""Features of images: python -m mocov3_jax.extract --checkpoint=DIR \\
    --source=folder:PATH --out=FILE.npz

DIR is the workdir of a run (its newest checkpoint) or one of its folders
checkpoints/<step>. FILE.npz holds, for each image that could be read,
  features   float32 [N, D], the backbone's output (before the heads)
  names      [N], paths below the folder, or split and number
  labels     int32 [N], -1 where there is none
  splits     [N], 'train' or 'test', as `train` would split the source
The last line on stdout is one JSON object.
"""

from typing import Any

from absl import flags
import jax
import numpy as np

from mocov3_jax import sharding
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.data import catalog, sources
from mocov3_jax.data.workers import Workers
from mocov3_jax.errors import UserError, unknown
from mocov3_jax.evals import features
from mocov3_jax.tools import cli, notes, trained, weights

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
  path = workdir_lib.absolute(out, '--out')
  if path.suffix != '.npz' or path.exists():
    what = 'exists' if path.exists() else 'does not end with .npz'
    raise UserError(
        f'--out={out} {what}. Allowed: a new file that ends with .npz.'
    )
  run = trained.find(checkpoint)
  data = run.config.data
  splits = catalog.load(
      source or data.source,
      labels or ('auto' if source else data.labels),
      path.parent / '.listings',
  )
  sources.check_channels(splits, source or data.source, len(data.mean))
  parts, method = LAYERS[layer]
  mesh = sharding.make_mesh()
  params, batch_stats = trained.restore(run, mesh, encoder, parts)
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
  if encoder not in weights.ENCODERS:
    raise unknown('--encoder', encoder, weights.ENCODERS)
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
  notes.say_unreadable(images, readable)
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


if __name__ == '__main__':
  CHECKPOINT = flags.DEFINE_string(
      'checkpoint', None, 'Workdir of a run, or a checkpoint.', required=True
  )
  SOURCE = flags.DEFINE_string(
      'source', '', 'digits, folder:PATH, tfds:NAME; default: the run\'s own.'
  )
  OUT = flags.DEFINE_string('out', None, 'The .npz file.', required=True)
  LAYER = flags.DEFINE_string('layer', 'backbone', 'backbone or projector.')
  ENCODER = flags.DEFINE_string('encoder', 'query', 'query or momentum.')
  LABELS = flags.DEFINE_string(
      'labels', '', 'auto, none, or a CSV file; default: the run\'s, or auto '
      'of another --source.'
  )
  BATCH_SIZE = flags.DEFINE_integer('batch_size', 256, 'Images at a time.')
  THREADS = flags.DEFINE_integer('threads', 0, 'That read; 0 = one a core.')
  cli.run(
      lambda: extract(
          CHECKPOINT.value, SOURCE.value, OUT.value, layer=LAYER.value,
          encoder=ENCODER.value, labels=LABELS.value,
          batch_size=BATCH_SIZE.value, threads=THREADS.value,
      )
  )
