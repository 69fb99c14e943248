"""The paper's instability in minutes: digits at too high a learning rate.

This is a small version of section 4 of the paper: a ViT of width 64 on 8x8
digits instead of ViT-B on ImageNet. It uses the network and the views of
configs/digits.py; AdamW with the paper's b2 of 0.999; 72 epochs of 5 steps, a
tenth of them warm-up; and a learned patch projection. It logs the gradients of
every block, and kNN every ten steps. It is meant to be run as a sweep.

Command:
  python -m mocov3_jax.sweep --config=configs/digits_instability.py \\
      --grid optimizer.lr_per_256=0.003,0.01,0.03,0.1 \\
      --grid model.patch_embed=learned,frozen --seeds=3 \\
      --workdir=runs/instability
  python -m mocov3_jax.report runs/instability --out=instability.html
Hardware and time: 2 CPU cores, about a minute a run.
Expected: kNN accuracy 0.94 to 0.95 with both projections at rates 0.003 and
  0.01; learned 0.926, frozen 0.943 at 0.03; learned 0.790, frozen 0.892 at 0.1.
  The random network has 0.843 (means of three seeds; docs/study.md).
"""

from mocov3_jax.config import default_config


def get_config():
  c = default_config()
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
  c.model.patch_embed = 'learned'
  c.head.hidden_dim = 512
  c.head.out_dim = 128
  c.optimizer.lr_per_256 = 0.03
  c.schedule.epochs = 72.0
  c.schedule.warmup_epochs = 7.2
  c.knn.every_steps = 10
  c.log.blocks = True
  return c
