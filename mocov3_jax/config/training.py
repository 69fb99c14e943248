"""Every knob of a pre-training run: its default, unit, source and range.

A recipe in configs/ starts from `default_config()` and changes what its row
of the paper changes. "The paper" is Chen, Xie, He, "An Empirical Study of
Training Self-Supervised Vision Transformers", ICCV 2021 (arXiv 2104.02057).
"The release" is the README and CONFIG of its PyTorch code.
"""

import dataclasses

from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import knobs
from mocov3_jax.config.knobs import (
  AT_LEAST_ONE,
  BELOW_ONE,
  NOT_NEGATIVE,
  POSITIVE,
  SEED,
  SHARE,
  SHARE_ABOVE_ZERO,
  Knob,
  Range,
  Schema,
  within,
)

# Images of ImageNet's training set.
IMAGENET_IMAGES = 1_281_167


def default_config() -> ConfigDict:
  """Returns the defaults, locked: ViT-S/16, 224 px, batch 4096, 300 epochs."""
  return knobs.defaults(schema())


def schema() -> Schema:
  """Returns all knobs of a pre-training run."""
  return {
      # Seeds the initialisation, the order of the data and the augmentation.
      'seed': Knob(0, SEED),
      # Images per optimizer step over all devices. Paper s5: 4096. A single
      # image would have no negatives and no batch statistics.
      'batch_size': Knob(4096, within(2, 2**24)),
      # Images per device in one pass through the trunk. This bounds the memory
      # of the activations, at the cost of a second forward pass; the result is
      # the same. 0 = all images of the device at once.
      'micro_batch': Knob(0, NOT_NEGATIVE, free=True, zero='all at once'),
      # Number of devices over which parameters, target network, statistics and
      # optimizer state are split (FSDP). 1 = each device holds all of them. The
      # result is the same.
      'fsdp_devices': Knob(1, AT_LEAST_ONE, free=True),
      'data': _data(),
      'augment': {
          'view1': view(blur_prob=1.0, solarize_prob=0.0),
          'view2': view(blur_prob=0.1, solarize_prob=0.2),
      },
      'model': _model(),
      'head': _head(),
      'objective': _objective(),
      'init': {
          # Initial weights: a workdir (of a run, or written by `convert`) or
          # one of its folders checkpoints/<step>; 'timm:FOLDER' = a folder from
          # timm or the Hub; '' = random weights.
          'checkpoint': Knob('', added=True),
          # Also load the heads of the checkpoint; False = new random heads.
          'heads': Knob(False, added=True),
          # Epochs at the start during which the backbone is frozen, so that new
          # heads learn first.
          'freeze_backbone_epochs': Knob(
              0.0, NOT_NEGATIVE, added=True, zero='not at all'
          ),
      },
      'optimizer': _optimizer(),
      'schedule': {
          # Passes over the data. Each epoch drops its last, incomplete batch,
          # as in the release.
          'epochs': Knob(300.0, NOT_NEGATIVE),
          # Total number of optimizer steps; 0 = as given by `epochs`.
          'steps': Knob(0, within(0, 2**31 - 1), zero='by epochs'),
          # Epochs of linear warm-up from 0, followed by a half cosine to 0.
          # Paper s5: 40.
          'warmup_epochs': Knob(40.0, NOT_NEGATIVE),
      },
      'knn': {
          # Steps between two runs of the kNN monitor; 0 = only when a
          # checkpoint is saved. Paper App. A: "every tens of iterations".
          'every_steps': Knob(50, NOT_NEGATIVE, free=True, zero='at saves'),
          # Number of images in the bank, and number to classify, evenly spaced
          # over the splits; 0 = all. They bound the time of the monitor. The
          # defaults are the sizes of CIFAR's splits.
          'bank_images': Knob(50_000, NOT_NEGATIVE, zero='all'),
          'query_images': Knob(10_000, NOT_NEGATIVE, zero='all'),
          # Size of a second kNN monitor, as a share of the training images; 0 =
          # no such monitor. It uses a queue of the features that training
          # itself computes, runs at every step, and needs labels. Paper App. A:
          # 0.1.
          'queue_share': Knob(0.0, SHARE),
          **knn(),
      },
      'log': {
          # Steps between two lines of metrics.jsonl. 1 shows every gradient
          # spike.
          'every_steps': Knob(1, AT_LEAST_ONE, free=True),
          # Log the gradients of every block and head, not only of the first and
          # the last layer.
          'blocks': Knob(False, free=True),
          # Log how AdamW moves the layers whose gradients are logged: the RMS
          # of g / sqrt(v), the share of weight decay in the update, and the
          # norm of the weights.
          'updates': Knob(False, free=True, added=True),
          # Experiment tracker to report to: '' = none, 'wandb' = Weights &
          # Biases.
          'tracker': Knob('', free=True, added=True),
      },
      'save': {
          # Steps between two checkpoints; one more is saved at the end.
          'every_steps': Knob(1000, AT_LEAST_ONE, free=True),
          # Minutes after which an extra one is saved, without an evaluation, in
          # case the machine is lost without warning; 0 = by steps only.
          'every_minutes': Knob(15.0, NOT_NEGATIVE, free=True),
          # Also save the initial state, step 0, and keep it for comparisons.
          'initial': Knob(False, free=True),
          # Number of newest checkpoints to keep, and of best ones (by kNN) to
          # keep in addition.
          'keep_latest': Knob(2, AT_LEAST_ONE, free=True),
          'keep_best': Knob(1, NOT_NEGATIVE, free=True),
      },
  }


def _data() -> Schema:
  return {
      # Where the images come from: 'digits', 'folder:PATH', 'idx:FOLDER',
      # 'wds:GLOB', 'hf:PATH_OR_NAME[:SPLIT]' or 'tfds:NAME[:SPLIT]'.
      'source': Knob('digits'),
      # Labels of a folder, used only by the kNN monitor: 'auto' = the names of
      # its subfolders, if these can be classes; 'folders' = these names, even
      # if images lie beside the subfolders or one is named like a split; 'none'
      # = no labels; or the path of a CSV file with the columns path and label.
      'labels': Knob('auto'),
      # Folder in which the listings of large image folders are cached; '' = the
      # user's cache folder. Set it on a machine whose disk does not persist.
      'listing_cache': Knob('', free=True),
      # Side of the square crop that the model sees, pixels. Paper s5: 224.
      'image_size': Knob(224, within(1, 8192)),
      # Mean and standard deviation of each channel, for pixels in [0, 1]. The
      # release uses ImageNet's. Images of a folder are read with as many
      # channels as there are values: 1 = gray, 3 = RGB, or the images' own
      # number.
      'mean': Knob(
          (0.485, 0.456, 0.406),
          Range('one number per channel', lambda v: len(v) >= 1),
      ),
      'std': Knob(
          (0.229, 0.224, 0.225),
          Range(
              'as many numbers as data.mean, each above 0',
              lambda v: len(v) >= 1 and min(v) > 0,
          ),
      ),
      # Number of batches read ahead of the device (uint8, in host memory).
      'prefetch': Knob(4, within(1, 1024), free=True),
      # Threads that read and decode images; 0 = one per core.
      'threads': Knob(0, within(0, 1024), free=True),
      # Number of processes that share these threads: 1 = only the main process;
      # 0 = one for every 8 cores, at most 16. The images are the same.
      'processes': Knob(
          0, within(0, 256), free=True, added=True, zero='by cores'
      ),
      # Training stops when more than this share of an epoch's images could
      # not be read (each is replaced by another image).
      'max_unreadable': Knob(0.01, SHARE, free=True),
  }


def view(blur_prob: float, solarize_prob: float) -> Schema:
  """Returns the knobs of one view, in the order in which they are applied.

  The paper only lists the operations; all values are the release's. An
  operation with probability 0 is left out of the compiled program.
  """
  ascending = lambda v: len(v) == 2 and 0 < v[0] <= v[1]
  return {
      # Random resized crop: the smallest share of the image's area (the
      # largest is 1), and the range of width / height. The release uses 0.08
      # for ViT and 0.2 for ResNet.
      'crop_min': Knob(0.08, SHARE_ABOVE_ZERO),
      'crop_ratio': Knob(
          (3 / 4, 4 / 3),
          Range('two positive numbers, the smaller first', ascending),
      ),
      # Colour jitter: its probability; half-widths of the ranges of the factors
      # around 1; half-width of the range of the hue shift around 0 (at most
      # 0.5, half of the colour circle).
      'jitter_prob': Knob(0.8, SHARE),
      'brightness': Knob(0.4, NOT_NEGATIVE),
      'contrast': Knob(0.4, NOT_NEGATIVE),
      'saturation': Knob(0.2, NOT_NEGATIVE),
      'hue': Knob(0.1, Range('from 0 to 0.5', lambda v: 0 <= v <= 0.5)),
      # Grayscale: its probability.
      'gray_prob': Knob(0.2, SHARE),
      # Gaussian blur: its probability, and the range of its standard deviation,
      # pixels.
      'blur_prob': Knob(blur_prob, SHARE),
      'blur_sigma': Knob(
          (0.1, 2.0),
          Range(
              'two positive numbers, the smaller first, of at most 2 pixels',
              lambda v: ascending(v) and v[1] <= 2,
          ),
      ),
      # Solarize, which inverts pixel values of 128 and more: its probability.
      'solarize_prob': Knob(solarize_prob, SHARE),
      # Horizontal flip: its probability.
      'flip_prob': Knob(0.5, SHARE),
  }


# What 0 means for the sizes of the model.
OF_NAME = 'as model.name has it'


def _model() -> Schema:
  return {
      # Backbone: 'vit_ti', 'vit_s', 'vit_b', 'vit_l', 'vit_h' (paper, tables
      # 2 and 3), 'resnet18', 'resnet34', 'resnet50', 'resnet101'.
      'name': Knob('vit_s'),
      # Width of a ViT's tokens or of a ResNet's stem; 0 = that of `name`.
      'dim': Knob(0, within(0, 2**16), zero=OF_NAME),
      # ViT: number of blocks and of attention heads; 0 = those of `name`, with
      # one block fewer if the stem is convolutional.
      'depth': Knob(0, within(0, 256), zero=OF_NAME),
      'num_heads': Knob(0, within(0, 1024), zero=OF_NAME),
      # ViT: side of a patch, pixels.
      'patch_size': Knob(16, within(1, 8192)),
      # ViT: the patch projection. 'frozen' = random and not trained, which
      # paper s4.2 finds stable; 'learned' = trained like the rest; 'clipped' =
      # learned, with its gradient clipped (optimizer.patch_embed_clip);
      # 'batch_norm' and 'weight_norm' = learned with that normalisation, which
      # s4.2 also tried; 'conv' = a learned stem of convolutions with BatchNorm
      # (the release's ViT-Conv).
      'patch_embed': Knob('frozen'),
      # ViT: number of first blocks that stay random, like a frozen patch
      # projection. Shows whether spikes begin in the first layer that learns.
      'frozen_blocks': Knob(0, within(0, 255), added=True, zero='none'),
      # ViT: position embedding, 'sincos' (fixed), 'learned' or 'none'. Paper
      # s6.2: 76.5, 76.1, 74.9 % (ViT-B, 300 epochs).
      'positions': Knob('sincos'),
      # ViT: how the tokens become one vector. 'cls' = the class token after the
      # final LayerNorm; 'norm_pool' = the mean of the tokens after the final
      # LayerNorm; 'pool' = the mean of the tokens without a final LayerNorm.
      # Paper s6.2: 76.5, 69.7, 76.3 %.
      'readout': Knob('cls'),
      # ViT: the normalisation before the MLP of each block: 'layer', or 'batch'
      # as in the ViT-BN of paper s6.3 (about 1 point better).
      'mlp_norm': Knob('layer'),
      # ViT: recompute the blocks in the backward pass, to save memory; run the
      # blocks as one loop, to compile faster. Neither changes the result.
      'remat': Knob(False, free=True),
      'scan': Knob(False, free=True),
      # ResNet: use a 3x3 stem without stride and pooling, for images of 64
      # pixels or less.
      'small_images': Knob(False),
      # ViT: the implementation of attention: 'reference', 'einsum', 'pallas'
      # (TPU), 'cudnn' (GPU, bfloat16), or 'auto' = the fastest known for the
      # device. All compute the same, up to rounding.
      'attention': Knob('auto', free=True, added=True),
      # Arithmetic of the trunk and heads: 'float32' (products at the
      # backend's default precision) or 'bfloat16'. Parameters, statistics,
      # logits and loss are float32 in both.
      'dtype': Knob('float32'),
  }


def _head() -> Schema:
  return {
      # Layers of the projector and the predictor MLP. Paper s5: 3 and 2 for
      # ViT; release: 2 and 2 for ResNet. 0 = no predictor (paper s6.2: 75.5
      # instead of 76.5 %).
      'projector_layers': Knob(3, within(1, 16)),
      'predictor_layers': Knob(2, within(0, 16)),
      # Hidden and output width of projector and predictor. Paper s5.
      'hidden_dim': Knob(4096, within(1, 2**20)),
      'out_dim': Knob(256, within(2, 2**20)),
      # BatchNorm (without scale and offset) on the outputs of projector and
      # predictor. The release has none on ResNet's predictor; paper App. A has
      # neither of the two in BYOL with ViT.
      'projector_out_bn': Knob(True),
      'predictor_out_bn': Knob(True),
      # BatchNorm (with scale and offset) before each ReLU of the heads. Paper
      # s6.2: without any BatchNorm 74.4 instead of 76.5 %.
      'hidden_bn': Knob(True),
      # SwAV: number of prototypes, which replace the predictor (arXiv
      # 2006.09882: 3000).
      'prototypes': Knob(0, within(0, 2**24)),
  }


def _objective() -> Schema:
  return {
      # 'moco_v3', 'simclr' (no target, no predictor: head.predictor_layers=0),
      # 'byol' (no negatives) or 'swav' (no target; see head.prototypes).
      'name': Knob('moco_v3'),
      # MoCo v3: whether both views are queries.
      'symmetric': Knob(True),
      # MoCo v3: number of keys of earlier steps that serve as further
      # negatives, for small batches. MoCo v2 (arXiv 2003.04297) uses 65536 with
      # a batch of 256; paper s3 uses none.
      'queue': Knob(0, NOT_NEGATIVE),
      # Temperature of the softmax. Paper s5: 0.2 (ResNet-50: 1.0). SwAV: 0.1.
      'temperature': Knob(0.2, POSITIVE),
      # SwAV (arXiv 2006.09882): smoothness of the codes, and number of Sinkhorn
      # iterations that balance them.
      'sinkhorn_epsilon': Knob(0.05, POSITIVE),
      'sinkhorn_iterations': Knob(3, within(1, 1000)),
      # Momentum of the target network at the start, and its schedule:
      # 'constant', or 'cosine' = a half cosine that reaches 1 at the end. Paper
      # s6.2: 0.99; release: cosine.
      'momentum': Knob(0.99, SHARE),
      'momentum_schedule': Knob('cosine'),
  }


def _optimizer() -> Schema:
  return {
      # 'adamw', 'lars' or 'lamb'.
      'name': Knob('adamw'),
      # Peak learning rate per 256 images: peak = lr_per_256 * batch_size / 256
      # (paper s5). Release: 1.5e-4 for ViT, 0.3 to 0.6 for ResNet-50 with LARS.
      'lr_per_256': Knob(1.5e-4, NOT_NEGATIVE),
      # Weight decay: decoupled (AdamW, LAMB), or added to the gradient (LARS).
      # Release: 0.1 for AdamW, 1e-6 for LARS; paper s4.1: 1e-3 for LAMB.
      'weight_decay': Knob(0.1, NOT_NEGATIVE),
      # AdamW and LAMB decay 'all' trainable tensors, as the release does, or
      # only 'matrices': weights of linear layers and convolutions. LARS decays
      # tensors with more than one axis.
      'decay_mask': Knob('all'),
      # Decay rates of the moments, and epsilon, of AdamW and LAMB: PyTorch's
      # defaults, as in the release.
      'b1': Knob(0.9, BELOW_ONE),
      'b2': Knob(0.999, BELOW_ONE),
      'eps': Knob(1e-8, POSITIVE),
      # With model.patch_embed=clipped: the largest L2 norm of the gradient of
      # the patch projection. Paper s4.2 gives no number. AdamW divides out
      # constant factors, so a small threshold only evens out spikes.
      'patch_embed_clip': Knob(1e-2, POSITIVE),
      # AdamW: if the RMS of a tensor's g / sqrt(v) exceeds this bound, the
      # tensor's learning rate is divided by RMS / bound. StableAdamW (Wortsman
      # et al. 2023, arXiv 2304.13013) uses a bound of 1.
      'update_clip': Knob(0.0, NOT_NEGATIVE, added=True, zero='no bound'),
      # ViT: factor by which the learning rate falls from each block to the one
      # below it (Bao et al. 2022, arXiv 2106.08254); 1 = the same rate
      # everywhere.
      'layer_decay': Knob(1.0, SHARE_ABOVE_ZERO, added=True),
      # LARS: heavy-ball momentum and trust coefficient, as in the release.
      'momentum': Knob(0.9, BELOW_ONE),
      'trust_coefficient': Knob(1e-3, POSITIVE),
  }


def knn() -> Schema:
  """Returns the knobs that all kNN classifications share.

  As in Wu et al. 2018 (arXiv 1805.01978), a neighbour's vote has the weight
  exp(cosine / temperature). k is capped at a sixth of the mean number of bank
  images per class.
  """
  return {'k': Knob(200, AT_LEAST_ONE), 'temperature': Knob(0.07, POSITIVE)}


@dataclasses.dataclass(frozen=True)
class Plan:
  """The schedule in steps, and the peak learning rate.

  Attributes:
    steps_per_epoch: full batches in one pass over the data.
    total_steps: optimizer steps of the run.
    warmup_steps: steps of linear warm-up, within `total_steps`.
    peak_lr: learning rate at the end of the warm-up.
  """

  steps_per_epoch: int
  total_steps: int
  warmup_steps: int
  peak_lr: float


def plan(
    config: ConfigDict, num_examples: int, lr_per_256: float | None = None
) -> Plan:
  """Turns epochs into steps and lr per 256 images into a learning rate.

  Args:
    config: a config with `batch_size`, `schedule` and `data.source`.
    num_examples: number of images in the training set.
    lr_per_256: learning rate per 256 images; None = that of `config.optimizer`.

  Raises:
    UserError: if the data set is smaller than a batch, the training has no
      step, or the warm-up is longer than the training or its only step.
  """
  steps_per_epoch = num_examples // config.batch_size
  if steps_per_epoch == 0:
    raise UserError(
        f'batch_size={config.batch_size} is larger than the '
        f'{num_examples} training images of data.source='
        f'{config.data.source!r}. Allowed: at most {num_examples}.'
    )
  schedule = config.schedule
  total = schedule.steps or round(schedule.epochs * steps_per_epoch)
  warmup = round(schedule.warmup_epochs * steps_per_epoch)
  # The warm-up begins with a rate of 0, so its first step learns nothing.
  if total < 1 or warmup > total or total == 1 == warmup:
    raise UserError(
        f'schedule.warmup_epochs={schedule.warmup_epochs} is {warmup} steps, '
        f'but the training is {total} steps long (schedule.epochs='
        f'{schedule.epochs}, schedule.steps={schedule.steps}, '
        f'{steps_per_epoch} steps per epoch). Use at least one step, and a '
        'warm-up that is no longer than the training (set both); or a single '
        'step without warm-up.'
    )
  if lr_per_256 is None:
    lr_per_256 = config.optimizer.lr_per_256
  peak_lr = lr_per_256 * config.batch_size / 256
  return Plan(steps_per_epoch, total, warmup, peak_lr)


# Fields that may change when a run is continued.
FREE_ON_RESUME = knobs.free_fields(schema())
