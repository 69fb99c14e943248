"""A backbone with a linear classifier on top, for fine-tuning."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Classifier(nn.Module):
  """A backbone and a linear classification layer.

  Attributes:
    backbone: a ViT or a ResNet.
    num_classes: number of outputs.
  """

  backbone: nn.Module
  num_classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to logits [B, num_classes], float32."""
    x = self.backbone(images, train)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    head = nn.Dense(
        self.num_classes,
        kernel_init=nn.initializers.truncated_normal(0.02), name='head',
    )
    return head(x)
