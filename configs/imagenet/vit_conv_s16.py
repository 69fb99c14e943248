"""ViT-Conv-S/16 on ImageNet: a model of the release; no row of the paper.

The recipe of section 5: AdamW, batch 4096, learning rate 1.5e-4 per 256 images,
weight decay 0.1, 40 epochs of warm-up, half-cycle cosine, temperature 0.2. The
momentum of the target network (a half cosine from 0.99 to 1) and the weight
decay of 0.1 are those of the paper's PyTorch release. (The paper's table gives
0.99 as the default momentum, but does not say how it changes.)

A trained stem of four 3x3 convolutions with BatchNorm replaces the patch
projection, and there is one block fewer.

Command:
  python -m mocov3_jax.train --config=configs/imagenet/vit_conv_s16.py \\
      --workdir=runs/vit_conv_s16
  A number after a colon sets the epochs: vit_conv_s16.py:100. TFDS has to
  prepare imagenet2012 once (docs/data.md). For a folder that holds train/ and
  val/, each with one subfolder per class:
  --config.data.source=folder:/imagenet. (With folder:/imagenet/train, every
  tenth image would be held out for kNN.)
Hardware and time: not published.
  Not run by this project.
Expected: not published; an author says "performance is often higher
  (1-2%)" than with patches (facebookresearch/moco-v3 issue 18).
  Not reproduced by this project.
"""

from mocov3_jax.config import default_config


def get_config(epochs='300'):
  c = default_config()
  c.data.source = 'tfds:imagenet2012'
  c.model.name = 'vit_s'
  c.model.patch_embed = 'conv'
  c.model.dtype = 'bfloat16'
  c.schedule.epochs = float(epochs)
  c.knn.every_steps = 100
  return c
