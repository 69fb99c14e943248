"""Operations on images, as pure functions of pixels in [0, 1].

Resampling and blurring multiply by one small matrix per axis, which is faster
than gathers on a TPU. Random choices are selects, not control flow.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

# The adjustments of the colour jitter, with the numbers of torchvision.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# Radius of the blur in pixels: four times the largest sigma (2).
BLUR_REACH = 8


def resize_matrix(
    in_size: int, out_size: int, start: jax.Array, length: jax.Array
) -> jax.Array:
  """Returns a matrix that linearly resamples [start, start + length).

  It is a triangle filter that is widened if it shrinks the image (antialiasing)
  and ignores pixels outside of the crop, like PIL's `resize(BILINEAR)`.

  Args:
    in_size, out_size: pixels along the axis before and after.
    start, length: the crop in pixels; scalars that need not be whole numbers.

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
  """Crops (top, left, height, width) of [H, W, C]; resizes it to a square."""
  top, left, height, width = box
  rows = resize_matrix(image.shape[0], out_size, top, height)
  columns = resize_matrix(image.shape[1], out_size, left, width)
  # Full float32: the faster default of TPUs and GPUs would round the pixels.
  return jnp.einsum(
      'ih,hwc,jw->ijc', rows, image, columns,
      precision=jax.lax.Precision.HIGHEST,
  )


def gray(image: jax.Array) -> jax.Array:
  """Maps [H, W, C] to [H, W, 1]: ITU-R 601 luma for RGB, else the mean."""
  if image.shape[-1] != 3:
    return jnp.mean(image, axis=-1, keepdims=True)
  luma = jnp.asarray((0.299, 0.587, 0.114), image.dtype)
  return jnp.sum(image * luma.reshape(1, 1, 3), axis=-1, keepdims=True)


def blend(image: jax.Array, op: jax.Array, factor: jax.Array) -> jax.Array:
  """Changes brightness, contrast or saturation by blending with a gray image.

  Args:
    image: [H, W, C] in [0, 1].
    op: BRIGHTNESS blends with black, CONTRAST with the mean gray, SATURATION
      with the image in gray. It is a traced scalar, so the choice is a select.
    factor: weight of the image; 1 changes nothing, above 1 moves away from the
      gray image.

  Returns:
    [H, W, C], clipped to [0, 1].
  """
  luma = gray(image)
  other = jnp.where(op == SATURATION, luma, jnp.mean(luma))
  other = jnp.where(op == BRIGHTNESS, 0.0, other)
  return jnp.clip(factor * image + (1 - factor) * other, 0.0, 1.0)


def shift_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
  """Rotates the hue of [H, W, C] in [0, 1] by `shift` colour circles.

  Images that are not RGB have no hue and are returned unchanged.
  """
  if image.shape[-1] != 3:
    return image
  r, g, b = image[..., 0], image[..., 1], image[..., 2]
  value = jnp.max(image, axis=-1)
  chroma = value - jnp.min(image, axis=-1)
  safe = jnp.where(chroma > 0, chroma, 1.0)
  sector = jnp.where(
      value == r, (g - b) / safe,
      jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
  )
  sector = sector + 6 * shift

  def channel(offset):
    k = jnp.mod(offset + sector, 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def jitter(
    image: jax.Array, order: jax.Array, factors: jax.Array
) -> jax.Array:
  """Applies torchvision's ColorJitter: four adjustments in the given order.

  Under `vmap`, every branch of a choice is computed. So the hue is computed
  only once, between the blends before it and those after it.

  Args:
    image: [H, W, C] in [0, 1].
    order: int [4], a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE.
    factors: [4], indexed by adjustment; the last one is the hue shift.
  """
  hue_at = jnp.argmax(order == HUE)

  def blends(image, stages):
    for i, wanted in stages:
      blended = blend(image, order[i], factors[order[i]])
      image = jnp.where(wanted, blended, image)
    return image

  image = blends(image, [(i, i < hue_at) for i in (0, 1, 2)])
  image = shift_hue(image, factors[HUE])
  return blends(image, [(i, i > hue_at) for i in (1, 2, 3)])


def blur_matrix(size: int, sigma: jax.Array) -> jax.Array:
  """Returns a matrix that applies a Gaussian blur along one axis.

  Pixels at the edges are repeated outwards.

  Args:
    size: pixels along the axis.
    sigma: standard deviation in pixels, above 0.

  Returns:
    float32 [size, size]; each row sums to 1.
  """
  reach = BLUR_REACH
  pixel = jnp.arange(size)[:, None]
  source = jnp.arange(-reach, size + reach)[None, :]
  weight = jnp.exp(-0.5 * ((pixel - source) / sigma) ** 2)
  weight = weight / jnp.sum(weight, axis=1, keepdims=True)
  inner = weight[:, reach:-reach]
  left, right = weight[:, :reach].sum(axis=1), weight[:, -reach:].sum(axis=1)
  return inner.at[:, 0].add(left).at[:, -1].add(right)


def blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
  """Blurs [H, W, C] with a Gaussian of `sigma` pixels."""
  return jnp.einsum(
      'ih,hwc,jw->ijc',
      blur_matrix(image.shape[0], sigma), image,
      blur_matrix(image.shape[1], sigma),
      precision=jax.lax.Precision.HIGHEST,
  )


def solarize(image: jax.Array) -> jax.Array:
  """Inverts the pixels in [0, 1] whose byte value is 128 or more."""
  return jnp.where(image < 127.5 / 255, image, 1 - image)


def to_float(images: jax.Array) -> jax.Array:
  """Maps uint8 pixels to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def normalise(images: jax.Array, data: ConfigDict) -> jax.Array:
  """Subtracts `data.mean` and divides by `data.std`, per channel."""
  shape = (1,) * (images.ndim - 1) + (len(data.mean),)
  mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
  return (images - mean.reshape(shape)) / std.reshape(shape)
