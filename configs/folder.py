"""MoCo v3 on any folder of images, labelled or not, on one device.

No row of the paper: its ViT-S/16 recipe (section 5, 224 pixels, frozen random
patch projection) with a batch that one accelerator holds. What differs, and
why:
  - Batch 256 instead of 4096; the learning rate per 256 images is the paper's,
    so the peak is 1.5e-4. The paper's figure 2 has smaller batches below 4096
    by 1 to 2 points.
  - Heads 1024 wide instead of 4096, for the smaller batch.
  - 100 epochs, 10 of them warm-up. For fewer than about 50,000 images, more:
    --config.schedule.epochs=800.
  - The monitor looks at 5,000 images, and 1,000 to classify.

Command:
  python -m mocov3_jax.train --config=configs/folder.py:/my/photos \\
      --workdir=runs/photos
  The part after the colon is the folder, the same as
  --config.data.source=folder:/my/photos. On a small GPU (below 16 GB) add
  --config.batch_size=128. What the run will see:
  python -m mocov3_jax.preview --config=configs/folder.py:/my/photos \\
      --out=views.png
Hardware and time: one GPU or TPU chip; not measured at full size. On 2 CPU
  cores use small images and a small model, as docs/data.md does.
Expected: depends on the photos; not measured at full size.
"""

from mocov3_jax.config import default_config


def get_config(path=''):
  c = default_config()
  c.batch_size = 256
  c.data.source = f'folder:{path}'
  c.head.hidden_dim = 1024
  c.schedule.epochs = 100.0
  c.schedule.warmup_epochs = 10.0
  c.knn.every_steps = 500
  c.knn.bank_images = 5_000
  c.knn.query_images = 1_000
  return c
