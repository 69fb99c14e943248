"""Augmented views of each image, made on the device inside the step.

All are pure functions of (images, key). Every example has its own key, so its
augmentation depends only on its position in the global batch, not on the number
of devices.
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
# The settings of each view, such as `config.augment.view1`.
Views = Sequence[ConfigDict]


def both_views(augment: ConfigDict) -> Views:
  """Returns the settings of the two views of pre-training."""
  return augment.view1, augment.view2


def draw_crop(
    key: jax.Array, height: int, width: int, area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Draws the box of a random-resized crop.

  As in torchvision, it draws ten pairs (uniform area, log-uniform aspect ratio)
  and takes the first that fits into the image, or else the largest centred crop
  within the ratio. Unlike in torchvision, the box is not rounded to whole
  pixels, which on images of 8 or 32 pixels would leave few different crops.

  Args:
    key: the random key of this example and view.
    height, width: the size of the image in pixels.
    area: smallest and largest fraction of the image's area.
    ratio: smallest and largest width / height.

  Returns:
    (top, left, height, width) in pixels, float32 scalars.
  """
  k_area, k_ratio, k_top, k_left = jax.random.split(key, 4)
  tries = functools.partial(jax.random.uniform, shape=(10,))
  pixels = height * width * tries(k_area, minval=area[0], maxval=area[1])
  log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
  aspect = jnp.exp(tries(k_ratio, minval=log_low, maxval=log_high))
  w, h = jnp.sqrt(pixels * aspect), jnp.sqrt(pixels / aspect)  # [10]
  fits = (w <= width) & (h <= height)
  first = jnp.argmax(fits)
  # The fallback depends only on the shape of the image.
  w = jnp.where(fits[first], w[first], min(width, height * ratio[1]))
  h = jnp.where(fits[first], h[first], min(height, width / ratio[0]))
  centre = ~fits[first]
  across = jnp.where(centre, 0.5, jax.random.uniform(k_left))
  down = jnp.where(centre, 0.5, jax.random.uniform(k_top))
  return down * (height - h), across * (width - w), h, w


@flax.struct.dataclass
class AugmentParams:
  """The randomly drawn parameters of one view of one example.

  All are scalars unless a shape is given.

  Attributes:
    box: (top, left, height, width) of the crop in pixels.
    jitter, gray, blur, solarize, flip: whether each is applied.
    order: int [4], the order of the jitter's adjustments.
    factors: [4], the factors of brightness, contrast and saturation, and the
      hue shift.
    sigma: standard deviation of the blur in pixels.
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
  """Makes one view, with the operations in the order of the original code.

  Args:
    image: [H, W, C] in [0, 1].
    drawn: from `draw_params`.
    view: the view's settings. Operations of probability 0 are not compiled.
    size: side of the view in pixels.

  Returns:
    [size, size, C] in [0, 1].
  """
  image = image_ops.resample(image, drawn.box, size)
  return colour(image, drawn, view)


def colour(
    image: jax.Array, drawn: AugmentParams, view: ConfigDict
) -> jax.Array:
  """Does everything in `apply` after the crop: [S, S, C] to [S, S, C]."""
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
  """Resizes and normalises uint8 [B, H, W, C] for evaluation."""
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
  """Draws the parameters of all views of one example."""
  keys = jax.random.split(key, len(views))
  return [
      draw_params(keys[i], view, height, width) for i, view in enumerate(views)
  ]


def apply_views(
    image: jax.Array, drawn: Sequence[AugmentParams], views: Views, size: int
) -> jax.Array:
  """Makes the V views [V, size, size, C] of an example, all in [0, 1].

  The example is either a whole image [H, W, C], which is cropped here, or the
  crops [V, size, size, C] that the host has made.
  """
  pairs = list(zip(drawn, views, strict=True))
  if image.ndim == 4:
    return jnp.stack([
        colour(image[i], d, view) for i, (d, view) in enumerate(pairs)
    ])
  return jnp.stack([apply(image, d, view, size) for d, view in pairs])


def example_keys(key: jax.Array, count: int) -> jax.Array:
  """Returns the keys [count] of the examples, in global batch order."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def build(
    views: Views, data: ConfigDict, dtype: jnp.dtype = jnp.float32,
    micro_batches: MicroBatches = ONE_BATCH,
) -> Augment:
  """Returns f(images uint8, key) -> V views [B, V, S, S, C].

  S is `data.image_size`, and B is the global batch size. The images are whole,
  [B, H, W, C], or crops, [B, V, S, S, C].

  Args:
    views: the settings of each view.
    data: `config.data`.
    dtype: dtype of the views; the computation is in float32.
    micro_batches: how the batch is split while the views are made.
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
