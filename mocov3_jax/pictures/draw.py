"""Draws attention, nearest neighbours and embeddings as pictures."""

from typing import Any

import numpy as np

from mocov3_jax import sources
from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.evals import knn
from mocov3_jax.pictures import attention as attention_lib
from mocov3_jax.pictures import projection, sheets, showing

# The most rows of a sheet, and neighbours in a row, that stay legible.
MOST_ROWS, MOST_NEIGHBOURS = 64, 20


def attention(options: showing.Options) -> dict[str, Any]:
  """Draws the attention of the class token to the patches.

  The images are evenly spaced over the test split or, without labels, over all
  images.

  Returns:
    A flat dict about what was drawn. `class_token` is the mean weight that the
    class token gives to itself.

  Raises:
    UserError: for bad input; nothing is written then.
  """
  count = options.check(6, 1, MOST_ROWS)
  shown = showing.open_shown(options, attention_lib.require_class_token)
  run = shown.run
  held_out = shown.splits.test is not None
  source = sources.evenly(
      shown.splits.test if held_out else shown.splits.train, count
  )
  maps, readable = shown.attend(source)
  vit, heads = run.model.backbone, maps.shape[1]
  side = run.config.data.image_size // vit.patch_size
  sheet = sheets.attention_sheet(
      shown.read(source, readable),
      maps[..., 1:].reshape(-1, heads, side, side),
      [
          shown.title('Attention of the class token'),
          f'last of {vit.depth} blocks, heads 1 to {heads}, {side} x {side} '
          f'patches; {"held-out " if held_out else ""}images: '
          + shown.source_name,
      ],
  )
  return shown.save(
      sheet, images=len(readable), heads=heads, patches=side * side,
      class_token=float(maps[..., 0].mean()),
  )


def neighbours(options: showing.Options, k: int) -> dict[str, Any]:
  """Draws images and their nearest neighbours by backbone features.

  Args:
    options: the options that all pictures share.
    k: the number of neighbours of each image.

  Returns:
    A flat dict about what was drawn. With labels, it has `hits`, the share of
    the drawn neighbours that have their query's label, and `chance`, the same
    share over the whole bank.

  Raises:
    UserError: as for `attention`.
  """
  count = options.check(8, 1, MOST_ROWS)
  if not 1 <= k <= MOST_NEIGHBOURS:
    raise UserError(
        f'--k={k} is out of range. Allowed: 1 to {MOST_NEIGHBOURS}.'
    )
  shown = showing.open_shown(options)
  splits = shown.splits
  labelled = splits.test is not None
  bank = splits.bank if labelled else splits.train
  known, places = shown.extract(bank)
  if labelled:
    queries = sources.evenly(splits.test, count)
    asked, ask = shown.extract(queries)
    own = None
  else:
    # Chosen from the images that could be read, so that no query is missing.
    own = np.arange(len(places)) if len(places) <= count else (
        np.arange(count) * len(places) // count
    )
    queries, asked, ask = bank, known[own], places[own]
  most = len(places) - (not labelled)
  if k > most:
    raise UserError(
        f'--k={k} is more than there are in {shown.opened.spec}. Allowed: 1 to '
        f'{most}.'
    )
  cosine, index = knn.nearest(asked, known, k, shown.opened.mesh, own)
  return _draw_neighbours(shown, queries, ask, places[index], cosine)


def _draw_neighbours(
    shown: showing.Shown, queries: sources.Source, ask: np.ndarray,
    found: np.ndarray, cosine: np.ndarray,
) -> dict[str, Any]:
  splits = shown.splits
  k = found.shape[1]
  second, result, same = shown.source_name, {}, None
  below = [[[], *([f'{c:.3f}'] for c in row)] for row in cosine]
  bank = splits.train
  if splits.test is not None:
    bank = splits.bank
    names = [sheets.printable(n) for n in shown.splits.train.classes]
    labels = bank.labels(found.ravel()).reshape(found.shape)
    theirs = queries.labels(ask)[:, None]
    same = labels == theirs
    everyone = bank.labels(np.arange(len(bank)))
    result = {
        'hits': float(same.mean()),
        'chance': float((everyone == theirs).mean()),
    }
    for texts, label, row in zip(below, theirs[:, 0], labels, strict=True):
      for text, n in zip(texts, [label, *row], strict=True):
        text.insert(0, names[n])
    second = (
        f'{second}: {same.sum()} of {same.size} have their query\'s label '
        f'({result["chance"]:.0%} by chance)'
    )
  each = [shown.read(bank, row) for row in found]
  sheet = sheets.neighbour_sheet(
      shown.read(queries, ask), each, below, same, [
          shown.title(f'The {k} nearest of {len(bank):,} images'),
          f'{second}; numbers: cosine of the features',
      ],
  )
  return shown.save(
      sheet, images=len(ask), k=k, bank=len(bank), **result
  )


def embedding(options: showing.Options, method: str) -> dict[str, Any]:
  """Draws the features of images as points in the plane.

  The images are evenly spaced over the training and the test split.

  Args:
    options: the options that all pictures share.
    method: one of `projection.METHODS`.

  Returns:
    A flat dict about what was drawn, with the numbers of `projection.plane`.

  Raises:
    UserError: as for `attention`, or if umap-learn is needed but not installed.
  """
  if method not in projection.METHODS:
    raise unknown('--method', method, projection.METHODS)
  count = options.check(2000, projection.FEWEST)
  if method == 'umap':
    projection.import_umap()  # Fails before any work is done.
  shown = showing.open_shown(options)
  train, test = shown.splits.train, shown.splits.test
  total = len(train) + (len(test) if test is not None else 0)
  parts = [sources.evenly(train, max(1, count * len(train) // total))]
  if test is not None:
    rest = max(1, count - len(parts[0]))
    parts.append(sources.evenly(test, rest))
  values, labels = [], []
  for source in parts:
    found, readable = shown.extract(source)
    values.append(found)
    labels.append(source.labels(readable))
  values, labels = np.concatenate(values), np.concatenate(labels)
  if len(values) < projection.FEWEST:
    raise UserError(
        f'{len(values)} images of {shown.opened.spec} could be read. Allowed: '
        f'{projection.FEWEST} or more.'
    )
  points, axes, result = projection.plane(values, method)
  names = shown.splits.train.classes
  present = np.unique(labels[labels >= 0]).tolist()
  kinds = f'{len(present)} classes' if present else 'no labels'
  sheet = sheets.scatter_sheet(
      points, labels, {label: names[label] for label in present}, axes, [
          shown.title(f'Features by {projection.METHODS[method]}'),
          f'{len(points):,} images: {shown.source_name}, {kinds}',
      ],
  )
  return shown.save(
      sheet, images=len(points), method=method, classes=len(present), **result
  )
