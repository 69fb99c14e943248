"""How a network computes what it computes: a choice that changes no result.

Each choice depends on the platform, the dtype and the shapes alone, and not on
a measurement: all hosts of a run must choose the same, and so must the run when
it is continued.
"""

import dataclasses
import re

from jax.sharding import Mesh

from mocov3_jax.base.errors import UserError, unknown

# What runs on which platform; 'pallas' is interpreted on a CPU, for tests.
PLATFORMS = {
    'reference': ('cpu', 'gpu', 'tpu'),
    'einsum': ('cpu', 'gpu', 'tpu'),
    'pallas': ('cpu', 'tpu'),
    'cudnn': ('gpu',),
}
# For which the kernels of models/short_attention.py have been compiled, for
# v4, v5e, v5p and v6e: widths of a head, and the most tokens of an image.
PALLAS_HEADS = (32, 64, 80)
PALLAS_TOKENS = 584


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a ViT runs; any other way gives the same, up to rounding.

  Attributes:
    attention: one of `attention.ATTENTION`.
    keep_gelu: whether the backward pass of an MLP keeps the output of its GELU
      instead of computing it again: more memory traffic or more arithmetic.
    mesh: over which the batch is split; None = one device.
  """

  attention: str = 'reference'
  keep_gelu: bool = False
  mesh: Mesh | None = None

  def for_images(self, count: int) -> 'Execution':
    """Returns how to run on a batch of this many images.

    A batch that the mesh does not divide, as the one that initialises the
    parameters, is not split over it.
    """
    if self.mesh is None or count % self.mesh.size == 0:
      return self
    return REFERENCE

  def padded(self, tokens: int) -> int:
    """Returns how many rows an image's tokens are to take.

    With a multiple of 8 rows, a TPU need not move anything between [B * T, D]
    and [B, T, D].
    """
    return -(-tokens // 8) * 8 if self.attention == 'pallas' else tokens


# On any device, in any precision.
REFERENCE = Execution()


def choose(
    asked: str, platform: str, dtype: str, tokens: int, head_dim: int,
    capability: str = '',
) -> str:
  """Returns the implementation of attention to run.

  Args:
    asked: `config.model.attention`: a name, or 'auto'.
    platform: of the devices: 'cpu', 'gpu' or 'tpu'.
    dtype: `config.model.dtype`.
    tokens: of an image.
    head_dim: width of a head.
    capability: CUDA's compute capability of a GPU, such as '9.0'.

  Raises:
    UserError: for a name that is unknown, or cannot run there.
  """
  if asked == 'auto':
    return _auto(platform, dtype, tokens, head_dim, capability)
  if asked not in PLATFORMS:
    raise unknown('model.attention', asked, ('auto', *PLATFORMS))
  if platform not in PLATFORMS[asked]:
    raise UserError(
        f'model.attention={asked!r} does not run on a {platform.upper()}. '
        'Use auto.'
    )
  if asked == 'cudnn' and dtype != 'bfloat16':
    raise UserError(
        f"model.attention='cudnn' needs model.dtype=bfloat16, and it is "
        f'{dtype!r}. Use auto.'
    )
  return asked


def _auto(
    platform: str, dtype: str, tokens: int, head_dim: int, capability: str
) -> str:
  if dtype != 'bfloat16' or platform == 'cpu':
    return 'reference'
  if platform == 'tpu':
    short = tokens <= PALLAS_TOKENS and head_dim in PALLAS_HEADS
    return 'pallas' if short else 'einsum'
  # cuDNN wants Ampere or newer, and heads of whole 16 bytes. Its backward pass
  # gives NaN for 64 keys more than a multiple of 128; odd ones are padded.
  has_cudnn = re.fullmatch(r'([89]|1\d)\.\d+', capability) is not None
  fits = head_dim % 8 == 0 and head_dim <= 128
  breaks = (tokens + tokens % 2) % 128 == 64
  return 'cudnn' if has_cudnn and fits and not breaks else 'reference'
