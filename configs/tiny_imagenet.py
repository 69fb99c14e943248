"""MoCo v3 on Tiny ImageNet (100,000 images of 64x64) or a folder like it.

This is not a row of the paper but its ViT recipe (section 5) for images of 64
pixels on one device. What differs, set by rules of thumb:
  - ViT-Ti with 64 patches of 8x8 pixels.
  - Batch 512 instead of 4096; the peak learning rate is lr_per_256 * 512 / 256.
  - lr_per_256 is 5e-4, as in configs/cifar10.py, for a smaller model and batch.
  - Blur of 0.1 to 0.6 pixels: the paper's blur of up to 2 pixels is for 224.
  - Heads 1024 wide.
None of it was tuned.

Command:
  python -m mocov3_jax.train \\
      --config=configs/tiny_imagenet.py:/tiny-imagenet-200/train \\
      --workdir=runs/tiny_imagenet
  After the colon comes the folder, with one subfolder per class. Every tenth
  image is held out for kNN, since the test images of this set do not lie in
  such subfolders; the run trains on 90,000 images.
Hardware and time: one GPU or TPU chip; not measured.
Expected: not measured.
"""

from mocov3_jax.config import default_config


def get_config(path=''):
  c = default_config()
  c.batch_size = 512
  c.data.source = f'folder:{path}'
  c.data.image_size = 64
  for view in (c.augment.view1, c.augment.view2):
    view.blur_sigma = (0.1, 0.6)
  c.model.name = 'vit_ti'
  c.model.patch_size = 8
  c.head.hidden_dim = 1024
  c.optimizer.lr_per_256 = 5e-4
  c.knn.every_steps = 500
  return c
