"""MoCo v3 on any folder of images, labelled or not, on one device.

This is not a row of the paper but its ViT-S/16 recipe (section 5, 224 pixels,
frozen random patch projection) with a batch that fits on one accelerator. What
differs, and why:
  - Batch 256 instead of 4096; the learning rate per 256 images is the paper's,
    so the peak is 1.5e-4. The smallest batch of the paper, 1024, is 0.7 points
    worse than 4096 (figure 1).
  - Heads 1024 wide instead of 4096, for the smaller batch.
  - 100 epochs, 10 of them warm-up. Use more for fewer than about 50,000 images:
    --config.schedule.epochs=800.
  - bfloat16, and each block is recomputed in the backward pass, so that the
    batch fits on a small accelerator; docs/data.md says how much memory it
    takes.
  - The kNN monitor has a bank of 5,000 images, and classifies 1,000.

`folder.py:small:PATH` is for a few hundred photos and a machine without an
accelerator: 48 pixels, a ViT of 4 blocks of width 128 on 8-pixel patches, batch
64. As in configs/digits.py, runs of few steps need a higher rate and a shorter
memory of AdamW. Crops take at least 20 % of the photo, and are not blurred,
since blur wipes out images of this size.

Command:
  python -m mocov3_jax.train --config=configs/folder.py:/my/photos \\
      --workdir=runs/photos
  The part after the colon is the folder. To see what the run will see:
  python -m mocov3_jax.preview --config=configs/folder.py:/my/photos \\
      --out=views.png
Hardware and time: one GPU or TPU chip; not measured at full size. `small`: two
  CPU cores, minutes (docs/data.md).
Expected: depends on the photos; not measured at full size.
"""

from mocov3_jax.config import default_config

SMALL = 'small:'


def get_config(path=''):
  c = default_config()
  c.data.source = f'folder:{path.removeprefix(SMALL)}'
  c.schedule.epochs = 100.0
  c.schedule.warmup_epochs = 10.0
  if path.startswith(SMALL):
    return small(c)
  c.batch_size = 256
  c.model.dtype = 'bfloat16'
  c.model.remat = True
  c.head.hidden_dim = 1024
  c.knn.every_steps = 100
  c.knn.bank_images = 5_000
  c.knn.query_images = 1_000
  return c


def small(c):
  c.batch_size = 64
  c.data.image_size = 48
  for view in (c.augment.view1, c.augment.view2):
    view.crop_min = 0.2
    view.blur_prob = 0.0
  c.model.name = 'vit_ti'
  c.model.patch_size = 8
  c.model.dim = 128
  c.model.depth = 4
  c.model.num_heads = 4
  c.head.hidden_dim = 512
  c.head.out_dim = 128
  c.optimizer.lr_per_256 = 4e-3
  c.optimizer.b2 = 0.95
  c.knn.every_steps = 25
  return c
