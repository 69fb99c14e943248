"""Every knob of an evaluation, once: its default, unit and source.

A protocol in configs/eval_*.py starts from `eval_config()`, of which each reads
the fields that concern it. Sources as in `training.py`; [D]: the defaults of
DeiT (Touvron et al. 2021, arXiv 2012.12877), with which [P] fine-tunes.
"""

from ml_collections import ConfigDict

from mocov3_jax.config import training as config_lib

# What `protocol` may be.
PROTOCOLS = ('knn', 'linear', 'logistic', 'finetune')


def eval_config() -> ConfigDict:
  """Returns the defaults of `evaluate`, locked."""
  c = ConfigDict()
  # What is measured: 'knn', 'linear', 'logistic' or 'finetune'.
  c.protocol = 'knn'
  # A workdir of `train` (its newest checkpoint) or one checkpoints/<step>.
  c.checkpoint = ''
  # Whose backbone: 'query', the online network's, or 'momentum', the target's.
  c.encoder = 'query'
  # Images per forward pass, or per step of training, over all devices.
  c.batch_size = 256
  # Seeds heads, order, augmentation and the choice of `labels_per_class`.
  c.seed = 0
  c.data = ConfigDict()
  # Where images come from; '' = the source the run was trained on.
  c.data.source = ''
  # As in training; read if `source` is given.
  c.data.labels = 'auto'
  # Labelled images of each class to learn from (chosen by `seed`); 0 = all.
  c.data.labels_per_class = 0
  # As in training.
  c.data.prefetch = 4
  c.data.threads = 0
  c.data.max_unreadable = 0.01
  # The view that 'linear' and 'finetune' train on. [P] s5: crop and flip only.
  c.view = config_lib.view(blur_prob=0.0, solarize_prob=0.0)
  c.view.jitter_prob, c.view.gray_prob = 0.0, 0.0
  c.knn = _knn()
  c.linear = _linear()
  c.logistic = _logistic()
  c.finetune = _finetune()
  c.schedule = ConfigDict()
  # Of 'linear' and 'finetune': passes over the data; optimizer steps in all,
  # 0 = as many as that gives; epochs of linear warm-up ('finetune').
  c.schedule.epochs = 90.0
  c.schedule.steps = 0
  c.schedule.warmup_epochs = 0.0
  # Steps between two evaluations on the test images; 0 = once an epoch.
  c.test_every_steps = 0
  # Steps between two lines of metrics.jsonl, and between two checkpoints.
  c.log = ConfigDict({'every_steps': 10})
  c.save = ConfigDict(
      {'every_steps': 1000, 'keep_latest': 1, 'keep_best': 0}
  )
  return c.lock()


def _knn() -> ConfigDict:
  # Bank and queries: all images.
  c = config_lib.knn(ConfigDict({'bank_images': 0, 'query_images': 0}))
  # More of both, for the table of all combinations.
  c.more_k = (10, 20, 100)
  c.more_temperatures = (0.2,)
  # Classify every image by all others of both splits, instead of the test
  # split by the training split.
  c.leave_one_out = False
  return c


def _linear() -> ConfigDict:
  c = ConfigDict()
  # Learning rates per 256 images, all trained at once on the same features.
  # [P] s5 sweeps; [R]: 3 for ViT, 0.1 for ResNet-50, at batch 1024.
  c.lr_per_256 = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
  # Of the heavy-ball momentum. [R].
  c.momentum = 0.9
  # A BatchNorm without scale and offset before the head, after which one
  # rate suits all (He et al. 2022, arXiv 2111.06377, A.1).
  c.batch_norm = False
  return c


def _logistic() -> ConfigDict:
  c = ConfigDict()
  # Inverse strengths of the L2 penalty on standardised features; the one
  # that is best on a tenth of the training images counts.
  c.inverse_penalties = (0.001, 0.01, 0.1, 1.0, 10.0)
  # Of L-BFGS, at most.
  c.iterations = 300
  return c


def _finetune() -> ConfigDict:
  c = ConfigDict()
  # A random network of the same kind instead of the checkpoint's.
  c.from_scratch = False
  # AdamW's rate per 256 images, before the warm-up and at the end (both not
  # scaled by the batch), and its decay of 'matrices'. [D].
  c.lr_per_256 = 2.5e-4
  c.warmup_lr = 1e-6
  c.min_lr = 1e-5
  c.weight_decay = 0.05
  # Each block learns this much slower than the one above it (Bao et al. 2022,
  # arXiv 2106.08254); 1 = all alike. [D]: 1.
  c.layer_decay = 1.0
  # Stochastic depth of a ViT's last block. [D].
  c.drop_path = 0.1
  # Label smoothing; Beta parameters of mixup and cutmix (0 = off); share of
  # erased images. [D].
  c.smoothing = 0.1
  c.mixup = 0.8
  c.cutmix = 1.0
  c.erase = 0.25
  # Magnitude of RandAugment's two operations an image; 0 = off. [D]: 9.
  c.rand_augment = 9.0
  # Decay of the average of the parameters that is tested; 0 = none. [D]: none.
  c.ema = 0.0
  return c
