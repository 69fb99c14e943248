"""A linear probe (paper, section 5, and the release's main_lincls).

The backbone is frozen and in evaluation mode. Training uses SGD with momentum
0.9 and no weight decay, batch 1024, 90 epochs, half a cosine by epochs, random
crops and flips. The central crop of the test images is classified. The
release's rate is 3 per 256 images for ViT and 0.1 for ResNet-50; the paper
sweeps it for each network, at batch 4096. Here one classifier is trained for
each rate in `linear.lr_per_256`, all at once. The result, `linear/top1`, is
that of the last epoch at the best rate; the release reports the best epoch
(`linear/top1_best`).

Command:
  python -m mocov3_jax.evaluate --config=configs/eval_linear.py \\
      --config.checkpoint=RUN --workdir=OUT
  For digits or another small data set use eval_linear.py:small, with batch 128,
  crops of 80 % and more without flips, and a BatchNorm before the heads.
Hardware and time: not run on ImageNet by this project. With :small, on the
  smoke run of the digits: 2 CPU cores; see docs/evaluation.md.
Expected: the published numbers are quoted in the recipes of configs/imagenet/.
"""

from mocov3_jax.config import eval_config


def get_config(size='imagenet'):
  c = eval_config()
  c.protocol = 'linear'
  c.batch_size = 1024
  if size == 'small':
    c.batch_size = 128
    c.linear.batch_norm = True
    c.view.crop_min, c.view.flip_prob = 0.8, 0.0
  elif size != 'imagenet':
    raise ValueError(f'after the colon: {size!r}. Allowed: imagenet, small.')
  return c
