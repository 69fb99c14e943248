"""MoCo v3 on scikit-learn's 8x8 digits: the whole method in minutes on a CPU.
"""

from mocov3_jax.config import default_config


def get_config():
  c = default_config()
  with c.unlocked():
    c.batch_size = 256
    c.data.image_size = 8
    c.data.mean = (0.305,)
    c.data.std = (0.376,)
    c.model.name = 'vit_ti'
    c.model.patch_size = 2
    c.model.dim = 64
    c.model.depth = 4
    c.model.num_heads = 4
    c.head.hidden_dim = 256
    c.head.out_dim = 64
    for view in (c.augment.view1, c.augment.view2):
      view.flip_prob = 0.0
      view.crop_min = 0.4
    c.optimizer.lr_per_256 = 4e-3
    c.schedule.epochs = 60.0
    c.schedule.warmup_epochs = 6.0
    c.save.every_steps = 100
  return c
