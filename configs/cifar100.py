"""MoCo v3 on CIFAR-100, 32x32 pixels, on one device.

This is not a row of the paper but configs/cifar10.py with the data and the
normalisation of CIFAR-100. The docstring there says what differs from the
paper's recipe, and why.

Command:
  python -m mocov3_jax.train --config=configs/cifar100.py \\
      --workdir=runs/cifar100
Hardware and time: one GPU or TPU chip; not measured.
Expected: not measured.
"""

from mocov3_jax.config import default_config


def get_config():
  c = default_config()
  c.batch_size = 512
  c.data.source = 'tfds:cifar100'
  c.data.image_size = 32
  # Measured on the training images.
  c.data.mean = (0.5071, 0.4865, 0.4409)
  c.data.std = (0.2673, 0.2564, 0.2762)
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
