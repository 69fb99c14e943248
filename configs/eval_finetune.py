"""Fine-tuning by the recipe of DeiT, as the paper does it (section 6.4).

The recipe: AdamW, 5e-4 per 512 images, weight decay 0.05 of matrices, 5 epochs
of warm-up, half a cosine to 1e-5, label smoothing 0.1, mixup 0.8, cutmix 1.0,
RandAugment, random erasing 0.25, stochastic depth 0.1 (Touvron et al. 2021,
arXiv 2012.12877). The central 0.875 of the test images is classified. The paper
fine-tunes ViT-B for 150 epochs (83.2 %) and ViT-L for 100 with stochastic
depth 0.5 (84.1 %). DeiT's repeated augmentation is left out.

Command:
  python -m mocov3_jax.evaluate --config=configs/eval_finetune.py \\
      --config.checkpoint=RUN --workdir=OUT
  From random weights instead: --config.finetune.from_scratch=True.
  For digits or another small data set use eval_finetune.py:small, whose
  augmentation is for small images without orientation or colour.
Hardware and time: not run on ImageNet by this project. With :small, on the
  smoke run of the digits: 2 CPU cores; see docs/evaluation.md.
Expected: ViT-B 83.2 % (paper), not reproduced by this project.
"""

from mocov3_jax.config import eval_config


def get_config(size='imagenet'):
  c = eval_config()
  c.protocol = 'finetune'
  c.batch_size = 1024
  c.schedule.epochs, c.schedule.warmup_epochs = 150.0, 5.0
  if size == 'small':
    c.batch_size = 100
    c.schedule.epochs, c.schedule.warmup_epochs = 40.0, 4.0
    c.finetune.lr_per_256 = 2e-3
    c.finetune.mixup = c.finetune.cutmix = 0.0
    c.finetune.erase = c.finetune.rand_augment = 0.0
    c.finetune.drop_path = 0.0
    c.view.crop_min, c.view.flip_prob = 0.5, 0.0
  elif size != 'imagenet':
    raise ValueError(f'after the colon: {size!r}. Allowed: imagenet, small.')
  return c
