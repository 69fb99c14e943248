"""Two augmented views of each image, made on the device inside the step.

Pure functions of (images, key). Every example draws from its own key, so what
it gets depends on its place in the global batch alone and not on the number of
devices. Resampling is a product with one small matrix per axis: on a TPU that
beats gathers.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def resize_matrix(
    in_size: int, out_size: int, start: jax.Array, length: jax.Array
) -> jax.Array:
  """Linear resampling of pixels [start, start + length) to `out_size` pixels.

  A triangle filter, widened where it shrinks the image (antialiasing), that
  sees nothing outside of the crop: the semantics of PIL's `resize(BILINEAR)`.

  Args:
    in_size, out_size: pixels along the axis before and after.
    start, length: of the crop, pixels, scalars; need not be whole.

  Returns:
    float32 [out_size, in_size]; each row sums to 1.
  """
  scale = length / out_size
  support = jnp.maximum(scale, 1.0)
  centre = start + (jnp.arange(out_size) + 0.5) * scale  # [out_size]
  pixel = jnp.arange(in_size)  # [in_size]
  distance = jnp.abs(pixel[None, :] + 0.5 - centre[:, None])
  weight = jnp.maximum(1.0 - distance / support, 0.0)
  inside = (pixel >= jnp.floor(start)) & (pixel < jnp.ceil(start + length))
  weight = jnp.where(inside[None, :], weight, 0.0)
  return weight / jnp.sum(weight, axis=1, keepdims=True)


def resample(
    image: jax.Array, box: tuple[jax.Array, ...], out_size: int
) -> jax.Array:
  """Cuts (top, left, height, width) from [H, W, C] and resizes to a square."""
  top, left, height, width = box
  rows = resize_matrix(image.shape[0], out_size, top, height)
  columns = resize_matrix(image.shape[1], out_size, left, width)
  # Full float32: TPU's and GPU's faster default would round pixels.
  return jnp.einsum(
      'ih,hwc,jw->ijc', rows, image, columns,
      precision=jax.lax.Precision.HIGHEST,
  )


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


def gray(image: jax.Array) -> jax.Array:
  """[H, W, C] to [H, W]: ITU-R 601 luma of RGB, or the one channel there is."""
  if image.shape[-1] == 1:
    return image[..., 0]
  return image @ jnp.asarray((0.299, 0.587, 0.114), image.dtype)


def adjust_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Multiplies pixels [H, W, C] in [0, 1] by `factor`, clipped."""
  return jnp.clip(image * factor, 0.0, 1.0)


def adjust_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Scales [H, W, C] in [0, 1] about its mean gray by `factor`, clipped."""
  mean = jnp.mean(gray(image))
  return jnp.clip(mean + factor * (image - mean), 0.0, 1.0)


def jitter(image: jax.Array, key: jax.Array, view: ConfigDict) -> jax.Array:
  """Brightness and contrast in random order, with `view.jitter_prob`."""
  k_apply, k_order, k_brightness, k_contrast = jax.random.split(key, 4)

  def factor(k, half_width):
    low = max(0.0, 1.0 - half_width)
    return jax.random.uniform(k, minval=low, maxval=1.0 + half_width)

  brighten = functools.partial(
      adjust_brightness, factor=factor(k_brightness, view.brightness)
  )
  contrast = functools.partial(
      adjust_contrast, factor=factor(k_contrast, view.contrast)
  )
  # Both orders and a select: cheaper than control flow on an accelerator.
  jittered = jnp.where(
      jax.random.bernoulli(k_order),
      contrast(brighten(image)),
      brighten(contrast(image)),
  )
  apply = jax.random.bernoulli(k_apply, view.jitter_prob)
  return jnp.where(apply, jittered, image)


def one_view(
    image: jax.Array, key: jax.Array, view: ConfigDict, size: int
) -> jax.Array:
  """Augments [H, W, C] in [0, 1] to [size, size, C] by one view's table."""
  k_crop, k_jitter, k_flip = jax.random.split(key, 3)
  area, ratio = (view.crop_min, 1.0), view.crop_ratio
  box = draw_crop(k_crop, *image.shape[:2], area, ratio)
  image = resample(image, box, size)
  image = jitter(image, k_jitter, view)
  flip = jax.random.bernoulli(k_flip, view.flip_prob)
  return jnp.where(flip, image[:, ::-1], image)


def to_float(images: jax.Array) -> jax.Array:
  """uint8 pixels to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def normalise(images: jax.Array, data: ConfigDict) -> jax.Array:
  """Subtracts `data.mean` and divides by `data.std`, a value a channel."""
  shape = (1,) * (images.ndim - 1) + (len(data.mean),)
  mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
  return (images - mean.reshape(shape)) / std.reshape(shape)


def whole_images(images: jax.Array, data: ConfigDict) -> jax.Array:
  """What evaluation sees: uint8 [B, H, W, C], resized whole, normalised."""
  height, width = images.shape[1:3]
  box = (0, 0, height, width)
  resize = functools.partial(resample, box=box, out_size=data.image_size)
  return normalise(jax.vmap(resize)(to_float(images)), data)


def build(augment: ConfigDict, data: ConfigDict) -> Augment:
  """Returns f(images uint8 [B, H, W, C], key) -> views float [B, 2, S, S, C].

  S is `data.image_size`. Example i draws from `fold_in(key, i)`, i its place
  in the global batch.
  """
  views = (augment.view1, augment.view2)

  def example(image, key):
    keys = jax.random.split(key, len(views))
    return jnp.stack([
        one_view(image, keys[v], view, data.image_size)
        for v, view in enumerate(views)
    ])

  def apply(images, key):
    positions = jnp.arange(len(images))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    return normalise(jax.vmap(example)(to_float(images), keys), data)

  return apply
