"""Draws what training sees: python -m mocov3_jax.preview --config=FILE \\
    --out=views.png [--count=8]

A row an example: the original with the first crop (red) and the second
(blue), the two views, and what was drawn for each. They are the examples,
and the draws, of the run's first step.
"""

import functools
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np
from PIL import Image, ImageDraw

from mocov3_jax import augment, checks, image_ops, train
from mocov3_jax import config as config_lib
from mocov3_jax import workdir as workdir_lib
from mocov3_jax.data import pipeline
from mocov3_jax.errors import UserError
from mocov3_jax.tools import cli

# Side of a picture and width of the text on the sheet, and gaps, pixels.
SIDE, TEXT, GAP = 160, 150, 8
# By the order in which image_ops numbers the adjustments.
ADJUSTMENTS = ('brightness', 'contrast', 'saturation', 'hue')


def preview(config: ConfigDict, out: str, count: int) -> dict[str, Any]:
  """Writes the sheet of the first `count` examples of a run.

  Args:
    config: as `default_config()`, after overrides.
    out: path of the PNG.
    count: rows.

  Returns:
    The path and the number of rows.

  Raises:
    UserError: for bad input, or if `out` cannot be written.
  """
  checks.validate(config, jax.device_count())
  if not 1 <= count <= config.batch_size:
    raise UserError(
        f'--count={count} is out of range. Allowed: from 1 to batch_size='
        f'{config.batch_size}.'
    )
  source = train.load_source(config).train
  config_lib.plan(config, len(source))
  reader = pipeline.BatchReader(
      source, np.arange(count), config.batch_size, config.seed
  )
  images = reader(0)
  _, key = train.run_keys(config.seed)
  keys = augment.example_keys(jax.random.fold_in(key, 0), count)
  row = jax.jit(functools.partial(_views, config=config))
  width = 3 * SIDE + 2 * TEXT + 6 * GAP
  sheet = Image.new('RGB', (width, count * (SIDE + GAP) + GAP), 'white')
  for i, (image, example_key) in enumerate(zip(images, keys, strict=True)):
    made, drawn = jax.device_get(row(image, example_key))
    _paste_row(sheet, GAP + i * (SIDE + GAP), image, made, drawn, config)
  try:
    sheet.save(str(workdir_lib.absolute(out)), format='PNG')
  except OSError as e:
    raise UserError(
        f'--out={out} cannot be written: {e.strerror or e}. Allowed: a path '
        'in a folder that is there.'
    ) from e
  return {'out': out, 'examples': count}


def _views(image, key, config):
  drawn = augment.draw_views(key, config.augment, *image.shape[:2])
  made = augment.apply_views(
      image_ops.to_float(image), drawn, config.augment, config.data.image_size
  )
  return made, drawn


def _paste_row(sheet, top, image, made, drawn, config):
  original = _picture(image)
  scale_y, scale_x = SIDE / image.shape[0], SIDE / image.shape[1]
  pen = ImageDraw.Draw(original)
  for color, d in zip(('red', 'deepskyblue'), drawn, strict=True):
    y, x, h, w = (float(v) for v in d.box)
    pen.rectangle(
        (x * scale_x, y * scale_y, (x + w) * scale_x - 1,
         (y + h) * scale_y - 1),
        outline=color, width=2,
    )
  sheet.paste(original, (GAP, top))
  pen = ImageDraw.Draw(sheet)
  left = SIDE + 2 * GAP
  views = (config.augment.view1, config.augment.view2)
  colors = ('red', 'deepskyblue')
  for color, view, pixels, d in zip(colors, views, made, drawn, strict=True):
    bytes_ = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    sheet.paste(_picture(bytes_), (left, top))
    pen.rectangle((left, top, left + SIDE - 1, top + 2), fill=color)
    text = '\n'.join(describe(d, view))
    pen.multiline_text((left + SIDE + GAP, top), text, fill='black')
    left += SIDE + TEXT + 2 * GAP


def _picture(image: np.ndarray) -> Image.Image:
  if image.shape[-1] == 1:
    image = np.repeat(image, 3, axis=-1)
  return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def describe(drawn: augment.Draw, view: ConfigDict) -> list[str]:
  """Says in words what was drawn for one view, a line an operation."""
  y, x, h, w = (float(v) for v in drawn.box)
  lines = [f'crop {w:.1f} x {h:.1f} at {x:.1f}, {y:.1f}']
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


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/digits.py.'
  )
  OUT = flags.DEFINE_string('out', None, 'PNG to write.', required=True)
  COUNT = flags.DEFINE_integer('count', 8, 'Examples to draw.')
  flags.mark_flag_as_required('config')
  cli.run(lambda: preview(CONFIG.value, OUT.value, COUNT.value))
