"""MoCo v3 on 1,797 handwritten digits: the whole method in minutes.

The data (scikit-learn's 8x8 digits, 17 gray levels) is not in the paper. The
method is a small version of its ViT recipe (section 5): frozen random patch
projection, AdamW, warm-up and half-cycle cosine. What differs, and why:
  - Four patches of 4x4 pixels, width 64, four blocks, to fit the data.
  - Both views have the same augmentation: crops, brightness and contrast only.
    There is no colour, a blur does not fit into 8 pixels, and a mirrored digit
    is a different symbol. Crops take 40 % or more of the image, since a smaller
    part of a digit is often not recognisable. They are stretched by a factor of
    up to two, as handwriting is.
  - Only 800 steps, hence a higher learning rate, and b2 0.95 for AdamW instead
    of 0.999, which would average over more steps than there are.

A name after a colon selects another method with the same network and rate:
digits.py:simclr; digits.py:byol (heads without output BatchNorms, as in the
paper's appendix A for ViT); digits.py:swav (100 prototypes, codes of epsilon
0.03 instead of 0.05, no output BatchNorm). The appendix uses no BatchNorm at
all in SwAV's heads with ViT; on digits the loss then stays at chance, see
docs/short-runs.md.

Command:
  python -m mocov3_jax.train --config=configs/digits.py --workdir=runs/digits
Hardware and time: 2 CPU cores, about a minute and a half.
Expected: kNN accuracy 0.83 to 0.87 at random initialisation, 0.964 to 0.981 at
  the end (five seeds, 0 to 4; the standard error of such a number is 0.01).
  With half of the epochs, means of three seeds: MoCo v3 0.953, simclr 0.968,
  byol 0.919, swav 0.963 (docs/what-normal-looks-like.md).
"""

from mocov3_jax.config import default_config


def get_config(objective='moco_v3'):
  c = default_config()
  c.objective.name = objective
  if objective == 'simclr':
    c.head.predictor_layers = 0
  if objective == 'byol':
    c.head.projector_out_bn = c.head.predictor_out_bn = False
  if objective == 'swav':
    c.head.projector_out_bn = False
    c.head.predictor_layers = 0
    c.head.prototypes = 100
    c.objective.temperature = 0.1
    c.objective.sinkhorn_epsilon = 0.03
  c.batch_size = 256
  c.data.source = 'digits'
  c.data.image_size = 8
  c.data.mean = (0.305,)
  c.data.std = (0.376,)
  for view in (c.augment.view1, c.augment.view2):
    view.crop_min = 0.4
    view.crop_ratio = (1 / 2, 2.0)
    view.saturation = view.hue = 0.0
    view.gray_prob = view.blur_prob = view.solarize_prob = 0.0
    view.flip_prob = 0.0
  c.model.name = 'vit_ti'
  c.model.patch_size = 4
  c.model.dim = 64
  c.model.depth = 4
  c.model.num_heads = 4
  c.head.hidden_dim = 512
  c.head.out_dim = 128
  c.optimizer.lr_per_256 = 4e-3
  c.optimizer.b2 = 0.95
  c.schedule.epochs = 160.0
  c.schedule.warmup_epochs = 10.0
  c.knn.every_steps = 25
  c.save.every_steps = 100
  return c
