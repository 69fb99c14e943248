"""MoCo v3 on 2,106 photo tiles: a harder data set than digits, for the study.

This is not a row of the paper but a small version of its ViT recipe (section
5), for the 32x32 tiles of fourteen pictures that `mocov3_jax.data.photo_tiles`
cuts. It is like configs/digits.py, but with colour: 16 patches of 8x8 pixels,
the paper's jitter and grayscale, crops of 20 % and more, and flips. There is no
blur, which wipes out images of this size.

Command:
  pip install -e '.[photos]'
  python -m mocov3_jax.data.photo_tiles runs/photo_tiles
  python -m mocov3_jax.train --config=configs/photo_tiles.py \\
      --workdir=runs/photo
Hardware and time: 2 CPU cores, about two minutes for 40 epochs.
Expected: with seed 0, kNN accuracy 0.716 at random initialisation and 0.813
  after 80 epochs. After 40 epochs 0.792 to 0.812, over rates and seeds, with b2
  0.999 (docs/short-runs.md).
"""

from mocov3_jax.config import default_config


def get_config(path='runs/photo_tiles'):
  c = default_config()
  c.batch_size = 256
  c.data.source = f'folder:{path}'
  c.data.image_size = 32
  for view in (c.augment.view1, c.augment.view2):
    view.crop_min = 0.2
    view.blur_prob = 0.0
  c.model.name = 'vit_ti'
  c.model.patch_size = 8
  c.model.dim = 64
  c.model.depth = 4
  c.model.num_heads = 4
  c.head.hidden_dim = 512
  c.head.out_dim = 128
  c.optimizer.lr_per_256 = 4e-3
  c.optimizer.b2 = 0.95
  c.schedule.epochs = 80.0
  c.schedule.warmup_epochs = 8.0
  c.knn.every_steps = 20
  return c
