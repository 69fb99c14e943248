"""MoCo v3 on ImageNet-100 (127,000 images, 100 classes) or a folder like it.

This is not a row of the paper but its recipe for ViT-S/16 (section 5) on a
tenth of the data and one machine. What differs, set by rules of thumb:
  - Batch 512 instead of 4096; lr_per_256 stays 1.5e-4, so the peak is 3e-4.
    With 247 steps per epoch, 300 epochs are 74,000 steps; the paper's 300
    epochs on ImageNet are 93,600.
  - bfloat16.
None of it was tuned.

Command:
  python -m mocov3_jax.train \\
      --config=configs/imagenet100.py:/imagenet100 \\
      --workdir=runs/imagenet100
  After the colon comes a folder that holds train/ and val/, each with one
  subfolder per class. (If the folder holds only class folders, every tenth
  image is held out for kNN.)
Hardware and time: one machine with GPUs or TPU chips; not measured.
Expected: not measured.
"""

from mocov3_jax.config import default_config


def get_config(path=''):
  c = default_config()
  c.batch_size = 512
  c.data.source = f'folder:{path}'
  c.model.dtype = 'bfloat16'
  c.knn.every_steps = 500
  return c
