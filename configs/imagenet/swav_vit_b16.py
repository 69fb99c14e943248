"""SwAV with ViT-B/16 on ImageNet: the paper's section 4.2 and table 4.

AdamW, batch 4096, 100 epochs, 40 of them warm-up, frozen random patch
projection, two crops of 224 pixels, no BatchNorm in the heads (appendix A).
The paper gives neither the learning rate nor the weight decay for SwAV. Here
the rate is that of its BYOL row, 1e-4 per 256 images, and the decay that of its
SimCLR row, 0.1. From SwAV's own paper (arXiv 2006.09882) come 3000 prototypes,
temperature 0.1, and codes with epsilon 0.05 from 3 iterations. The projector is
MoCo v3's (3 layers, 4096 wide, 256 out). Weight decay applies to the prototypes
as well. SwAV's multi-crop, its queue, and freezing the prototypes during the
first epoch are left out.

Command:
  python -m mocov3_jax.train --config=configs/imagenet/swav_vit_b16.py \\
      --workdir=runs/swav
  With a learned projection: --config.model.patch_embed=learned.
Hardware and time: not stated for this row. Not run by this project.
Expected: linear probe 65.8 with a learned projection, 66.4 frozen (paper, 100
  epochs, the largest stable rate); 71.6 after 300. When it is unstable, its
  loss becomes NaN. Not reproduced by this project.
"""

from mocov3_jax.config import default_config


def get_config(epochs='100'):
  c = default_config()
  c.objective.name = 'swav'
  c.objective.temperature = 0.1
  c.head.predictor_layers = 0
  c.head.prototypes = 3000
  c.head.projector_out_bn = c.head.hidden_bn = False
  c.data.source = 'tfds:imagenet2012'
  c.model.name = 'vit_b'
  c.model.dtype = 'bfloat16'
  c.optimizer.lr_per_256 = 1e-4
  c.optimizer.weight_decay = 0.1
  c.schedule.epochs = float(epochs)
  c.knn.every_steps = 100
  return c
