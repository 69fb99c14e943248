"""A ResNet's MoCo v3 training in plain PyTorch, to compare ours with.

Written from the paper and the facts of its release.
"""

import torch
from torch import nn
import torch.nn.functional as F


class Bottleneck(nn.Module):
  """A residual block under torchvision's names."""

  def __init__(self, inputs, channels, stride):
    super().__init__()
    outputs = 4 * channels
    self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv2 = nn.Conv2d(
        channels, channels, 3, stride=stride, padding=1, bias=False
    )
    self.bn2 = nn.BatchNorm2d(channels)
    self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
    self.bn3 = nn.BatchNorm2d(outputs)
    self.downsample = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
        nn.BatchNorm2d(outputs),
    )

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class TinyResNet(nn.Module):
  """One bottleneck block a stage, and a projector."""

  def __init__(self, width, projector):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    inputs = [width, 4 * width, 8 * width, 16 * width]
    for i, stride in enumerate((1, 2, 2, 2)):
      block = Bottleneck(inputs[i], width * 2**i, stride)
      self.add_module(f'layer{i + 1}', nn.Sequential(block))
    self.fc = projector

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return self.fc(x.mean(dim=(2, 3)))


def mlp(inputs, hidden, outputs, out_bn):
  """Two layers as in the release's ResNet."""
  layers = [
      nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden),
      nn.ReLU(), nn.Linear(hidden, outputs, bias=False),
  ]
  return nn.Sequential(
      *layers, *[nn.BatchNorm1d(outputs, affine=False)] * out_bn
  )


class Networks(nn.Module):
  """The three networks, under the release's names."""

  def __init__(self, width, hidden, outputs):
    super().__init__()
    features = 32 * width
    make = lambda: TinyResNet(width, mlp(features, hidden, outputs, True))
    self.base_encoder, self.momentum_encoder = make(), make()
    self.predictor = mlp(outputs, hidden, outputs, False)


def contrast(q, k, temperature):
  """2T * InfoNCE."""
  logits = F.normalize(q) @ F.normalize(k).T / temperature
  return 2 * temperature * F.cross_entropy(logits, torch.arange(len(q)))


def loss(nets, x1, x2, momentum, temperature):
  """One forward pass; the momentum encoder moves in it."""
  q1, q2 = (nets.predictor(nets.base_encoder(x)) for x in (x1, x2))
  with torch.no_grad():
    pairs = zip(
        nets.momentum_encoder.parameters(), nets.base_encoder.parameters(),
        strict=True,
    )
    for target, online in pairs:
      target.mul_(momentum).add_(online, alpha=1 - momentum)
    k1, k2 = (nets.momentum_encoder(x) for x in (x1, x2))
  return contrast(q1, k2, temperature) + contrast(q2, k1, temperature)


@torch.no_grad()
def lars(parameters, buffers, rate, momentum, decay, trust):
  """One LARS update; the rate comes after the momentum buffer."""
  for p, buffer in zip(parameters, buffers, strict=True):
    g = p.grad
    if p.ndim > 1:
      g = g + decay * p
      norms = p.norm(), g.norm()
      if min(norms) > 0:
        g = g * (trust * norms[0] / norms[1])
    buffer.mul_(momentum).add_(g)
    p.sub_(rate * buffer)
