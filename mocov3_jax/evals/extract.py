"""Writes the features of a source's images, and the classes predicted."""

import csv
import io
from typing import Any

import jax
import numpy as np

from mocov3_jax import sources
from mocov3_jax.base import console, files
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.evals import features
from mocov3_jax.evals.opened import check_flags, open_checkpoint
from mocov3_jax.runs import network

# The parts of the network that a layer needs, and the method that computes it.
LAYERS = {
    'backbone': (('backbone',), 'features'),
    'projector': (('backbone', 'projector'), 'project'),
}
# The most bytes that the names of images may take in a table.
MOST_NAMES = 2**31
# How many classes are written per image, the likeliest first.
GUESSES = 5


def extract(
    checkpoint: str, source: str, out: str, *, predict: str = '',
    layer: str = 'backbone', encoder: str = 'query', labels: str = '',
    batch_size: int = 256, threads: int = 0,
) -> dict[str, Any]:
  """Writes features or predicted classes, or both, of all images of a source.

  Args:
    checkpoint: a workdir or one checkpoints/<step>.
    source: like `config.data.source`; '' = the training data of the run.
    out: the .npz file of features; must not exist. '' = none.
    predict: the .csv file of classes and probabilities, for a checkpoint with
      a classifier; must not exist. '' = none.
    layer: 'backbone' or 'projector'.
    encoder: 'query', 'momentum' or 'random'.
    labels: like `config.data.labels`; '' = that of the run, or 'auto' if
      `source` is given.
    batch_size: images per forward pass on all devices together.
    threads: number of threads that read and decode images; 0 = one per core.

  Returns:
    A summary of what was written, as a flat dictionary.

  Raises:
    UserError: if the input is bad; then nothing is written.
  """
  if layer not in LAYERS:
    raise unknown('--layer', layer, LAYERS)
  check_flags(encoder, batch_size, threads)
  if not out and not predict:
    raise UserError(
        'nothing to write. Use --out=FILE.npz for features, --predict=FILE.csv '
        'for classes, or both.'
    )
  if predict and (layer, encoder) != ('backbone', 'query'):
    raise UserError(
        f'--predict with --layer={layer} --encoder={encoder}: the classifier '
        'needs the features of the backbone that it was trained on. Use '
        '--predict without --layer and --encoder.'
    )
  path = files.new_output(out, '.npz') if out else None
  csv_path = files.new_output(predict, '.csv', '--predict') if predict else None
  opened = open_checkpoint(
      checkpoint, source, labels, threads
  )
  run, splits = opened.run, opened.splits
  if csv_path:
    classifier, classes = network.restore_classifier(run, opened.mesh)
  parts, method = LAYERS[layer]
  params, batch_stats = opened.variables(encoder, parts)
  forward = opened.extractor(batch_size, method)
  rows = []
  for split, images in ('train', splits.train), ('test', splits.test):
    if images is not None:
      rows.append(_rows(forward, params, batch_stats, split, images))
  table = {key: np.concatenate([r[key] for r in rows]) for key in rows[0]}
  found = {}
  if path:
    with files.open_whole(path, '--out', parents=True) as file:
      np.savez(file, **table, classes=np.array(splits.train.classes, np.str_))
    found['out'] = str(path)
  if csv_path:
    chances = probabilities(table['features'], jax.device_get(classifier))
    text, accuracy = predictions(table, splits.train.classes, chances, classes)
    with files.open_whole(csv_path, '--predict', parents=True) as file:
      file.write(text.encode())
    found |= {'predict': str(csv_path)} | accuracy
  total = len(splits.train) + (len(splits.test) if splits.test else 0)
  return found | {
      'checkpoint': str(run.folder), 'step': run.step,
      'layer': layer, 'encoder': encoder, 'images': len(table['names']),
      'dim': table['features'].shape[1],
      'unreadable': total - len(table['names']),
  }


def _rows(
    forward: features.Extract, params: Any, batch_stats: Any, split: str,
    images: sources.Source,
) -> dict[str, np.ndarray]:
  values, readable = forward(params, batch_stats, images)
  names = [images.name(i) for i in readable.tolist()]
  longest = max(names, key=len)
  if 4 * len(longest) * len(names) > MOST_NAMES:
    raise UserError(
        f'the names of {len(names):,} images do not fit into a table: each one '
        f'takes as much space as the longest, of {len(longest):,} characters: '
        f'{console.shown(longest)[:100]}... Use a folder without that image.'
    )
  return {
      'features': values,
      'names': np.array(names),
      'labels': images.labels(readable).astype(np.int32),
      'splits': np.full(len(readable), split),
  }


def probabilities(
    values: np.ndarray, classifier: dict[str, np.ndarray]
) -> np.ndarray:
  """Maps features [N, D] to the probabilities of the classes, [N, C] float32.

  Raises:
    UserError: if the classifier needs features of another width.
  """
  kernel, bias = classifier['kernel'], classifier['bias']
  if kernel.shape != (values.shape[1], len(bias)):
    raise UserError(
        f'the classifier maps {kernel.shape[0]} features to {len(bias)} '
        f'classes with a kernel of shape {kernel.shape}, and the backbone has '
        f'{values.shape[1]} features.'
    )
  logits = values @ kernel + bias
  logits -= logits.max(axis=1, keepdims=True)
  return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def predictions(
    table: dict[str, np.ndarray], label_names: tuple[str, ...],
    chances: np.ndarray, classes: list[str],
) -> tuple[str, dict[str, Any]]:
  """Returns a CSV table of the likeliest classes of each image.

  Args:
    table: 'names' and 'labels' of the images.
    label_names: the names of the labels.
    chances: [N, C], probabilities of the classifier's classes.
    classes: the names of the classes; empty = not known, and they are written
      as numbers.

  Returns:
    The text; and the accuracy on the images whose label is the name of a class,
    or an empty dictionary if there are no such images.
  """
  count = min(GUESSES, chances.shape[1])
  names = np.array(classes or [str(c) for c in range(chances.shape[1])])
  order = np.argsort(-chances, axis=1, kind='stable')[:, :count]
  guesses = names[order]
  labels = np.array([*label_names, ''])[table['labels']]  # Label -1 gives ''.
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  numbered = [f'_{n}' if n > 1 else '' for n in range(1, count + 1)]
  writer.writerow(['name', 'label', *(
      f'{column}{n}' for n in numbered for column in ('class', 'probability')
  )])
  for row, name in enumerate(table['names']):
    chosen = chances[row, order[row]]
    cells = [str(name), str(labels[row]), *(
        cell for guess, chance in zip(guesses[row], chosen, strict=True)
        for cell in (str(guess), f'{chance:.6f}')
    )]
    writer.writerow(map(files.csv_text, cells))
  known = np.isin(labels, classes)
  if not known.any():
    return text.getvalue(), {}
  right = guesses[known, 0] == labels[known]
  return text.getvalue(), {
      'labelled': int(known.sum()), 'top1': float(right.mean()),
  }
