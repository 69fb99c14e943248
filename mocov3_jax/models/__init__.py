"""Backbone + projector + predictor, built from the config by one table."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mocov3_jax.errors import UserError, unknown
from mocov3_jax.models.heads import MlpHead
from mocov3_jax.models.vit import ViT

# Blocks, width, attention heads. [P] tables 2 and 3: ViT-S has 12 heads where
# DeiT's has 6. ViT-Ti is DeiT's (Touvron et al. 2021).
VITS = {
    'vit_ti': (12, 192, 3),
    'vit_s': (12, 384, 12),
    'vit_b': (12, 768, 12),
    'vit_l': (24, 1024, 16),
    'vit_h': (32, 1280, 16),
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@flax.struct.dataclass
class Embeddings:
  """What one network makes of two views; the second axis is the view.

  Attributes:
    features: backbone output [B, 2, dim], float32.
    projections: projector output [B, 2, out_dim], float32.
    predictions: predictor output [B, 2, out_dim], float32; None where the
      network has no predictor (the target).
  """

  features: jax.Array
  projections: jax.Array
  predictions: jax.Array | None = None


class Network(nn.Module):
  """The encoder (backbone and projector) and the predictor on top of it."""

  backbone: nn.Module
  projector: nn.Module
  predictor: nn.Module

  def __call__(self, views: jax.Array, train: bool) -> Embeddings:
    """Maps two views [B, 2, H, W, C] to all embeddings."""
    encoded = self.encode(views, train)
    predictions = _per_view(self.predictor, encoded.projections, train)
    return encoded.replace(predictions=predictions)

  def encode(self, views: jax.Array, train: bool) -> Embeddings:
    """The same without the predictor: all that the target network does."""
    # The views lie side by side within an example, so merging them into one
    # batch for the trunk moves nothing between devices.
    batch = views.reshape(-1, *views.shape[2:])  # [2B, H, W, C]
    features = self.features(batch, train).reshape(*views.shape[:2], -1)
    return Embeddings(features, _per_view(self.projector, features, train))

  def features(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to backbone features [B, dim], float32."""
    return _at_least_float32(self.backbone(images, train))


def _per_view(head: nn.Module, x: jax.Array, train: bool) -> jax.Array:
  # One call a view: BatchNorm must not mix the views ([P] App. A, option ii).
  views = [head(x[:, v], train) for v in range(x.shape[1])]
  return _at_least_float32(jnp.stack(views, axis=1))


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def build(model: ConfigDict, head: ConfigDict, image_size: int) -> Network:
  """Builds the network that `config.model` and `config.head` describe.

  Raises:
    UserError: for a name that is not in the tables, heads that do not divide
      the width, or an image that is not a whole number of patches.
  """
  if model.name not in VITS:
    raise unknown('model.name', model.name, VITS)
  if model.dtype not in DTYPES:
    raise unknown('model.dtype', model.dtype, DTYPES)
  if model.patch_embed not in ('frozen', 'learned'):
    raise unknown('model.patch_embed', model.patch_embed, ('frozen', 'learned'))
  depth, dim, num_heads = VITS[model.name]
  depth, dim = model.depth or depth, model.dim or dim
  num_heads = model.num_heads or num_heads
  if dim % num_heads:
    raise UserError(
        f'model.num_heads={num_heads} does not divide model.dim={dim}. '
        'Allowed: a divisor of the width.'
    )
  if dim % 4:
    raise UserError(
        f'model.dim={dim} has no sine-cosine positions. Allowed: a multiple '
        'of 4.'
    )
  if image_size % model.patch_size:
    raise UserError(
        f'data.image_size={image_size} is not a whole number of patches of '
        f'model.patch_size={model.patch_size}. Allowed: a multiple of it.'
    )
  dtype = DTYPES[model.dtype]
  return Network(
      backbone=ViT(
          patch_size=model.patch_size,
          dim=dim,
          depth=depth,
          num_heads=num_heads,
          freeze_patch_embed=model.patch_embed == 'frozen',
          dtype=dtype,
      ),
      projector=MlpHead(
          head.projector_layers, head.hidden_dim, head.out_dim, dtype=dtype
      ),
      predictor=MlpHead(
          head.predictor_layers,
          head.hidden_dim,
          head.out_dim,
          out_bn=head.predictor_out_bn,
          dtype=dtype,
      ),
  )
