"""The same training step in PyTorch, as the baseline of `benchmark step`.

It is written for speed, as current PyTorch code would be: timm backbones with
fused attention, both views through a ViT's trunk in one call, bfloat16
autocast, torch.compile, a fused optimizer (AdamW) and a foreach EMA. Nothing
else imports it.
"""

import contextlib
import functools

from ml_collections import ConfigDict
import timm
import torch
from torch import nn
import torch.nn.functional as F

from mocov3_jax import models
from mocov3_jax.base.errors import UserError


def head(sizes: list[int], out_affine: bool | None) -> nn.Sequential:
  """Returns linear layers with BatchNorm and ReLU between them.

  Args:
    sizes: the width of the input, then of each layer's output.
    out_affine: whether the BatchNorm after the last layer has scale and offset;
      None = no BatchNorm there.
  """
  layers = []
  for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
    layers.append(nn.Linear(inputs, outputs, bias=False))
    if i < len(sizes) - 2:
      layers += [nn.BatchNorm1d(outputs), nn.ReLU()]
    elif out_affine is not None:
      layers.append(nn.BatchNorm1d(outputs, affine=out_affine))
  return nn.Sequential(*layers)


class Encoder(nn.Module):
  """Backbone and projector."""

  def __init__(self, config: ConfigDict):
    super().__init__()
    c, h = config.model, config.head
    self.is_vit = c.name in models.VITS
    if self.is_vit:
      depth, dim, heads = models.VITS[c.name]
      self.trunk = timm.models.VisionTransformer(
          img_size=config.data.image_size, patch_size=c.patch_size,
          in_chans=len(config.data.mean), num_classes=0,
          embed_dim=c.dim or dim, depth=c.depth or depth,
          num_heads=c.num_heads or heads,
      )
      self.trunk.pos_embed.requires_grad_(False)
      if c.patch_embed == 'frozen':
        self.trunk.patch_embed.requires_grad_(False)
    else:
      self.trunk = timm.create_model(
          c.name, num_classes=0, in_chans=len(config.data.mean)
      ).to(memory_format=torch.channels_last)
    sizes = [self.trunk.num_features]
    sizes += [h.hidden_dim] * (h.projector_layers - 1) + [h.out_dim]
    self.projector = head(sizes, out_affine=False)

  def forward(self, views: torch.Tensor) -> list[torch.Tensor]:
    """Maps views [2, B, C, H, W] to two projections, each [B, out_dim]."""
    if self.is_vit:  # LayerNorm does not mix images; a ResNet's BatchNorm does.
      features = self.trunk(views.flatten(0, 1)).chunk(2)
    else:
      features = [self.trunk(view) for view in views]
    return [self.projector(x) for x in features]


def contrast(
    q: torch.Tensor, k: torch.Tensor, temperature: float
) -> torch.Tensor:
  """Returns 2T * InfoNCE, in float32."""
  q, k = (F.normalize(x.float(), dim=1) for x in (q, k))
  labels = torch.arange(len(q), device=q.device)
  return 2 * temperature * F.cross_entropy(q @ k.T / temperature, labels)


class TorchStep:
  """The state and the step of training on random views, on one device.

  Raises:
    UserError: for a config that this baseline does not implement.
  """

  def __init__(self, config: ConfigDict, compiled: bool):
    """Builds the networks.

    Args:
      config: the config of the run.
      compiled: whether to use torch.compile.
    """
    self._check(config)
    torch.set_float32_matmul_precision('high')  # TF32, as JAX has it.
    self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    with self.device:
      self.base, self.momentum = Encoder(config), Encoder(config)
      width = config.head.out_dim
      sizes = [width, *[config.head.hidden_dim]
               * (config.head.predictor_layers - 1), width]
      self.predictor = head(
          sizes, out_affine=False if config.head.predictor_out_bn else None
      )
    self.momentum.load_state_dict(self.base.state_dict())
    self.momentum.requires_grad_(False)
    self._temperature = config.objective.temperature
    self._rate = 1 - config.objective.momentum
    self._optimizer = self._build_optimizer(config)
    self._precision = contextlib.nullcontext
    if config.model.dtype == 'bfloat16':
      self._precision = functools.partial(
          torch.autocast, self.device.type, torch.bfloat16
      )
    self._loss = torch.compile(self.loss) if compiled else self.loss
    size = config.data.image_size
    self._views = torch.randn(
        2, config.batch_size, len(config.data.mean), size, size,
        device=self.device,
    )

  def _check(self, config):
    c, h, o = config.model, config.head, config.objective
    plain = c.positions == 'sincos' and c.readout == 'cls'
    plain &= c.patch_embed in ('frozen', 'learned') and c.mlp_norm == 'layer'
    plain &= not c.small_images and not (c.name in models.RESNETS and c.dim)
    plain &= h.hidden_bn and h.projector_out_bn and h.predictor_layers > 0
    plain &= o.name == 'moco_v3' and o.symmetric and not o.queue
    plain &= config.optimizer.name in ('adamw', 'lars')
    if not plain:
      raise UserError(
          f'model.name={c.name!r} with these options has no PyTorch step to '
          'compare with. Allowed: moco_v3 with an unmodified ViT or ResNet, '
          'and adamw or lars; or --against=none.'
      )

  def _build_optimizer(self, config):
    c = config.optimizer
    params = [
        p for p in (*self.base.parameters(), *self.predictor.parameters())
        if p.requires_grad
    ]
    rate = c.lr_per_256 * config.batch_size / 256
    if c.name == 'lars':
      return timm.optim.Lars(
          params, rate, c.momentum, weight_decay=c.weight_decay
      )
    return torch.optim.AdamW(
        params, rate, (c.b1, c.b2), c.eps, c.weight_decay, fused=True
    )

  def loss(self, views: torch.Tensor) -> torch.Tensor:
    """Returns the loss of views [2, B, C, H, W]."""
    with self._precision():
      with torch.no_grad():
        k1, k2 = self.momentum(views)
      q1, q2 = (self.predictor(z) for z in self.base(views))
    return (
        contrast(q1, k2, self._temperature)
        + contrast(q2, k1, self._temperature)
    )

  def __call__(self) -> None:
    """Takes a step on the random views that are on the device already."""
    self.update(self._views)

  def update(self, views: torch.Tensor) -> torch.Tensor:
    """Takes a step on views [2, B, C, H, W]; returns the loss."""
    with torch.no_grad():
      torch._foreach_lerp_(
          list(self.momentum.parameters()), list(self.base.parameters()),
          self._rate,
      )
    loss = self._loss(views)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self._optimizer.step()
    return loss.detach()

  def wait(self) -> None:
    """Waits until the device has finished all steps."""
    if self.device.type == 'cuda':
      torch.cuda.synchronize()

  def memory(self) -> int | None:
    """Returns the peak memory of tensors in bytes; None on a CPU."""
    if self.device.type == 'cuda':
      return torch.cuda.max_memory_allocated()
    return None
