"""Every knob of an evaluation: its default, unit, source and range.

A recipe in configs/eval_*.py starts from `eval_config()`; its protocol reads
only the fields that concern it. "The paper" and "the release" mean the same as
in `training.py`. DeiT is Touvron et al. 2021 (arXiv 2012.12877), whose defaults
the paper uses for fine-tuning.
"""

from ml_collections import ConfigDict

from mocov3_jax.config import knobs, training
from mocov3_jax.config.knobs import (
  AT_LEAST_ONE,
  BELOW_ONE,
  NOT_NEGATIVE,
  SEED,
  SHARE,
  SHARE_ABOVE_ZERO,
  Knob,
  Range,
  Schema,
  within,
)

# The values of `protocol`.
PROTOCOLS = ('knn', 'linear', 'logistic', 'finetune')


def eval_config() -> ConfigDict:
  """Returns the defaults of `evaluate`, locked."""
  return knobs.defaults(schema())


def schema() -> Schema:
  """Returns all knobs of an evaluation."""
  view = training.view(blur_prob=0.0, solarize_prob=0.0)
  return {
      # What is measured: one of PROTOCOLS.
      'protocol': Knob('knn'),
      # The network to evaluate: a workdir of `train` (its newest checkpoint is
      # used), or one of its folders checkpoints/<step>.
      'checkpoint': Knob(''),
      # Which backbone to evaluate: 'query' = the online network's; 'momentum' =
      # the target network's; 'random' = random weights of the run's seed, with
      # which it began unless it began with a checkpoint.
      'encoder': Knob('query'),
      # Images per forward pass or training step, over all devices.
      'batch_size': Knob(256, within(1, 2**24)),
      # Seeds the initialisation of the heads, the order of the data, the
      # augmentation and the choice of images for `labels_per_class`.
      'seed': Knob(0, SEED),
      'data': {
          # Where the images come from; '' = the source the run was trained on.
          'source': Knob(''),
          # The labels of the source, as in training. With the run's own source,
          # 'auto' means the labels setting of the run.
          'labels': Knob('auto'),
          # Number of labelled images of each class to learn from, chosen by
          # `seed`; 0 = all.
          'labels_per_class': Knob(0, NOT_NEGATIVE),
          # As in training.
          'prefetch': Knob(4, within(1, 1024), free=True),
          'threads': Knob(0, within(0, 1024), free=True),
          'processes': Knob(0, within(0, 256), free=True, added=True),
          'max_unreadable': Knob(0.01, SHARE, free=True),
      },
      # The view that 'linear' and 'finetune' train on. Paper s5: crop and flip
      # only.
      'view': view | {
          'jitter_prob': Knob(0.0, SHARE), 'gray_prob': Knob(0.0, SHARE)
      },
      'knn': _knn(),
      'linear': _linear(),
      'logistic': _logistic(),
      'finetune': _finetune(),
      # Training schedule of 'linear' and 'finetune'.
      'schedule': {
          # Passes over the data.
          'epochs': Knob(90.0, NOT_NEGATIVE),
          # Total number of optimizer steps; 0 = as given by `epochs`.
          'steps': Knob(0, within(0, 2**31 - 1)),
          # Epochs of linear warm-up ('finetune').
          'warmup_epochs': Knob(0.0, NOT_NEGATIVE),
      },
      # Steps between two evaluations on the test images; 0 = once an epoch.
      'test_every_steps': Knob(0, NOT_NEGATIVE),
      'log': {
          # Steps between two lines of metrics.jsonl.
          'every_steps': Knob(10, AT_LEAST_ONE, free=True),
          # As in training; used by 'linear' and 'finetune'.
          'tracker': Knob('', free=True, added=True),
      },
      # Steps between two checkpoints; minutes after which an extra one is saved
      # (0 = by steps only); number of newest and of best ones to keep.
      'save': {
          'every_steps': Knob(1000, AT_LEAST_ONE, free=True),
          'every_minutes': Knob(15.0, NOT_NEGATIVE, free=True),
          # Also save the initial state, step 0, and keep it for comparisons.
          'initial': Knob(False, free=True),
          'keep_latest': Knob(1, AT_LEAST_ONE, free=True),
          'keep_best': Knob(0, NOT_NEGATIVE, free=True),
      },
  }


def _positive_numbers(fewest: int = 0, whole: bool = False) -> Range:
  """Returns the range of tuples of distinct (whole) numbers above 0."""
  text = f'different {"whole " * whole}numbers above 0'
  kinds = int if whole else (int, float)
  return Range(
      text + ', at least one' * (fewest > 0),
      lambda v: len(set(v)) == len(v) >= fewest
      and all(isinstance(x, kinds) and x > 0 for x in v),
  )


def _knn() -> Schema:
  return {
      # Number of images in the bank, and number to classify; 0 = all.
      'bank_images': Knob(0, NOT_NEGATIVE),
      'query_images': Knob(0, NOT_NEGATIVE),
      **training.knn(),
      # Further values of k and of the temperature. The result has a table of
      # all combinations.
      'more_k': Knob((10, 20, 100), _positive_numbers(whole=True)),
      'more_temperatures': Knob((0.2,), _positive_numbers()),
      # Classify every image of both splits by all the others, instead of
      # classifying the test split by the training split.
      'leave_one_out': Knob(False),
  }


def _linear() -> Schema:
  return {
      # Learning rates per 256 images. One head is trained for each, all at once
      # on the same features. Paper s5 sweeps the rate; release: 3 for ViT, 0.1
      # for ResNet-50, at batch 1024.
      'lr_per_256': Knob(
          (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), _positive_numbers(fewest=1)
      ),
      # Heavy-ball momentum of SGD, as in the release.
      'momentum': Knob(0.9, BELOW_ONE),
      # Put a BatchNorm without scale and offset before the head, so that one
      # rate suits all networks (He et al. 2022, arXiv 2111.06377, A.1).
      'batch_norm': Knob(False),
  }


def _logistic() -> Schema:
  return {
      # Inverse strengths of the L2 penalty to try, on standardised features.
      # The one with the best accuracy on a held-out tenth of the training
      # images is used.
      'inverse_penalties': Knob(
          (0.001, 0.01, 0.1, 1.0, 10.0), _positive_numbers(fewest=1)
      ),
      # Maximum number of L-BFGS iterations.
      'iterations': Knob(300, AT_LEAST_ONE),
  }


def _finetune() -> Schema:
  return {
      # Start from random weights instead of the checkpoint's, with the same
      # architecture.
      'from_scratch': Knob(False),
      # AdamW, with DeiT's values: peak learning rate per 256 images; rates at
      # the start of the warm-up and at the end (neither is scaled by the batch
      # size); weight decay, of matrices only.
      'lr_per_256': Knob(2.5e-4, NOT_NEGATIVE),
      'warmup_lr': Knob(1e-6, NOT_NEGATIVE),
      'min_lr': Knob(1e-5, NOT_NEGATIVE),
      'weight_decay': Knob(0.05, NOT_NEGATIVE),
      # Factor by which the learning rate falls from each block to the one below
      # it (Bao et al. 2022, arXiv 2106.08254); 1 = the same rate everywhere, as
      # in DeiT.
      'layer_decay': Knob(1.0, SHARE_ABOVE_ZERO),
      # Stochastic depth: drop rate of a ViT's last block. DeiT's value.
      'drop_path': Knob(0.1, BELOW_ONE),
      # Label smoothing; Beta parameters of mixup and cutmix (0 = off); share of
      # images with random erasing. DeiT's values.
      'smoothing': Knob(0.1, BELOW_ONE),
      'mixup': Knob(0.8, NOT_NEGATIVE),
      'cutmix': Knob(1.0, NOT_NEGATIVE),
      'erase': Knob(0.25, SHARE),
      # Magnitude of RandAugment, which draws two operations per image; 0 = off.
      # DeiT: 9.
      'rand_augment': Knob(
          9.0, Range('from 0 to 10', lambda v: 0 <= v <= 10)
      ),
      # Decay of a moving average of the parameters, which is tested instead of
      # the parameters; 0 = no average, as in DeiT.
      'ema': Knob(0.0, BELOW_ONE),
  }
