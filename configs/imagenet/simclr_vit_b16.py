"""SimCLR with ViT-B/16 on ImageNet: the paper's figure 6.

Section 4.2: AdamW, batch 4096, learning rate 2e-4 per 256 images, weight
decay 0.1, 100 epochs, 40 of them warm-up, frozen random patch projection.
The paper gives neither the temperature nor the projector of this row; here they
are those of MoCo v3 (0.2; three layers), without the predictor.

Command:
  python -m mocov3_jax.train --config=configs/imagenet/simclr_vit_b16.py \\
      --workdir=runs/simclr
  With a learned projection: --config.model.patch_embed=learned.
Hardware and time: not stated for this row. Not run by this project.
Expected: linear probe 69.3 with a learned projection, 70.1 frozen (paper).
  Not reproduced by this project.
"""

from mocov3_jax.config import default_config


def get_config(epochs='100'):
  c = default_config()
  c.objective.name = 'simclr'
  c.head.predictor_layers = 0
  c.data.source = 'tfds:imagenet2012'
  c.model.name = 'vit_b'
  c.model.dtype = 'bfloat16'
  c.optimizer.lr_per_256 = 2e-4
  c.optimizer.weight_decay = 0.1
  c.schedule.epochs = float(epochs)
  c.knn.every_steps = 100
  return c
