"""Draws the views of the first step of a run on one sheet."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from matplotlib.patches import Rectangle
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks
from mocov3_jax.data import channels, pipeline
from mocov3_jax.method import augment, image_ops
from mocov3_jax.method.build import run_keys
from mocov3_jax.pictures.sheets import Sheet
from mocov3_jax.training import pretrain

# Side of a picture, width of the text, gap, height of the header, and height of
# a line, pixels.
SIDE, TEXT, GAP, HEADER, LINE = 160, 190, 8, 20, 17
ROWS = 8
COLORS = ('red', 'deepskyblue')
# In the order in which image_ops numbers the adjustments.
ADJUSTMENTS = ('brightness', 'contrast', 'saturation', 'hue')


def preview(
    config: ConfigDict, out: str, count: int | None = None
) -> dict[str, Any]:
  """Writes a sheet of the first `count` examples of a run.

  Args:
    config: a `default_config()`, with any overrides.
    out: path of the PNG.
    count: number of rows; None = ROWS, or fewer if the batch has fewer.

  Returns:
    A dict of the path and the number of rows.

  Raises:
    UserError: for bad input, or if `out` cannot be written.
  """
  checks.validate(config)
  source = pretrain.load_splits(config).train
  # A source with fewer images than a batch can be previewed as well.
  config = config.copy_and_resolve_references()
  config.batch_size = min(config.batch_size, len(source))
  count = min(ROWS, config.batch_size) if count is None else count
  if not 1 <= count <= config.batch_size:
    raise UserError(
        f'--count={count} is out of range. Allowed: from 1 to '
        f'{config.batch_size}, the images of a batch.'
    )
  reader = pretrain.make_reader(config, source, np.arange(count))
  batch = reader(0)
  _, key = run_keys(config.seed)
  keys = augment.example_keys(jax.random.fold_in(key, 0), count)
  row = jax.jit(functools.partial(_views, config=config))
  sheet = Sheet(
      3 * SIDE + 2 * TEXT + 6 * GAP, count * (SIDE + GAP) + GAP + HEADER
  )
  _draw_header(sheet)
  for i, image in enumerate(batch.images):
    made, drawn = jax.device_get(row(image, keys[i]))
    original, boxes = _original(reader, batch, i, image, drawn)
    top = HEADER + GAP + i * (SIDE + GAP)
    _draw_original(sheet, top, original, boxes)
    _draw_views(sheet, top, made, drawn, boxes, config)
  sheet.save(files.absolute(out, '--out'), parents=False)
  return {'out': out, 'examples': count}


def _views(image, key, config):
  views = augment.both_views(config.augment)
  drawn = augment.draw_views(key, views, *image.shape[-3:-1])
  made = augment.apply_views(
      image_ops.to_float(image), drawn, views, config.data.image_size
  )
  return made, drawn


def _original(reader, batch, place, image, drawn):
  """Returns the whole image, and both boxes (top, left, height, width)."""
  source = reader.source
  if source.shape:
    return image, [[float(v) for v in d.box] for d in drawn]
  if batch.unreadable[place] >= 0:  # The views show another image instead.
    return None, [None, None]
  encoded = channels.opened(
      source.read(int(reader.indices(0)[place])), source.channels
  )
  boxes = pipeline.draw_boxes(
      reader.seed, place, encoded.height, encoded.width, reader.views
  )
  return encoded.pixels(), boxes


def _draw_header(sheet):
  sheet.text(GAP, 2, 'original and crops', 9)
  for i, name in enumerate(('view 1', 'view 2')):
    left = SIDE + 2 * GAP + i * (SIDE + TEXT + 2 * GAP)
    sheet.text(left, 2, f'{name} and its random parameters', 9)


def _draw_original(sheet, top, image, boxes):
  if image is None:
    sheet.text(GAP, top, 'unreadable: replaced', 9)
    return
  axes = sheet.picture(GAP, top, image, side=SIDE)
  for color, (y, x, h, w) in zip(COLORS, boxes, strict=True):
    # Pixel centres are whole numbers; the box is given by pixel edges.
    axes.add_patch(Rectangle(
        (x - 0.5, y - 0.5), w, h, fill=False, color=color, linewidth=1.5,
        antialiased=False,
    ))


def _draw_views(sheet, top, made, drawn, boxes, config):
  left = SIDE + 2 * GAP
  views = (config.augment.view1, config.augment.view2)
  for color, view, pixels, d, box in zip(
      COLORS, views, made, drawn, boxes, strict=True
  ):
    bytes_ = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    sheet.picture(left, top, bytes_, color, 1.5, SIDE)
    for i, line in enumerate(describe(d, box, view)):
      sheet.text(left + SIDE + GAP, top + i * LINE, line, 9)
    left += SIDE + TEXT + 2 * GAP


def describe(
    drawn: augment.AugmentParams, box: Sequence[float] | None, view: ConfigDict
) -> list[str]:
  """Describes what was drawn at random for one view, a line per operation."""
  lines = []
  if box is not None:
    y, x, h, w = box
    lines.append(f'crop {w:.4g} x {h:.4g} at {x:.4g}, {y:.4g}')
  if view.jitter_prob and drawn.jitter:
    names = [ADJUSTMENTS[op] for op in drawn.order]
    lines += [
        f'{name} {drawn.factors[op]:.2f}'
        for name, op in zip(names, drawn.order, strict=True) if view[name]
    ]
  if view.gray_prob and drawn.gray:
    lines.append('gray')
  if view.blur_prob and drawn.blur:
    lines.append(f'blur {drawn.sigma:.2f} px')
  if view.solarize_prob and drawn.solarize:
    lines.append('solarize')
  if view.flip_prob and drawn.flip:
    lines.append('flip')
  return lines
