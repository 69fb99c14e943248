"""BYOL with ViT-B/16 on ImageNet: the paper's figure 6.

Section 4.2: AdamW, batch 4096, learning rate 1e-4 per 256 images, weight
decay 0.03, 100 epochs, 40 of them warm-up, frozen random patch projection.
There is no BatchNorm on the outputs of the heads (appendix A). The paper gives
no target momentum for this row; here it rises from 0.99 by a half cosine to 1,
as in MoCo v3.

Command:
  python -m mocov3_jax.train --config=configs/imagenet/byol_vit_b16.py \\
      --workdir=runs/byol
  With a learned projection: --config.model.patch_embed=learned.
Hardware and time: not stated for this row. Not run by this project.
Expected: linear probe 69.7 with a learned projection, 71.0 frozen (paper).
  Not reproduced by this project.
"""

from mocov3_jax.config import default_config


def get_config(epochs='100'):
  c = default_config()
  c.objective.name = 'byol'
  c.head.projector_out_bn = c.head.predictor_out_bn = False
  c.data.source = 'tfds:imagenet2012'
  c.model.name = 'vit_b'
  c.model.dtype = 'bfloat16'
  c.optimizer.lr_per_256 = 1e-4
  c.optimizer.weight_decay = 0.03
  c.schedule.epochs = float(epochs)
  c.knn.every_steps = 100
  return c
