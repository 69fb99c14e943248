"""The paper's instability on digits, in minutes: kNN that falls, and spikes.

This is a small version of section 4 of the paper: a ViT of width 64 on 8x8
digits instead of ViT-B on ImageNet, with the network and the views of
configs/digits.py. AdamW has the paper's b2 of 0.999, that is, a memory of 1,000
steps. A run is four times as long, 4,000 steps, with the paper's share of
warm-up, 40 %. The peak rate is 0.1 per 256 images, and the patch projection is
learned. The run logs the gradients and the updates of every block, and kNN
every 20 steps.
A name after a colon selects another method: instability.py:simclr, :byol or
:swav.

Command:
  python -m mocov3_jax.train --config=configs/instability.py \\
      --workdir=runs/learned
  python -m mocov3_jax.train --config=configs/instability.py \\
      --config.model.patch_embed=frozen --workdir=runs/frozen
  python -m mocov3_jax.report runs/learned runs/frozen --out=instability.html
Hardware and time: 2 CPU cores, eight minutes a run.
Expected: with seed 0, kNN accuracy ends at 0.300 with the learned projection
  and at 0.950 with the frozen one. The random network has 0.831. See
  docs/study.md.
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
  c.model.patch_embed = 'learned'
  c.head.hidden_dim = 512
  c.head.out_dim = 128
  c.optimizer.lr_per_256 = 0.1
  c.schedule.epochs = 800.0
  c.schedule.warmup_epochs = 320.0
  c.knn.every_steps = 20
  c.log.blocks = c.log.updates = True
  return c
