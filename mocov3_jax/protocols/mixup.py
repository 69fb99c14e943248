"""Mixed examples with soft labels, for fine-tuning by the recipe of DeiT.

DeiT is Touvron et al. 2021 (arXiv 2012.12877), whose Table 9 combines all of
these augmentations. They are pure functions on the device. Images are float and
normalised, so erased boxes are filled with noise of the same mean and spread.
"""

import functools
import math

import jax
import jax.numpy as jnp

# (top, left, height, width), int32 scalars, whole pixels.
Box = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

# Random erasing: number of tries for a box, and the ranges of its share of the
# image and of its height / width. Zhong et al. 2020 (arXiv 1708.04896) use
# areas up to 0.4; 1/3 and the noise are those of the implementation that DeiT
# used (timm's documentation).
TRIES = 10
AREA = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)


def smooth(
    labels: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
  """Returns (1 - s) * one_hot + s / C (Szegedy et al. 2016, section 7).

  Args:
    labels: int [B], in [0, num_classes), or -1 where unknown.
    num_classes: C.
    smoothing: s, in [0, 1); 0 gives the one-hot labels.

  Returns:
    float32 [B, C]; a row sums to 1, or is all zero where the label is unknown.
  """
  sharp = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  soft = (1 - smoothing) * sharp + smoothing / num_classes
  return jnp.where(labels[:, None] >= 0, soft, 0.0)


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy of the rows that have a (soft) target.

  Args:
    logits: [B, C], any float.
    targets: [B, C]; rows of zeros are left out. A row that sums to less than
      1, mixed from a known and an unknown label, weighs that much less.

  Returns:
    Scalar in nats, float32 or wider; 0 if no row has a target.
  """
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  log_p = jax.nn.log_softmax(logits.astype(dtype), axis=1)
  rows = -jnp.sum(targets * log_p, axis=1)
  counts = jnp.any(targets != 0, axis=1)
  total = jnp.sum(jnp.where(counts, rows, 0.0))
  return total / jnp.maximum(jnp.sum(counts), 1)


def mixup(
    images: jax.Array, targets: jax.Array, lam: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Blends each example with its partner (Zhang et al. 2018, 1710.09412).

  The partner is the example in the same place of the reversed batch.

  Args:
    images: [B, H, W, C], any float.
    targets: [B, classes].
    lam: share of the example itself, scalar in [0, 1].

  Returns:
    (images, targets), of the shapes and dtypes given.
  """
  return _blend(images, lam), _blend(targets, lam)


def cutmix(
    images: jax.Array, targets: jax.Array, box: Box
) -> tuple[jax.Array, jax.Array]:
  """Takes a box of each image from its partner (Yun et al. 2019, 1905.04899).

  The partner is the example in the same place of the reversed batch.

  Args:
    images: [B, H, W, C].
    targets: [B, classes]; mixed by the share of pixels outside of the box.
    box: within the image; may be empty.

  Returns:
    (images, targets), of the shapes and dtypes given.
  """
  height, width = images.shape[1:3]
  inside = box_mask(box, height, width)[None, :, :, None]
  lam = 1 - box[2] * box[3] / (height * width)
  return jnp.where(inside, images[::-1], images), _blend(targets, lam)


def _blend(x: jax.Array, lam: jax.Array) -> jax.Array:
  # `lam` is float32, so bfloat16 images are blended in float32, too.
  return (lam * x + (1 - lam) * x[::-1]).astype(x.dtype)


def box_mask(box: Box, height: int, width: int) -> jax.Array:
  """Returns bool [height, width], true inside of the box."""
  top, left, box_height, box_width = box
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
  inside_rows = (rows >= top) & (rows < top + box_height)
  return inside_rows & (columns >= left) & (columns < left + box_width)


def draw_cut(key: jax.Array, height: int, width: int, lam: jax.Array) -> Box:
  """Draws the box of `cutmix`.

  Its centre is uniform over the image, and its sides are sqrt(1 - lam) times
  the image's. What lies outside the image is cut off, and then the edges are
  rounded (the pseudo-code of Yun et al. 2019).

  Args:
    key: random key of this batch.
    height, width: size of the images, pixels.
    lam: share of pixels to keep, scalar in [0, 1].
  """
  centre = jax.random.uniform(key, (2,))
  size = jnp.asarray((height, width), jnp.float32)
  half = size * jnp.sqrt(1 - lam) / 2
  edge = lambda place: jnp.round(jnp.clip(place, 0, size)).astype(jnp.int32)
  low, high = edge(size * centre - half), edge(size * centre + half)
  return low[0], low[1], high[0] - low[0], high[1] - low[1]


def mix(
    images: jax.Array, targets: jax.Array, key: jax.Array,
    mixup_alpha: float, cutmix_alpha: float,
) -> tuple[jax.Array, jax.Array]:
  """Mixes a batch with its reverse, by `mixup` or `cutmix`, as DeiT does.

  One choice and one lambda ~ Beta(alpha, alpha) serve the whole batch. With
  both alphas above 0, each of the two has probability 1/2. DeiT uses 0.8 and
  1.0.

  Args:
    images: [B, H, W, C], any float; the global batch.
    targets: [B, classes], from `smooth`.
    key: random key of this step.
    mixup_alpha, cutmix_alpha: Python numbers; 0 switches one off. With both
      off the arguments are returned as they are.

  Returns:
    (images, targets), of the shapes and dtypes given.
  """
  if not mixup_alpha and not cutmix_alpha:
    return images, targets
  k_choice, k_lam, k_box = jax.random.split(key, 3)
  # With one of them off, the choice is fixed.
  chance = 0.5 if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
  cuts = jax.random.bernoulli(k_choice, chance)
  alpha = jnp.where(cuts, cutmix_alpha, mixup_alpha)
  lam = jax.random.beta(k_lam, alpha, alpha)
  box = draw_cut(k_box, *images.shape[1:3], lam)
  if not cutmix_alpha:
    return mixup(images, targets, lam)
  if not mixup_alpha:
    return cutmix(images, targets, box)
  return jax.tree.map(
      functools.partial(jnp.where, cuts),
      cutmix(images, targets, box), mixup(images, targets, lam),
  )


def draw_erasure(
    key: jax.Array, height: int, width: int
) -> tuple[Box, jax.Array]:
  """Draws the box of `erase`.

  Makes ten tries (area uniform in AREA, height / width log-uniform in RATIO)
  and takes the first box that fits. Its place is uniform over those where it
  fits.

  Args:
    key: random key of this example.
    height, width: size of the image, pixels.

  Returns:
    The box, and a bool scalar: whether any try fitted.
  """
  k_area, k_ratio, k_place = jax.random.split(key, 3)
  tries = functools.partial(jax.random.uniform, shape=(TRIES,))
  pixels = height * width * tries(k_area, minval=AREA[0], maxval=AREA[1])
  log_low, log_high = map(math.log, RATIO)
  aspect = jnp.exp(tries(k_ratio, minval=log_low, maxval=log_high))
  h = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)  # [TRIES]
  w = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
  fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
  first = jnp.argmax(fits)
  h, w = h[first], w[first]
  room = jnp.stack([height - h, width - w])
  # If nothing fits there may be no room at all; the box is then not used.
  place = jax.random.randint(k_place, (2,), 0, jnp.maximum(room, 0) + 1)
  return (place[0], place[1], h, w), fits[first]


def erase(images: jax.Array, keys: jax.Array, prob: float) -> jax.Array:
  """Fills a random box of some images with noise (Zhong et al. 2020).

  The noise is N(0, 1), drawn for each pixel and channel. If no drawn box fits
  an image, the image stays as it is.

  Args:
    images: [B, H, W, C], any float, normalised.
    keys: [B], one random key per example; its erasure depends on this key only.
    prob: probability for each image, a Python number; with 0 the images are
      returned as they are. DeiT uses 0.25.

  Returns:
    The images, of the shape and dtype given.
  """
  if not prob:
    return images

  def example(image, key):
    k_happens, k_box, k_noise = jax.random.split(key, 3)
    box, fits = draw_erasure(k_box, *image.shape[:2])
    happens = fits & jax.random.bernoulli(k_happens, prob)
    erased = happens & box_mask(box, *image.shape[:2])
    noise = jax.random.normal(k_noise, image.shape).astype(image.dtype)
    return jnp.where(erased[:, :, None], noise, image)

  return jax.vmap(example)(images, keys)
