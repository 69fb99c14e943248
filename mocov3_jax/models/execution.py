"""How a network is computed: choices that do not change the result.

Each choice depends only on the platform, the dtype and the shapes, not on
measurements: all hosts of a run must choose the same, and so must a run that is
continued.
"""

import dataclasses
import re

from jax.sharding import Mesh

from mocov3_jax.base.errors import UserError, unknown

# The platforms of each implementation. On CPUs, 'pallas' is interpreted, for
# tests.
PLATFORMS = {
    'reference': ('cpu', 'gpu', 'tpu'),
    'einsum': ('cpu', 'gpu', 'tpu'),
    'pallas': ('cpu', 'tpu'),
    'cudnn': ('gpu',),
}
# Head widths, and the most tokens per image, for which the kernels of
# models/short_attention.py have been compiled, for TPU v4, v5e, v5p and v6e.
PALLAS_HEADS = (32, 64, 80)
PALLAS_TOKENS = 584


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a ViT is computed; all ways give the same result up to rounding.

  Attributes:
    attention: a name in `attention.ATTENTION`.
    keep_gelu: whether to keep the output of an MLP's GELU for the backward pass
      (more memory traffic) instead of recomputing it (more arithmetic).
    mesh: the mesh that the batch is split over; None = one device.
  """

  attention: str = 'reference'
  keep_gelu: bool = False
  mesh: Mesh | None = None

  def for_images(self, count: int) -> 'Execution':
    """Returns the execution for a batch of this many images.

    If the batch size is not a multiple of the mesh size, as in the batch that
    initialises the parameters, the batch is not split: REFERENCE runs it.
    """
    if self.mesh is None or count % self.mesh.size == 0:
      return self
    return REFERENCE

  def padded(self, tokens: int) -> int:
    """Returns the number of rows for an image's tokens, with padding.

    With a multiple of 8 rows, a TPU moves no data to reshape between
    [B * T, D] and [B, T, D].
    """
    return -(-tokens // 8) * 8 if self.attention == 'pallas' else tokens


# Works on any device and in any precision.
REFERENCE = Execution()


def choose(
    asked: str, platform: str, dtype: str, tokens: int, head_dim: int,
    capability: str = '',
) -> str:
  """Returns the name of the attention implementation to use.

  Args:
    asked: `config.model.attention`: a name, or 'auto'.
    platform: platform of the devices: 'cpu', 'gpu' or 'tpu'.
    dtype: `config.model.dtype`.
    tokens: number of tokens per image.
    head_dim: width of a head.
    capability: CUDA compute capability of a GPU, such as '9.0'.

  Raises:
    UserError: if the name is unknown, or cannot run on the platform or with
      the dtype.
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
  # cuDNN needs Ampere or newer, and heads of a multiple of 16 bytes. Its
  # backward pass gives NaN if the number of keys is 64 more than a multiple of
  # 128. Odd numbers of tokens are padded by one.
  has_cudnn = re.fullmatch(r'([89]|1\d)\.\d+', capability) is not None
  fits = head_dim % 8 == 0 and head_dim <= 128
  breaks = (tokens + tokens % 2) % 128 == 64
  return 'cudnn' if has_cudnn and fits and not breaks else 'reference'
