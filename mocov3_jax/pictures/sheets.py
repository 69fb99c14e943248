"""Draws sheets of pictures with matplotlib, without its global state.

Everything is placed in pixels from the top left, so that pictures keep their
size and texts do not overlap.
"""

from collections.abc import Sequence
import warnings

from etils import epath
import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from mocov3_jax.base import files

# Side of a picture, gap between pictures, height of a line of text, and margin
# of the sheet, pixels.
SIDE, GAP, LINE, EDGE = 120, 10, 18, 14
DPI = 100
# A perceptually uniform colour map, and its opacity over the picture.
MAP, OPACITY = 'inferno', 0.65
SAME, OTHER, PLAIN, TEXT = '#1a9850', '#d73027', '#bbbbbb', '#222222'
UNLABELLED = '#999999'
# With more classes than this, there is no legend.
LEGEND = 20
# The most characters of a name that are shown.
SHOWN = 16


class Sheet:
  """A white page, on which positions are in pixels from the top left."""

  def __init__(self, width: float, height: float):
    """Makes an empty sheet of this size in pixels."""
    self.width, self.height = round(width), round(height)
    self.figure = Figure((self.width / DPI, self.height / DPI), dpi=DPI)
    FigureCanvasAgg(self.figure)

  def axes(
      self, left: float, top: float, width: float, height: float
  ) -> Axes:
    """Returns new axes that fill a rectangle."""
    return self.figure.add_axes((
        left / self.width, 1 - (top + height) / self.height,
        width / self.width, height / self.height,
    ))

  def text(
      self, left: float, top: float, text: str, size: float = 8,
      align: str = 'left', color: str = TEXT,
  ) -> None:
    """Draws one line of literal text, with its upper edge at `top`."""
    self.figure.text(
        left / self.width, 1 - top / self.height, text, fontsize=size,
        ha=align, va='top', color=color, parse_math=False,
    )

  def picture(
      self, left: float, top: float, image: np.ndarray, frame: str = PLAIN,
      line: float = 0.5, side: int = SIDE,
  ) -> Axes:
    """Draws an image uint8 [H, W, 1 or 3], fitted into a square of `side`.

    Returns:
      The axes, in pixels of the image, for drawing on top of it.
    """
    axes = self.axes(left, top, side, side)
    how = 'nearest' if _is_small(image) else 'antialiased'
    axes.imshow(rgb(image), interpolation=how)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
      spine.set(color=frame, linewidth=line)
    return axes

  def save(
      self, path: epath.Path, field: str = '--out', parents: bool = True
  ) -> None:
    """Writes the page as a PNG, whole or not at all.

    Args:
      path: the path of the PNG.
      field: the flag that gave the path.
      parents: whether to make its parent folders.

    Raises:
      UserError: if it cannot be written.
    """
    with (
        files.open_whole(path, field, parents) as file,
        warnings.catch_warnings(),
    ):
      # Letters that the font lacks are drawn as boxes.
      warnings.filterwarnings('ignore', 'Glyph')
      self.figure.savefig(file, format='png', dpi=DPI)


def rgb(image: np.ndarray) -> np.ndarray:
  """Converts an image uint8 [H, W, C] to RGB; to gray unless C is 3."""
  if image.shape[-1] == 3:
    return image
  gray = np.round(np.mean(image, axis=-1, keepdims=True)).astype(np.uint8)
  return np.repeat(gray, 3, axis=-1)


def printable(name: str) -> str:
  """Returns a name as one short line, without control characters."""
  name = name.encode(errors='replace').decode()
  name = ''.join(c if c.isprintable() else '?' for c in name)
  return name if len(name) <= SHOWN else f'{name[:SHOWN - 1]}…'


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Draws a map in colours over an image in gray.

  Args:
    image: uint8 [H, W, C].
    weights: [rows, columns], 0 or more; scaled to their maximum here.

  Returns:
    uint8 [SIDE, SIDE, 3].
  """
  size, how = (SIDE, SIDE), Image.Resampling
  gray = Image.fromarray(np.mean(rgb(image), axis=-1).astype(np.uint8))
  below = gray.resize(size, how.NEAREST if _is_small(image) else how.BICUBIC)
  scaled = (weights / max(weights.max(), 1e-30)).astype(np.float32)
  map_ = Image.fromarray(scaled).resize(size, how.BILINEAR)
  colors = matplotlib.colormaps[MAP](np.asarray(map_))[..., :3]
  mixed = OPACITY * colors + (1 - OPACITY) * np.asarray(below)[..., None] / 255
  return np.round(255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def attention_sheet(
    images: Sequence[np.ndarray], maps: np.ndarray, lines: Sequence[str]
) -> Sheet:
  """Draws a row per image: the image, a map per head, and their mean.

  Args:
    images: uint8 [H, W, C], as the network saw them.
    maps: float [images, heads, rows, columns], the weights of the patches.
    lines: the lines of the title.
  """
  maps = np.concatenate([maps, maps.mean(1, keepdims=True)], axis=1)
  columns = ['image', *(f'head {i}' for i in range(1, maps.shape[1])), 'mean']
  top = EDGE + LINE * len(lines) + GAP + LINE
  row_height = SIDE + LINE + GAP
  bar = top + len(images) * row_height + GAP
  sheet = Sheet(_width(len(columns), lines), bar + LINE + 2 * EDGE)
  _title(sheet, lines)
  for column, name in enumerate(columns):
    sheet.text(_centre(column), top - LINE, name, 9, 'center')
  for row, (image, heads) in enumerate(zip(images, maps, strict=True)):
    y = top + row * row_height
    sheet.picture(EDGE, y, image)
    for column, weights in enumerate(heads, start=1):
      sheet.picture(_left(column), y, overlay(image, weights))
      sheet.text(
          _centre(column), y + SIDE + 3, f'max {weights.max():.2g}', 8,
          'center',
      )
  _color_bar(sheet, bar)
  return sheet


def neighbour_sheet(
    queries: Sequence[np.ndarray], neighbours: Sequence[Sequence[np.ndarray]],
    below: Sequence[Sequence[Sequence[str]]], same: np.ndarray | None,
    lines: Sequence[str],
) -> Sheet:
  """Draws a row per query: the query, then its neighbours, nearest first.

  Args:
    queries: Q images uint8 [H, W, C].
    neighbours: for each query, k images.
    below: for each query, the lines of text under it and under each of its
      neighbours, 1 + k entries.
    same: bool [Q, k], whether a neighbour's frame is green rather than red;
      None = no coloured frames.
    lines: the lines of the title.
  """
  k = len(neighbours[0])
  columns = ['query', *(str(i) for i in range(1, k + 1))]
  top = EDGE + LINE * len(lines) + GAP + LINE
  text_lines = max(len(texts) for row in below for texts in row)
  row_height = SIDE + GAP + 2 + (LINE - 4) * text_lines
  sheet = Sheet(
      _width(len(columns), lines, GAP), top + len(queries) * row_height + 2
  )
  _title(sheet, lines)
  for column, name in enumerate(columns):
    # The query stands apart.
    x = _centre(column) + GAP * (column > 0)
    sheet.text(x, top - LINE, name, 9, 'center')
  for row, query in enumerate(queries):
    y = top + row * row_height
    for column, image in enumerate([query, *neighbours[row]]):
      frame, line = PLAIN, 0.5
      if column and same is not None:
        frame, line = (SAME if same[row][column - 1] else OTHER), 3
      x = _left(column) + GAP * (column > 0)
      sheet.picture(x, y, image, frame, line)
      for i, text in enumerate(below[row][column]):
        place = y + SIDE + 4 + i * (LINE - 4)
        sheet.text(x + SIDE / 2, place, text, 8, 'center')
  return sheet


def scatter_sheet(
    points: np.ndarray, labels: np.ndarray, names: dict[int, str],
    axis_names: tuple[str, str], lines: Sequence[str],
) -> Sheet:
  """Draws points in the plane, coloured by label.

  Args:
    points: float [N, 2].
    labels: int [N]; -1 for a point without a label.
    names: the names of the labels, in the order of the legend. There is no
      legend for more than LEGEND labels.
    axis_names: the names of both axes.
    lines: the lines of the title.
  """
  legend = 0 < len(names) <= LEGEND
  top, plot, right = EDGE + LINE * len(lines) + GAP, 560, EDGE
  if legend:
    texts = [printable(name) for name in names.values()] + ['no label']
    right += 2 * GAP + LINE + 8 * max(map(len, texts))
  sheet = Sheet(
      max(_text_width(lines), 2 * EDGE + LINE + plot + right),
      top + plot + LINE + 2 * EDGE,
  )
  _title(sheet, lines)
  axes = sheet.axes(EDGE + LINE, top, plot, plot)
  axes.set(xticks=[], yticks=[])
  axes.set_aspect('equal', adjustable='datalim')
  axes.set_xlabel(axis_names[0], fontsize=9)
  axes.set_ylabel(axis_names[1], fontsize=9)
  size = float(np.clip(14_000 / len(points), 3, 30))
  without = labels < 0
  axes.scatter(
      *points[without].T, s=size, color=UNLABELLED, linewidths=0, alpha=0.8
  )
  # Drawn in one call and in random order, so that no class covers the others.
  order = np.random.default_rng(0).permutation(np.flatnonzero(~without))
  colors = class_colors(max(names, default=0) + 1)
  axes.scatter(
      *points[order].T, s=size, c=colors[labels[order]], linewidths=0,
      alpha=0.8,
  )
  if legend:
    entries = [(texts[i], colors[n]) for i, n in enumerate(names)]
    if without.any():
      entries.append(('no label', UNLABELLED))
    left = EDGE + LINE + plot + 2 * GAP
    for i, (name, color) in enumerate(entries):
      sheet.text(left, top + i * 1.3 * LINE, '●', 11, color=color)
      sheet.text(left + LINE, top + i * 1.3 * LINE + 2, name, 9)
  return sheet


def class_colors(count: int) -> np.ndarray:
  """Returns the colours of classes 0 to count - 1, float [count, 4]."""
  if count <= LEGEND:
    name = 'tab10' if count <= 10 else 'tab20'
    return matplotlib.colormaps[name](np.arange(count))
  return matplotlib.colormaps['turbo'](np.linspace(0, 1, count))


def _is_small(image: np.ndarray) -> bool:
  # The pixels of a small image are shown as squares.
  return max(image.shape[:2]) < SIDE // 2


def _left(column: int) -> int:
  return EDGE + column * (SIDE + GAP)


def _centre(column: int) -> float:
  return _left(column) + SIDE / 2


def _text_width(lines: Sequence[str]) -> int:
  # The width of the title. At 100 dpi, letters of 11 points are about 8 pixels
  # wide, and letters of 9 points about 7.
  return 2 * EDGE + 8 * max(map(len, lines))


def _width(columns: int, lines: Sequence[str], extra: int = 0) -> int:
  return max(_left(columns) - GAP + EDGE + extra, _text_width(lines))


def _title(sheet: Sheet, lines: Sequence[str]) -> None:
  for i, line in enumerate(lines):
    sheet.text(EDGE, EDGE + i * LINE, line, 9 if i else 11)


def _color_bar(sheet: Sheet, top: float) -> None:
  axes = sheet.axes(EDGE, top, 2 * SIDE + GAP, LINE / 2)
  bar = sheet.figure.colorbar(
      ScalarMappable(cmap=MAP), cax=axes, orientation='horizontal',
      ticks=[0, 0.5, 1],
  )
  bar.ax.tick_params(labelsize=7)
  sheet.text(
      _left(2) + GAP, top - 2, "weight of a patch, as a share of the map's "
      'max', 8,
  )
