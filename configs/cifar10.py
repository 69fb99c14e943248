"""MoCo v3 on CIFAR-10: ViT-Ti with 4x4 patches, 32 pixels.

This is not a row of the paper but its ViT recipe (section 5), adapted to small
images. What differs, and why:
  - ViT-Ti, 64 patches of 4x4 pixels; a batch of 512 for one device, with the
    paper's rule for the learning rate (per 256 images).
  - No blur, which wipes out images of this size (SimCLR, arXiv 2002.05709,
    appendix B.9, leaves it out on CIFAR-10). Crops are as in SimCLR, and are
    made on the device, since all images have one size.
  - Heads 1024 wide and 200 epochs, 20 of them warm-up.
  - AdamW at 5e-4 per 256 images with b2 0.95: a higher rate and a shorter
    memory than the paper's, for a run of 19,400 steps. Chosen by analogy with
    configs/digits.py, not tuned.

TFDS has to prepare the data set once, and needs TensorFlow for that (not for
training). If the data set is missing, the command says what to type.

Command:
  python -m mocov3_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
Hardware and time: one GPU or TPU chip; not measured.
Expected: not measured.
"""

from mocov3_jax.config import default_config


def get_config():
  c = default_config()
  c.batch_size = 512
  c.data.source = 'tfds:cifar10'
  c.data.image_size = 32
  # Measured on the training images.
  c.data.mean = (0.4914, 0.4822, 0.4465)
  c.data.std = (0.2470, 0.2435, 0.2616)
  for view in (c.augment.view1, c.augment.view2):
    view.blur_prob = 0.0
  c.model.name = 'vit_ti'
  c.model.patch_size = 4
  c.head.hidden_dim = 1024
  c.optimizer.lr_per_256 = 5e-4
  c.optimizer.b2 = 0.95
  c.schedule.epochs = 200.0
  c.schedule.warmup_epochs = 20.0
  c.knn.every_steps = 500
  return c
