"""ResNet-50 on ImageNet: the comparison of the paper's section 3 and App. A.

LARS, batch 4096, temperature 1, a projector of 2 layers and a predictor without
BatchNorm at its end, crops of 20 % and more, 10 epochs of warm-up. Three
settings depend on the number of epochs (the values are the release's; those for
800 epochs are the paper's):

  epochs  learning rate per 256  weight decay  momentum from
     100                    0.6          1e-6           0.99
     300                    0.3          1e-6           0.99
     800                    0.3        1.5e-6          0.996
    1000                    0.3        1.5e-6          0.996

Command:
  python -m mocov3_jax.train --config=configs/imagenet/resnet50.py:300 \\
      --workdir=runs/resnet50
  The number after the colon is one of the rows above (default 100). TFDS has
  to prepare imagenet2012 once (docs/data.md). For a folder that holds train/
  and val/, each with one subfolder per class:
  --config.data.source=folder:/imagenet. (With folder:/imagenet/train, every
  tenth image would be held out for kNN.)
Hardware and time: the release used 2 machines of 8 V100 (32 GB); no hours
  given. Not run by this project.
Expected: linear probe 68.9 % (100 epochs), 72.8 % (300), 74.6 % (1000) in the
  release, 73.8 % (800) in the paper. Not reproduced by this project.
"""

from mocov3_jax.config import default_config

# Learning rate per 256 images, weight decay, momentum at the start.
ROWS = {
    '100': (0.6, 1e-6, 0.99),
    '300': (0.3, 1e-6, 0.99),
    '800': (0.3, 1.5e-6, 0.996),
    '1000': (0.3, 1.5e-6, 0.996),
}


def get_config(epochs='100'):
  if epochs not in ROWS:
    raise ValueError(
        f'after the colon: {epochs!r}. Allowed: {", ".join(ROWS)}.'
    )
  c = default_config()
  c.data.source = 'tfds:imagenet2012'
  c.augment.view1.crop_min = c.augment.view2.crop_min = 0.2
  c.model.name = 'resnet50'
  c.model.dtype = 'bfloat16'
  c.head.projector_layers = 2
  c.head.predictor_out_bn = False
  c.objective.temperature = 1.0
  c.optimizer.name = 'lars'
  rate, decay, momentum = ROWS[epochs]
  c.optimizer.lr_per_256 = rate
  c.optimizer.weight_decay = decay
  c.objective.momentum = momentum
  c.schedule.epochs = float(epochs)
  c.schedule.warmup_epochs = 10.0
  c.knn.every_steps = 100
  return c
