"""Augmented views of each image, made on the device inside the step.

Pure functions of (images, key). Every example draws from its own key, so what
it gets depends on its place in the global batch alone and not on the number of
devices.
"""

from collections.abc import Callable, Sequence
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax.method import image_ops
from mocov3_jax.parallel.microbatch import ONE_BATCH, MicroBatches

Augment = Callable[[jax.Array, jax.Array], jax.Array]
# The table of each view, as those in `config.augment`.
Views = Sequence[ConfigDict]


def both_views(augment: ConfigDict) -> Views:
  """Returns the tables of the two views of pre-training."""
  return augment.view1, augment.view2


def draw_crop(
    key: jax.Array, height: int, width: int, area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Draws the box of a random-resized crop.

  As torchvision does: ten tries of (area uniform, aspect ratio log-uniform),
  the first that fits; else the largest centred crop within the ratio. But the
  box is not rounded to whole pixels, which on images of 8 or 32 pixels would
  leave only a few different crops.

  Args:
    key: of this example and view.
    height, width: of the image, pixels.
    area: smallest and largest share of the image.
    ratio: smallest and largest width / height.

  Returns:
    (top, left, height, width), float32 scalars, pixels.
  """
  k_area, k_ratio, k_top, k_left = jax.random.split(key, 4)
  tries = functools.partial(jax.random.uniform, shape=(10,))
  pixels = height * width * tries(k_area, minval=area[0], maxval=area[1])
  log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
  aspect = jnp.exp(tries(k_ratio, minval=log_low, maxval=log_high))
  w, h = jnp.sqrt(pixels * aspect), jnp.sqrt(pixels / aspect)  # [10]
  fits = (w <= width) & (h <= height)
  first = jnp.argmax(fits)
  # The fallback is fixed by the shape of the image.
  w = jnp.where(fits[first], w[first], min(width, height * ratio[1]))
  h = jnp.where(fits[first], h[first], min(height, width / ratio[0]))
  centre = ~fits[first]
  across = jnp.where(centre, 0.5, jax.random.uniform(k_left))
  down = jnp.where(centre, 0.5, jax.random.uniform(k_top))
  return down * (height - h), across * (width - w), h, w


@flax.struct.dataclass
class AugmentParams:
  """The drawn parameters of one view of one example; all scalars but two.

  Attributes:
    box: (top, left, height, width) of the crop, pixels.
    jitter, gray, blur, solarize, flip: whether each is applied.
    order: int [4], of the jitter's adjustments.
    factors: [4], of brightness, contrast, saturation; and the hue's shift.
    sigma: of the blur, pixels.
  """

  box: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
  jitter: jax.Array
  order: jax.Array
  factors: jax.Array
  gray: jax.Array
  blur: jax.Array
  sigma: jax.Array
  solarize: jax.Array
  flip: jax.Array


def draw_params(
    key: jax.Array, view: ConfigDict, height: int, width: int
) -> AugmentParams:
  """Draws the parameters of one view of an image of this size."""
  keys = jax.random.split(key, 9)
  happens = jax.random.bernoulli
  spread = jnp.asarray(
      (view.brightness, view.contrast, view.saturation, view.hue)
  )
  middle = jnp.asarray((1.0, 1.0, 1.0, 0.0))
  low = jnp.maximum(middle - spread, jnp.asarray((0.0, 0.0, 0.0, -0.5)))
  return AugmentParams(
      box=draw_crop(keys[0], height, width, (view.crop_min, 1.0),
                    view.crop_ratio),
      jitter=happens(keys[1], view.jitter_prob),
      order=jax.random.permutation(keys[2], 4),
      factors=jax.random.uniform(
          keys[3], (4,), minval=low, maxval=middle + spread
      ),
      gray=happens(keys[4], view.gray_prob),
      blur=happens(keys[5], view.blur_prob),
      sigma=jax.random.uniform(
          keys[6], minval=view.blur_sigma[0], maxval=view.blur_sigma[1]
      ),
      solarize=happens(keys[7], view.solarize_prob),
      flip=happens(keys[8], view.flip_prob),
  )


def apply(
    image: jax.Array, drawn: AugmentParams, view: ConfigDict, size: int
) -> jax.Array:
  """Makes one view, in the order of the original's pipeline.

  Args:
    image: [H, W, C] in [0, 1].
    drawn: by `draw_params`.
    view: its table; an operation of probability 0 is left out of the program.
    size: side of the view, pixels.

  Returns:
    [size, size, C] in [0, 1].
  """
  image = image_ops.resample(image, drawn.box, size)
  return colour(image, drawn, view)


def colour(
    image: jax.Array, drawn: AugmentParams, view: ConfigDict
) -> jax.Array:
  """Does all of `apply` after the crop, [S, S, C] to [S, S, C]."""
  if view.jitter_prob:
    jittered = image_ops.jitter(image, drawn.order, drawn.factors)
    image = jnp.where(drawn.jitter, jittered, image)
  if view.gray_prob:
    image = jnp.where(drawn.gray, image_ops.gray(image), image)
  if view.blur_prob:
    image = jnp.where(drawn.blur, image_ops.blur(image, drawn.sigma), image)
  if view.solarize_prob:
    image = jnp.where(drawn.solarize, image_ops.solarize(image), image)
  if view.flip_prob:
    image = jnp.where(drawn.flip, image[:, ::-1], image)
  return image


def whole_images(images: jax.Array, data: ConfigDict) -> jax.Array:
  """Returns what evaluation sees of uint8 [B, H, W, C]: resized, normalised."""
  height, width = images.shape[1:3]
  if (height, width) == (data.image_size, data.image_size):
    return image_ops.normalise(image_ops.to_float(images), data)
  box = (0, 0, height, width)
  resize = functools.partial(
      image_ops.resample, box=box, out_size=data.image_size
  )
  resized = jax.vmap(resize)(image_ops.to_float(images))
  return image_ops.normalise(resized, data)


def draw_views(
    key: jax.Array, views: Views, height: int, width: int
) -> list[AugmentParams]:
  """Draws the views of the example whose key this is."""
  keys = jax.random.split(key, len(views))
  return [
      draw_params(keys[i], view, height, width) for i, view in enumerate(views)
  ]


def apply_views(
    image: jax.Array, drawn: Sequence[AugmentParams], views: Views, size: int
) -> jax.Array:
  """Makes the V views [V, size, size, C] of an example, all in [0, 1].

  The example is a whole image [H, W, C], which is cropped here, or the crops
  that the host made of it, [V, size, size, C].
  """
  pairs = list(zip(drawn, views, strict=True))
  if image.ndim == 4:
    return jnp.stack([
        colour(image[i], d, view) for i, (d, view) in enumerate(pairs)
    ])
  return jnp.stack([apply(image, d, view, size) for d, view in pairs])


def example_keys(key: jax.Array, count: int) -> jax.Array:
  """Keys [count] of the examples at places 0, 1, ... of the global batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def build(
    views: Views, data: ConfigDict, dtype: jnp.dtype = jnp.float32,
    micro_batches: MicroBatches = ONE_BATCH,
) -> Augment:
  """Returns f(images uint8, key) -> V views [B, V, S, S, C].

  S is `data.image_size`; B the global batch. The images are whole,
  [B, H, W, C], or crops, [B, V, S, S, C].

  Args:
    views: a table for each.
    data: `config.data`.
    dtype: of the views; the arithmetic is float32.
    micro_batches: in which they are made.
  """
  def example(image, key):
    drawn = draw_views(key, views, *image.shape[-3:-1])
    return apply_views(image, drawn, views, data.image_size)

  def augment_part(part):
    images, keys = part
    made = jax.vmap(example)(image_ops.to_float(images), keys)
    return image_ops.normalise(made, data).astype(dtype)

  @jax.named_scope('augment')
  def augment_batch(images, key):
    keys = example_keys(key, len(images))
    return micro_batches.map(augment_part, (images, keys))

  return augment_batch
