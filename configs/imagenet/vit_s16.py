"""ViT-S/16 on ImageNet: the paper's "ViT-S" (table 4, section 6.2).

The recipe of section 5: AdamW, batch 4096, learning rate 1.5e-4 per 256 images,
weight decay 0.1, 40 epochs of warm-up, half-cycle cosine, frozen random patch
projection, temperature 0.2. The momentum of the target network (a half cosine
from 0.99 to 1) and the weight decay of 0.1 are those of the paper's PyTorch
release. (The paper's table gives 0.99 as the default momentum, but does not say
how it changes.)

ViT-S has 12 heads here, as in the paper, where DeiT's has 6.

Command:
  python -m mocov3_jax.train --config=configs/imagenet/vit_s16.py \\
      --workdir=runs/vit_s16
  A number after a colon sets the epochs: vit_s16.py:100. TFDS has to prepare
  imagenet2012 once (docs/data.md). For a folder that holds train/ and val/,
  each with one subfolder per class: --config.data.source=folder:/imagenet.
  (With folder:/imagenet/train, every tenth image would be held out for kNN.)
Hardware and time: the paper's table 3 has 1.2 hours per 100 epochs on 256
  TPU v3; the release 4 machines of 8 V100.
  Not run by this project.
Expected: linear probe 72.5 % after 300 epochs in the paper, 73.2 % in the
  release, 73.4 % after 600 in the paper.
  Not reproduced by this project.
"""

from mocov3_jax.config import default_config


def get_config(epochs='300'):
  c = default_config()
  c.data.source = 'tfds:imagenet2012'
  c.model.name = 'vit_s'
  c.model.dtype = 'bfloat16'
  c.schedule.epochs = float(epochs)
  c.knn.every_steps = 100
  return c
