"""Every knob of an evaluation: its default, unit, source and range.

A protocol in configs/eval_*.py starts from `eval_config()` and reads the
fields that concern it. "The paper" and "the release" are those of
`training.py`; DeiT is Touvron et al. 2021 (arXiv 2012.12877), with whose
defaults the paper fine-tunes.
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

# What `protocol` may be.
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
      # A workdir of `train` (its newest checkpoint) or one checkpoints/<step>.
      'checkpoint': Knob(''),
      # Whose backbone: 'query', the online network's; 'momentum', the
      # target's; or 'random', as the run had it before its first step.
      'encoder': Knob('query'),
      # Images per forward pass, or per step of training, over all devices.
      'batch_size': Knob(256, within(1, 2**24)),
      # Seeds heads, order, augmentation and the choice of `labels_per_class`.
      'seed': Knob(0, SEED),
      'data': {
          # Where images come from; '' = the source the run was trained on.
          'source': Knob(''),
          # As in training, of either source; 'auto' = with the run's own
          # source, the labels of the run.
          'labels': Knob('auto'),
          # Labelled images of each class to learn from (chosen by `seed`); 0 =
          # all.
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
      # Of 'linear' and 'finetune'.
      'schedule': {
          # Passes over the data.
          'epochs': Knob(90.0, NOT_NEGATIVE),
          # Optimizer steps in all; 0 = as many as `epochs` gives.
          'steps': Knob(0, within(0, 2**31 - 1)),
          # Epochs of linear warm-up ('finetune').
          'warmup_epochs': Knob(0.0, NOT_NEGATIVE),
      },
      # Steps between two evaluations on the test images; 0 = once an epoch.
      'test_every_steps': Knob(0, NOT_NEGATIVE),
      'log': {
          # Steps between two lines of metrics.jsonl.
          'every_steps': Knob(10, AT_LEAST_ONE, free=True),
          # As in training; of 'linear' and 'finetune'.
          'tracker': Knob('', free=True, added=True),
      },
      # Steps between two checkpoints, minutes after which one more is saved (0
      # = by steps alone), and how many are kept.
      'save': {
          'every_steps': Knob(1000, AT_LEAST_ONE, free=True),
          'every_minutes': Knob(15.0, NOT_NEGATIVE, free=True),
          # Save the initial state as well, step 0, and keep it for comparisons.
          'initial': Knob(False, free=True),
          'keep_latest': Knob(1, AT_LEAST_ONE, free=True),
          'keep_best': Knob(0, NOT_NEGATIVE, free=True),
      },
  }


def _positive_numbers(fewest: int = 0) -> Range:
  """Returns the range of tuples of different numbers above 0."""
  text = 'different numbers above 0' + (', at least one' if fewest else '')
  return Range(
      text,
      lambda v: len(set(v)) == len(v) >= fewest and all(x > 0 for x in v),
  )


def _knn() -> Schema:
  return {
      # Images in the bank and to classify; 0 = all.
      'bank_images': Knob(0, NOT_NEGATIVE),
      'query_images': Knob(0, NOT_NEGATIVE),
      **training.knn(),
      # More of both, for the table of all combinations.
      'more_k': Knob((10, 20, 100), _positive_numbers()),
      'more_temperatures': Knob((0.2,), _positive_numbers()),
      # Classify every image by all others of both splits, instead of the test
      # split by the training split.
      'leave_one_out': Knob(False),
  }


def _linear() -> Schema:
  return {
      # Learning rates per 256 images, all trained at once on the same features.
      # Paper s5 sweeps them; release: 3 for ViT, 0.1 for ResNet-50, at batch
      # 1024.
      'lr_per_256': Knob(
          (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), _positive_numbers(fewest=1)
      ),
      # Heavy-ball momentum of SGD, as in the release.
      'momentum': Knob(0.9, BELOW_ONE),
      # A BatchNorm without scale and offset before the head, after which one
      # rate suits all (He et al. 2022, arXiv 2111.06377, A.1).
      'batch_norm': Knob(False),
  }


def _logistic() -> Schema:
  return {
      # Inverse strengths of the L2 penalty on standardised features; the one
      # that is best on a tenth of the training images counts.
      'inverse_penalties': Knob(
          (0.001, 0.01, 0.1, 1.0, 10.0), _positive_numbers(fewest=1)
      ),
      # Iterations of L-BFGS, at most.
      'iterations': Knob(300, AT_LEAST_ONE),
  }


def _finetune() -> Schema:
  return {
      # A random network of the same kind instead of the checkpoint's.
      'from_scratch': Knob(False),
      # AdamW's rate per 256 images, the rates before the warm-up and at the end
      # (both not scaled by the batch), and its decay of matrices. DeiT's.
      'lr_per_256': Knob(2.5e-4, NOT_NEGATIVE),
      'warmup_lr': Knob(1e-6, NOT_NEGATIVE),
      'min_lr': Knob(1e-5, NOT_NEGATIVE),
      'weight_decay': Knob(0.05, NOT_NEGATIVE),
      # Each block learns this much slower than the one above it (Bao et al.
      # 2022, arXiv 2106.08254); 1 = all alike, as DeiT.
      'layer_decay': Knob(1.0, SHARE_ABOVE_ZERO),
      # Stochastic depth of a ViT's last block. DeiT's.
      'drop_path': Knob(0.1, BELOW_ONE),
      # Label smoothing; Beta parameters of mixup and cutmix (0 = off); share of
      # erased images. DeiT's.
      'smoothing': Knob(0.1, BELOW_ONE),
      'mixup': Knob(0.8, NOT_NEGATIVE),
      'cutmix': Knob(1.0, NOT_NEGATIVE),
      'erase': Knob(0.25, SHARE),
      # Magnitude of RandAugment's two operations on an image; 0 = off. DeiT: 9.
      'rand_augment': Knob(
          9.0, Range('from 0 to 10', lambda v: 0 <= v <= 10)
      ),
      # Decay of the average of the parameters that is tested; 0 = none, as
      # DeiT.
      'ema': Knob(0.0, BELOW_ONE),
  }
