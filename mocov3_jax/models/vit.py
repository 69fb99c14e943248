"""The vision transformer of MoCo v3 (Dosovitskiy et al. 2021; paper s5)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mocov3_jax.models.attention import Tokens
from mocov3_jax.models.block import Block
from mocov3_jax.models.execution import REFERENCE, Execution
from mocov3_jax.models.layers import LayerNorm
from mocov3_jax.models.stem import ConvStem, PatchEmbed

# The values that `ViT.patch_embed` can have.
PATCH_EMBEDS = (
    'frozen', 'learned', 'clipped', 'batch_norm', 'weight_norm', 'conv'
)


def sincos_positions(height: int, width: int, dim: int) -> np.ndarray:
  """Returns fixed 2-D sine-cosine positions, after a zero row for the class.

  The four quarters of the channels are sin(row), cos(row), sin(column),
  cos(column) at frequencies 10000^(-i / (dim / 4)). On square grids this is
  the published table. On other grids, the original code assigns the positions
  of the transposed grid; here token t always gets its own position,
  (t // width, t % width).

  Args:
    height, width: the size of the grid, in patches.
    dim: the number of channels, a multiple of 4.

  Returns:
    float32 [1, 1 + height * width, dim], with the patches in row-major order.
  """
  omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))  # [dim / 4]
  row, column = np.divmod(np.arange(height * width), width)  # [T]
  row, column = row[:, None] * omega, column[:, None] * omega  # [T, dim / 4]
  table = np.concatenate(
      [np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1
  )
  return np.pad(table, ((1, 0), (0, 0)))[None].astype(np.float32)


class ViT(nn.Module):
  """Maps each image to one feature vector.

  Attributes:
    patch_size: side of a patch in pixels; divides both sides of the image.
    dim, depth, num_heads: width, number of blocks and of attention heads.
    patch_embed: 'frozen' = a random linear projection, with the gradient
      stopped right after it (paper s4.2; the optimizer must not update it
      either); 'learned'; 'clipped' = learned, with a gradient that the
      optimizer must clip; 'batch_norm', 'weight_norm' = learned, with that
      normalisation (also paper s4.2); 'conv' = `ConvStem`, always learned.
    frozen_blocks: how many of the first blocks stay random and frozen, like a
      'frozen' patch projection, together with everything before them. The
      gradient stops right after them.
    positions: 'sincos' (fixed), 'learned' or 'none' (paper s6.2).
    readout: 'cls' = class token after the final LayerNorm; 'norm_pool' = mean
      over the tokens after the final LayerNorm; 'pool' = mean over the tokens
      without a final LayerNorm (paper s6.2). Only 'cls' has a class token.
    mlp_norm: see `Block`.
    drop_path: see `Block`; the rate in the last block. It grows linearly from
      0 in the first one.
    remat: recompute each block in the backward pass instead of keeping its
      inner activations.
    scan: run the blocks as one compiled loop. This divides the compile time by
      the number of blocks, but copies their weights in every step. The
      parameter tree is the same.
    mlp_ratio: hidden width of a block's MLP divided by `dim`.
    dtype: dtype of the computation; parameters stay float32.
    execution: how the blocks are computed; it does not change the result.
  """

  patch_size: int
  dim: int
  depth: int
  num_heads: int
  patch_embed: str = 'frozen'
  frozen_blocks: int = 0
  positions: str = 'sincos'
  readout: str = 'cls'
  mlp_norm: str = 'layer'
  drop_path: float = 0.0
  remat: bool = False
  scan: bool = False
  mlp_ratio: int = 4
  dtype: jnp.dtype = jnp.float32
  execution: Execution = REFERENCE

  # From here on: what the training step needs to know about a backbone.
  first_layer = 'patch_embed'

  @property
  def blocks(self) -> tuple[str, ...]:
    """Names of the blocks in the parameter tree, in order."""
    return tuple(f'blocks_{i}' for i in range(self.depth))

  def tokens(self, image_size: int) -> int:
    """Returns how many tokens a square image of this side becomes."""
    patches = (image_size // self.patch_size) ** 2
    return patches + (self.readout == 'cls')

  @property
  def has_batch_norm(self) -> bool:
    """Whether an image's features depend on the other images of its batch."""
    normed = self.patch_embed in ('conv', 'batch_norm')
    return normed or self.mlp_norm == 'batch'

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of the backbone's parameters that must not be updated."""
    if self.patch_embed != 'frozen':
      return ()
    if not self.frozen_blocks:
      return ('patch_embed',)
    return (
        'patch_embed', 'cls_token', 'pos_embed',
        *self.blocks[:self.frozen_blocks],
    )

  @property
  def clip_patch_embed(self) -> bool:
    """Whether the first layer's gradient must be clipped."""
    return self.patch_embed == 'clipped'

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, dim]."""
    batch = len(images)
    execution = self.execution.for_images(batch)
    x = self._embed(images, train)  # [B, T, D]
    real = rows = x.shape[1]
    # Padding would distort the statistics of a BatchNorm.
    if self.mlp_norm == 'layer':
      rows = execution.padded(real)
    x = jnp.pad(x, [(0, 0), (0, rows - real), (0, 0)])
    # All tokens become the rows of one matrix: on CPUs, a gradient that
    # contracts over two axes takes a third longer than one over a single axis.
    # On other devices it makes no difference.
    x = self._blocks(
        x.reshape(-1, self.dim), Tokens(rows, real, rows), train, execution
    )
    x = x.reshape(batch, -1, self.dim)[:, :real]
    if self.readout == 'cls':
      x = x[:, 0]
    if self.readout != 'pool':
      x = LayerNorm(dtype=self.dtype, name='norm')(x)
    return x if self.readout == 'cls' else jnp.mean(x, axis=1)

  def _embed(self, images: jax.Array, train: bool) -> jax.Array:
    if self.patch_embed == 'conv':
      x = ConvStem(
          self.patch_size, self.dim, self.dtype, name='patch_embed'
      )(images, train)
    else:
      x = PatchEmbed(
          self.patch_size, self.dim,
          batch_norm=self.patch_embed == 'batch_norm',
          weight_norm=self.patch_embed == 'weight_norm',
          dtype=self.dtype, name='patch_embed',
      )(images, train)
    if self.patch_embed == 'frozen':
      x = jax.lax.stop_gradient(x)
    batch, rows, columns, _ = x.shape
    x = x.reshape(batch, -1, self.dim)
    if self.readout == 'cls':
      cls = self.param(
          'cls_token', nn.initializers.normal(1e-6), (1, 1, self.dim)
      )
      cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, self.dim))
      x = jnp.concatenate([cls, x], axis=1)
    if self.positions == 'none':
      return x
    if self.positions == 'learned':
      table = self.param(
          'pos_embed', nn.initializers.normal(0.02), (1, *x.shape[1:])
      )
    else:
      table = sincos_positions(rows, columns, self.dim)[:, -x.shape[1] :]
    return x + jnp.asarray(table, x.dtype)

  def _blocks(
      self, x: jax.Array, tokens: Tokens, train: bool, execution: Execution
  ) -> jax.Array:
    # `tokens` and `train` (arguments 2 and 3, counting self) are static.
    block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
    arguments = self.num_heads, self.dim * self.mlp_ratio, self.mlp_norm
    if self.scan and not self.is_initializing():
      one = block(*arguments, 0.0, self.dtype, execution, parent=None)
      params = self.variables['params']
      body = lambda x, p: (
          one.apply({'params': p}, x, tokens, train), None
      )

      def run(x, names):
        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *[params[n] for n in names]
        )
        return jax.lax.scan(body, x, stacked)[0]

      if self.frozen_blocks:
        x = jax.lax.stop_gradient(run(x, self.blocks[:self.frozen_blocks]))
      return run(x, self.blocks[self.frozen_blocks:])
    for i in range(self.depth):
      rate = self.drop_path * i / max(self.depth - 1, 1)
      # The last block computes only the class token if nothing else is read.
      # BatchNorm needs all tokens.
      last = i == self.depth - 1 and self.mlp_norm == 'layer'
      if last and self.readout == 'cls':
        tokens = tokens._replace(queries=1)
      x = block(*arguments, rate, self.dtype, execution, name=f'blocks_{i}')(
          x, tokens, train
      )
      if i + 1 == self.frozen_blocks:
        x = jax.lax.stop_gradient(x)
    return x
