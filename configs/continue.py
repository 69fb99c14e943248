"""Continues pre-training from a checkpoint, on other images.

This is not a row of the paper. It uses the recipe and the network of the
checkpoint, and starts from its backbone. What differs, and why
(docs/continue.md):
  - New heads learn alone for a fifth of the training. Without that, the
    features lose accuracy before they gain any.
  - Each block learns at 0.65 of the rate of the block above it. A ResNet,
    which has no such option, gets a quarter of the checkpoint's rate.
  - A batch of at most 256, since a user's own data sets are often small.

The checkpoint is named after the colon: a workdir (of a run, or written by
`convert`), one of its folders checkpoints/<step>, or timm:FOLDER. The images
are those of its run unless data.source names others.

Command:
  python -m mocov3_jax.train --config=configs/continue.py:runs/vit_s \\
      --config.data.source=folder:/my/photos --workdir=runs/continued
Hardware and time: those of the checkpoint's recipe. Tiles of photographs
  (docs/continue.md): one CPU core, three minutes for 40 epochs.
Expected: kNN accuracy at step 0 is that of the checkpoint, and then falls by no
  more than a point. On these tiles it is 0.874 at step 0, at least 0.870 in all
  of three seeds, and 0.880 at the end, where training from scratch for as long
  reaches 0.852.
"""

from mocov3_jax.training import initial


def get_config(checkpoint=''):
  c = initial.config_of(checkpoint)
  c.init.checkpoint = checkpoint
  c.batch_size = min(c.batch_size, 256)
  if c.model.name.startswith('vit'):
    c.optimizer.layer_decay = 0.65
  else:
    c.optimizer.lr_per_256 /= 4
  c.schedule.steps = 0
  c.schedule.epochs = 100.0
  c.schedule.warmup_epochs = 10.0
  c.init.freeze_backbone_epochs = 20.0
  return c
