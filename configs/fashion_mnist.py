"""MoCo v3 on Fashion-MNIST: a standard benchmark that a laptop can run.

60,000 training and 10,000 test images, 28x28 gray, of ten kinds of clothes
(Xiao et al. 2017, arXiv 1708.07747). This is not a row of the paper but its ViT
recipe (section 5), adapted to small gray images. What differs, and why:
  - A small ViT, 128 wide and 2 blocks deep, so that a run takes an hour on a
    CPU. It has 16 tokens of 8x8 pixels; the views are 32x32 pixels.
  - A convolutional stem, which learns faster than a projection of patches, and
    the normalised mean of all tokens as the feature.
  - Only crops, flips, brightness and contrast: images are gray, and a blur
    would wipe them out. Brightness and contrast vary twice as much, since they
    say little about the kind of clothing.
  - AdamW at 2e-3 per 256 images with b2 0.95: a higher rate and a shorter
    memory than the paper's, for a run of few steps.

The four IDX files are read from the folder after the colon. Without one, it is
that of Debian's package: apt-get install dataset-fashion-mnist. A set that TFDS
has prepared works as well: --config.data.source=tfds:fashion_mnist.

Command:
  python -m mocov3_jax.train --config=configs/fashion_mnist.py:/path/to/idx \\
      --workdir=runs/fashion
Hardware and time: one CPU core, 50 minutes (200 images per second, with another
  such run on the same machine).
Expected: kNN accuracy 0.853, 0.858 and 0.859 with k = 5, seeds 0, 1 and 2
  (random network 0.771, 0.782, 0.771); see docs/fashion-mnist.md.
"""

from mocov3_jax.config import default_config

DEBIAN = '/usr/share/datasets/fashion-mnist'


def get_config(folder=DEBIAN):
  c = default_config()
  c.batch_size = 256
  c.data.source = f'idx:{folder}'
  c.data.image_size = 32
  # Measured on the training images.
  c.data.mean = (0.286,)
  c.data.std = (0.353,)
  for view in (c.augment.view1, c.augment.view2):
    view.crop_min = 0.2
    view.brightness = view.contrast = 0.8
    view.saturation = view.hue = 0.0
    view.gray_prob = view.blur_prob = view.solarize_prob = 0.0
  c.model.name = 'vit_ti'
  c.model.patch_embed = 'conv'
  c.model.patch_size = 8
  c.model.dim = 128
  c.model.depth = 2
  c.model.num_heads = 4
  c.model.readout = 'norm_pool'
  c.head.hidden_dim = 512
  c.head.out_dim = 128
  c.optimizer.lr_per_256 = 2e-3
  c.optimizer.b2 = 0.95
  c.schedule.epochs = 10.0
  c.schedule.warmup_epochs = 1.0
  c.knn.k = 5
  c.knn.every_steps = 1170
  return c
