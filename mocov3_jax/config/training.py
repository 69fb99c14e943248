"""Every knob of a run, once: its default, unit and source.

A recipe in configs/ starts from `default_config()` and changes what its row
of the paper changes. Sources in the comments: [P] is the paper (Chen, Xie, He,
ICCV 2021, arXiv 2104.02057), [R] the README and CONFIG of its PyTorch release.
"""

import dataclasses

from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError

# Images of ImageNet's training set.
IMAGENET_IMAGES = 1_281_167


def default_config() -> ConfigDict:
  """Returns the defaults, locked: ViT-S/16, 224 px, batch 4096, 300 epochs."""
  c = ConfigDict()
  # Seeds the initialisation, the order of the data and the augmentation.
  c.seed = 0
  # Images per optimizer step over all devices. [P] s5: 4096.
  c.batch_size = 4096
  # Images per device and pass through the trunk: bounds the memory of its
  # activations, for a second forward pass. The result is the same. 0 = all
  # images of the device at once.
  c.micro_batch = 0
  # Devices over which parameters, target, statistics and optimizer state are
  # split (FSDP); 1 = each device holds all of them. The result is the same.
  c.fsdp_devices = 1
  c.data = _data()
  c.augment = ConfigDict({
      'view1': view(blur_prob=1.0, solarize_prob=0.0),
      'view2': view(blur_prob=0.1, solarize_prob=0.2),
  })
  c.model = _model()
  c.head = _head()
  c.objective = _objective()
  c.optimizer = _optimizer()
  c.schedule = _schedule()

  c.knn = ConfigDict()
  # Steps between two runs of the kNN monitor; 0 = only where a checkpoint is
  # saved. [P] App. A: "every tens of iterations".
  c.knn.every_steps = 50
  # Images in the bank and to classify, evenly spaced over the splits; 0 =
  # all. Bounds the time of the monitor; CIFAR's splits are as large.
  c.knn.bank_images = 50_000
  c.knn.query_images = 10_000
  # Share of the training images in a second monitor, a queue of the features
  # that training itself computes, asked at every step; 0 = none. Needs
  # labels. [P] App. A: 0.1.
  c.knn.queue_share = 0.0
  knn(c.knn)

  c.log = ConfigDict()
  # Steps between two lines of metrics.jsonl. 1 shows every gradient spike.
  c.log.every_steps = 1
  # Gradients of every block and head, not of the first and last layer alone.
  c.log.blocks = False

  c.save = ConfigDict()
  # Steps between two checkpoints (one more is saved at the end), the newest
  # kept, and beside them the best by kNN (0 = none).
  c.save.every_steps = 1000
  c.save.keep_latest = 2
  c.save.keep_best = 1
  return c.lock()


def _data() -> ConfigDict:
  c = ConfigDict()
  # Where the images come from: 'digits', 'folder:PATH', 'tfds:NAME[:SPLIT]'.
  c.source = 'digits'
  # Labels of a folder, for the kNN monitor alone: 'auto' = the names of its
  # subfolders, if it has such; 'none'; or the path of a CSV file with the
  # columns path and label.
  c.labels = 'auto'
  # Side of the square crop the model sees, pixels. [P] s5: 224.
  c.image_size = 224
  # Of each channel, pixels in [0, 1]. [R]: ImageNet's.
  c.mean = (0.485, 0.456, 0.406)
  c.std = (0.229, 0.224, 0.225)
  # Batches read ahead of the device (uint8, in the host's memory), and threads
  # that read and decode images; 0 = one a core.
  c.prefetch = 4
  c.threads = 0
  # Training stops when more than this share of an epoch's images could not
  # be read (each is replaced by another).
  c.max_unreadable = 0.01
  return c


def view(blur_prob: float, solarize_prob: float) -> ConfigDict:
  """Returns the table of one view."""
  # All values from [R]; the paper lists the operations only. In the order in
  # which they are applied; a probability of 0 takes an operation out.
  c = ConfigDict()
  # Random resized crop: smallest share of the image's area (the largest is 1)
  # and the range of width / height. [R]: 0.08 for ViT, 0.2 for ResNet.
  c.crop_min = 0.08
  c.crop_ratio = (3 / 4, 4 / 3)
  # Colour jitter: half-widths of the factors round 1, and of the hue's shift
  # round 0 (at most 0.5, half of the circle).
  c.jitter_prob = 0.8
  c.brightness = 0.4
  c.contrast = 0.4
  c.saturation = 0.2
  c.hue = 0.1
  c.gray_prob = 0.2  # Grayscale.
  # Gaussian blur, and the range of its standard deviation, pixels.
  c.blur_prob = blur_prob
  c.blur_sigma = (0.1, 2.0)
  # Solarize: inverts pixels of 128 and more.
  c.solarize_prob = solarize_prob
  c.flip_prob = 0.5  # Horizontally.
  return c


def _model() -> ConfigDict:
  c = ConfigDict()
  # Backbone: 'vit_ti', 'vit_s', 'vit_b', 'vit_l', 'vit_h' ([P] tables 2, 3),
  # 'resnet18', 'resnet34', 'resnet50', 'resnet101'.
  c.name = 'vit_s'
  # Width: of a ViT's tokens, of a ResNet's stem; 0 = that of `name`.
  c.dim = 0
  # ViT: blocks and attention heads; 0 = those of `name`, and a block fewer
  # with the convolutional stem.
  c.depth = 0
  c.num_heads = 0
  # ViT: side of a patch, pixels.
  c.patch_size = 16
  # ViT: 'frozen' = the random patch projection that [P] s4.2 finds stable;
  # 'learned' = trained like the rest; with its gradient 'clipped' (see
  # optimizer.patch_embed_clip), or with 'batch_norm' or 'weight_norm', which
  # s4.2 tried as well; 'conv' = a learned stem of convolutions with BatchNorm
  # ([R]'s ViT-Conv).
  c.patch_embed = 'frozen'
  # ViT: position embedding, 'sincos' (fixed), 'learned' or 'none', and what
  # makes one vector of the tokens: 'cls' = the class token after the final
  # LayerNorm; 'norm_pool' = their mean after it; 'pool' = their mean without
  # one. [P] s6.2: 76.5, 76.1, 74.9 %; 76.5, 69.7, 76.3 % (ViT-B, 300 epochs).
  c.positions = 'sincos'
  c.readout = 'cls'
  # ViT: before the blocks' MLPs, 'layer' norm, or 'batch' norm = the ViT-BN
  # of [P] s6.3 (about 1 point better).
  c.mlp_norm = 'layer'
  # ViT: recompute blocks in the backward pass, for less memory; run them as
  # one loop, for a shorter compilation. Neither changes a result.
  c.remat = False
  c.scan = False
  # ResNet: a 3x3 stem without stride and pooling, for 64 pixels and less.
  c.small_images = False
  # Arithmetic of the trunk and heads: 'float32' (products at the backend's
  # default precision) or 'bfloat16'. Parameters, statistics, logits and loss
  # are float32 in both.
  c.dtype = 'float32'
  return c


def _head() -> ConfigDict:
  c = ConfigDict()
  # Layers of the projector and the predictor MLP. [P] s5: 3 and 2 for ViT; [R]:
  # 2 and 2 for ResNet. 0 = no predictor (s6.2: 75.5 instead of 76.5 %).
  c.projector_layers = 3
  c.predictor_layers = 2
  # Hidden and output width of both. [P] s5.
  c.hidden_dim = 4096
  c.out_dim = 256
  # BatchNorm (no scale, no offset) on their outputs. [R]: on ResNet's predictor
  # not; [P] App. A: on neither in BYOL with ViT.
  c.projector_out_bn = True
  c.predictor_out_bn = True
  # BatchNorm (with both) before each ReLU. [P] s6.2: without any BatchNorm 74.4
  # instead of 76.5 %.
  c.hidden_bn = True
  # SwAV: prototypes in the place of a predictor (arXiv 2006.09882: 3000).
  c.prototypes = 0
  return c


def _objective() -> ConfigDict:
  c = ConfigDict()
  # 'moco_v3', 'simclr' (no target, no predictor: head.predictor_layers=0),
  # 'byol' (no negatives) or 'swav' (no target; see head.prototypes).
  c.name = 'moco_v3'
  c.symmetric = True  # MoCo v3: whether both views are queries.
  # MoCo v3: keys of earlier steps that are negatives too, for small batches.
  # MoCo v2 (arXiv 2003.04297): 65536 with a batch of 256. [P] s3: 0.
  c.queue = 0
  # Temperature of the softmax. [P] s5: 0.2 (ResNet-50: 1.0). SwAV: 0.1.
  c.temperature = 0.2
  # SwAV (arXiv 2006.09882): smoothness of the codes, rounds of balancing them.
  c.sinkhorn_epsilon = 0.05
  c.sinkhorn_iterations = 3
  # Momentum of the target network at the start, and how it moves: 'constant',
  # or 'cosine' = by a half cosine to 1 at the end. [P] s6.2: 0.99; [R]: cosine.
  c.momentum = 0.99
  c.momentum_schedule = 'cosine'
  return c


def _optimizer() -> ConfigDict:
  c = ConfigDict()
  c.name = 'adamw'  # Or 'lars', 'lamb'.
  # Peak learning rate per 256 images: peak = lr_per_256 * batch_size / 256.
  # [P] s5; [R]: 1.5e-4 for ViT, 0.3 to 0.6 for ResNet-50 with LARS.
  c.lr_per_256 = 1.5e-4
  # Decoupled decay (AdamW, LAMB); added to the gradient (LARS). [R]: 0.1 for
  # AdamW, 1e-6 for LARS; [P] s4.1: 1e-3 for LAMB.
  c.weight_decay = 0.1
  # AdamW and LAMB decay 'all' trainable tensors, as [R], or only 'matrices':
  # weights of linear layers and convolutions. LARS decays ndim > 1 alone.
  c.decay_mask = 'all'
  # Moments of AdamW and LAMB. [R]: PyTorch's defaults.
  c.b1 = 0.9
  c.b2 = 0.999
  c.eps = 1e-8
  # With model.patch_embed=clipped: largest L2 norm of that gradient. [P] s4.2
  # has no number. AdamW divides a factor out: it evens out spikes, no more.
  c.patch_embed_clip = 1e-2
  # LARS: heavy-ball momentum and trust coefficient. [R].
  c.momentum = 0.9
  c.trust_coefficient = 1e-3
  return c


def _schedule() -> ConfigDict:
  c = ConfigDict()
  # Passes over the data; an epoch drops the remainder of a batch, as [R].
  c.epochs = 300.0
  c.steps = 0  # Optimizer steps in all; 0 = as many as `epochs` gives.
  # Epochs of linear warm-up from 0; then half a cosine to 0. [P] s5: 40.
  c.warmup_epochs = 40.0
  return c


def knn(c: ConfigDict) -> ConfigDict:
  """Adds what every kNN classification needs."""
  # Wu et al. 2018 (arXiv 1805.01978): votes by exp(cosine / temperature). k is
  # capped at a sixth of the mean number of bank images a class.
  c.k = 200
  c.temperature = 0.07
  return c


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the epochs and the learning rate per 256 images come to.

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
    config: with `batch_size`, `schedule` and `data.source`.
    num_examples: in the training set.
    lr_per_256: default: that of `config.optimizer`.

  Raises:
    UserError: if the data set is smaller than a batch, or the warm-up longer
      than the training.
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
  if total < 1 or warmup > total:
    raise UserError(
        f'schedule.warmup_epochs={schedule.warmup_epochs} is {warmup} steps, '
        f'but the training is {total} steps long (schedule.epochs='
        f'{schedule.epochs}, schedule.steps={schedule.steps}, '
        f'{steps_per_epoch} steps an epoch). Allowed: a training of at least '
        'one step, and a warm-up no longer than it (set both).'
    )
  if lr_per_256 is None:
    lr_per_256 = config.optimizer.lr_per_256
  peak_lr = lr_per_256 * config.batch_size / 256
  return Plan(steps_per_epoch, total, warmup, peak_lr)
