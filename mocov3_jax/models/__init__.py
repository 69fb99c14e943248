"""Networks of backbone, projector and predictor, built from the config."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax.base.errors import UserError, unknown
from mocov3_jax.config.training import schema
from mocov3_jax.models.execution import REFERENCE, Execution, choose
from mocov3_jax.models.heads import MlpHead, Prototypes
from mocov3_jax.models.resnet import ResNet
from mocov3_jax.models.vit import PATCH_EMBEDS, ViT
from mocov3_jax.parallel.microbatch import ONE_BATCH, MicroBatches

Backbone = ViT | ResNet

# Number of blocks, width, attention heads, from the paper's tables 2 and 3. Its
# ViT-S has 12 heads; that of DeiT has 6. ViT-Ti is that of DeiT (Touvron et al.
# 2021).
VITS = {
    'vit_ti': (12, 192, 3),
    'vit_s': (12, 384, 12),
    'vit_b': (12, 768, 12),
    'vit_l': (24, 1024, 16),
    'vit_h': (32, 1280, 16),
}
# Blocks per stage, and whether they are bottlenecks (He et al. 2016, table 1).
RESNETS = {
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
}
# Fields of config.model that are passed to ViT unchanged; ResNet has none.
VIT_OPTIONS = (
    'frozen_blocks', 'positions', 'readout', 'mlp_norm', 'remat', 'scan'
)
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
# The most patches per image: 4096 x 4096 pixels in patches of 16 x 16.
MOST_TOKENS = 2**16


@flax.struct.dataclass
class Embeddings:
  """The outputs of one network for two views; axis 1 is the view.

  Attributes:
    features: backbone output [B, 2, dim], float32.
    projections: projector output [B, 2, out_dim], float32.
    predictions: predictor output [B, 2, out_dim], or cosine similarities to
      prototypes [B, 2, prototypes], float32; None for the target network,
      which has neither.
  """

  features: jax.Array
  projections: jax.Array
  predictions: jax.Array | None = None


class Network(nn.Module):
  """The encoder (backbone and projector) and the predictor on top of it.

  Attributes:
    backbone, projector, predictor: the parts.
    micro_batches: how the batch is split on its way through the backbone.
  """

  backbone: Backbone
  projector: nn.Module
  predictor: nn.Module
  micro_batches: MicroBatches = ONE_BATCH

  def __call__(self, views: jax.Array, train: bool) -> Embeddings:
    """Maps two views [B, 2, H, W, C] to all embeddings."""
    encoded = self.encode(views, train)
    predictions = _per_view(self.predictor, encoded.projections, train)
    return encoded.replace(predictions=predictions)

  def encode(self, views: jax.Array, train: bool) -> Embeddings:
    """Maps views to embeddings without predictions, for the target network."""
    features = self.trunk(views, train)
    return Embeddings(features, _per_view(self.projector, features, train))

  def trunk(self, views: jax.Array, train: bool) -> jax.Array:
    """Maps views [B, 2, H, W, C] to features [B, 2, dim], in micro-batches."""
    if self.backbone.has_batch_norm:
      return _per_view(self.backbone, views, train)
    if self.is_initializing():
      return self._merged(views, train)
    # A loop can call only pure functions, not bound modules.
    module, variables = self.unbind()
    return self.micro_batches.map(
        lambda v: module.apply(variables, v, train, method='_merged'), views
    )

  def _merged(self, views: jax.Array, train: bool) -> jax.Array:
    # The views of an example are adjacent in memory, so merging them into one
    # batch moves no data between devices.
    batch = views.reshape(-1, *views.shape[2:])  # [2B, H, W, C]
    return self.features(batch, train).reshape(*views.shape[:2], -1)

  def features(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to backbone features [B, dim], float32."""
    return _at_least_float32(self.backbone(images, train))

  def project(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to projections [B, out_dim], float32."""
    features = self.features(images, train)
    return _at_least_float32(self.projector(features, train))


def _per_view(part: nn.Module, x: jax.Array, train: bool) -> jax.Array:
  # One call per view: BatchNorm must not mix views (paper App. A, option ii).
  views = [part(x[:, v], train) for v in range(x.shape[1])]
  return _at_least_float32(jnp.stack(views, axis=1))


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def build(
    model: ConfigDict, head: ConfigDict, image_size: int,
    micro_batches: MicroBatches = ONE_BATCH,
    execution: Execution = REFERENCE,
) -> Network:
  """Builds the network that `config.model` and `config.head` describe.

  Args:
    model: `config.model`.
    head: `config.head`.
    image_size: side of the images in pixels.
    micro_batches: how the batch is split on its way through the backbone.
    execution: how a ViT is computed; see `execution_on`.

  Raises:
    UserError: if a name is not in the tables, or numbers do not fit together.
  """
  backbone = build_backbone(model, image_size, execution=execution)
  if micro_batches.count > 1 and backbone.has_batch_norm:
    raise UserError(
        f'micro_batch cannot be used with model.name={model.name!r}, '
        f'model.patch_embed={model.patch_embed!r}, model.mlp_norm='
        f'{model.mlp_norm!r}: its BatchNorms need the statistics of the whole '
        'batch. Allowed: micro_batch=0, or a trunk without BatchNorm.'
    )
  heads = functools.partial(
      MlpHead,
      hidden_dim=head.hidden_dim,
      out_dim=head.out_dim,
      hidden_bn=head.hidden_bn,
      dtype=backbone.dtype,
  )
  predictor = heads(head.predictor_layers, out_bn=head.predictor_out_bn)
  return Network(
      backbone=backbone,
      projector=heads(head.projector_layers, out_bn=head.projector_out_bn),
      predictor=Prototypes(head.prototypes) if head.prototypes else predictor,
      micro_batches=micro_batches,
  )


def build_backbone(
    model: ConfigDict, image_size: int, drop_path: float = 0.0,
    execution: Execution = REFERENCE,
) -> Backbone:
  """Builds the backbone alone.

  Args:
    model: `config.model`.
    image_size: side of the images in pixels.
    drop_path: stochastic depth rate of a ViT, for fine-tuning.
    execution: how a ViT is computed.

  Raises:
    UserError: see `build`.
  """
  if model.dtype not in DTYPES:
    raise unknown('model.dtype', model.dtype, DTYPES)
  if model.name not in VITS and model.name not in RESNETS:
    raise unknown('model.name', model.name, [*VITS, *RESNETS])
  for field, given, allowed in (
      ('patch_embed', model.patch_embed, PATCH_EMBEDS),
      ('positions', model.positions, ('sincos', 'learned', 'none')),
      ('readout', model.readout, ('cls', 'norm_pool', 'pool')),
      ('mlp_norm', model.mlp_norm, ('layer', 'batch')),
  ):
    if given not in allowed:
      raise unknown(f'model.{field}', given, allowed)
  if model.name in RESNETS:
    return _resnet(model)
  if model.small_images:
    raise UserError(
        f'model.small_images=True is for ResNets, and model.name is '
        f'{model.name!r}. Allowed: False; a small model.patch_size.'
    )
  depth, dim, num_heads = VITS[model.name]
  depth -= model.patch_embed == 'conv'  # The stem costs about a block.
  vit = ViT(
      patch_size=model.patch_size,
      dim=model.dim or dim,
      depth=model.depth or depth,
      num_heads=model.num_heads or num_heads,
      patch_embed=model.patch_embed,
      drop_path=drop_path,
      dtype=DTYPES[model.dtype],
      execution=execution,
      **{name: model[name] for name in VIT_OPTIONS},
  )
  _check_vit(vit, image_size)
  return vit


def execution_on(
    mesh: Mesh, model: ConfigDict, image_size: int
) -> Execution:
  """Returns how a network is computed on a mesh, given `model.attention`.

  Args:
    mesh: the mesh that the batch is split over.
    model: `config.model`.
    image_size: side of the images in pixels.

  Raises:
    UserError: see `build_backbone` and `choose`.
  """
  backbone = build_backbone(model, image_size)
  device = mesh.devices.flat[0]
  if isinstance(backbone, ResNet):
    return REFERENCE
  name = choose(
      model.attention, device.platform, model.dtype,
      backbone.tokens(image_size), backbone.dim // backbone.num_heads,
      device.compute_capability if device.platform == 'gpu' else '',
  )
  # 'reference' must compute exactly what versions without a choice computed.
  keep_gelu = device.platform == 'tpu' and name != 'reference'
  return Execution(name, keep_gelu and not backbone.remat, mesh)


def _check_vit(vit: ViT, image_size: int) -> None:
  if vit.dim % vit.num_heads:
    raise UserError(
        f'model.num_heads={vit.num_heads} does not divide model.dim='
        f'{vit.dim}. Allowed: a divisor of the width.'
    )
  if vit.frozen_blocks and (
      vit.patch_embed != 'frozen' or vit.frozen_blocks >= vit.depth
  ):
    raise UserError(
        f'model.frozen_blocks={vit.frozen_blocks} needs model.patch_embed='
        f'frozen, which is {vit.patch_embed!r} here, and fewer than the '
        f'{vit.depth} blocks. Allowed: 0; or up to {vit.depth - 1}, with '
        'model.patch_embed=frozen.'
    )
  if vit.positions == 'sincos' and vit.dim % 4:
    raise UserError(
        f'model.dim={vit.dim} has no sine-cosine positions. Use a '
        'multiple of 4.'
    )
  if image_size % vit.patch_size:
    raise UserError(
        f'data.image_size={image_size} is not a whole number of patches of '
        f'model.patch_size={vit.patch_size}. Allowed: a multiple of it.'
    )
  tokens = (image_size // vit.patch_size) ** 2
  if tokens > MOST_TOKENS:
    raise UserError(
        f'data.image_size={image_size} is {tokens:,} patches of '
        f'model.patch_size={vit.patch_size}. Allowed: up to {MOST_TOKENS:,}.'
    )
  if vit.patch_embed == 'conv':
    size = vit.patch_size
    if size < 2 or size & (size - 1) or vit.dim % (size // 2):
      raise UserError(
          f'model.patch_embed=conv has no stem for model.patch_size={size} and '
          f'model.dim={vit.dim}. Allowed: a power of 2, half of which divides '
          'the width.'
      )
  if vit.scan and (vit.mlp_norm == 'batch' or vit.drop_path):
    raise UserError(
        'model.scan=True runs blocks that are all alike and without running '
        'statistics. Allowed: model.mlp_norm=layer, and no stochastic depth.'
    )


def _resnet(model: ConfigDict) -> ResNet:
  knobs = schema()['model']
  for field in ('depth', 'num_heads', 'attention', *VIT_OPTIONS):
    if model[field] != knobs[field].default:
      raise UserError(
          f'model.{field}={model[field]!r} is for ViTs, and model.name is '
          f'{model.name!r}. Allowed: {knobs[field].default!r}, its default.'
      )
  stage_sizes, bottleneck = RESNETS[model.name]
  return ResNet(
      stage_sizes,
      bottleneck,
      width=model.dim or 64,
      small_images=model.small_images,
      dtype=DTYPES[model.dtype],
  )
