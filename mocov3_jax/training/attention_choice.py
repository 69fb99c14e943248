"""Chooses the implementation of attention for a run, and checks it."""

import math
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.models.attention import ATTENTION, Dense, Tokens
from mocov3_jax.models.execution import PLATFORMS, Execution
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import processes

# An implementation's error may be this many times that of the reference: each
# rounds differently.
MOST_ROUNDING = 2.0


@processes.exit_on_lost_peer()
def choose(
    config: ConfigDict, mesh: Mesh, path: str
) -> tuple[Execution, list[str]]:
  """Returns how a run computes on a mesh, and lines to print about it.

  With `model.attention=auto`, a run that continues on the same kind of device
  keeps its implementation, so that it computes the same. On an accelerator, the
  chosen implementation is first compared with the reference on a small batch,
  in values and gradients.

  Args:
    config: the run's config.
    mesh: the mesh to train on.
    path: the workdir.

  Raises:
    UserError: if the implementation is unknown, cannot run on these devices,
      or was asked for by name and does not agree with the reference.
  """
  asked = config.model.attention
  size, device = config.data.image_size, mesh.devices.flat[0]
  backbone = models.build_backbone(config.model, size)
  chosen = models.execution_on(mesh, config.model, size)
  if not isinstance(backbone, ViT):
    return chosen, []
  kept, notes = _recorded(path, device) if asked == 'auto' else ('', [])
  if kept:
    model = config.model.copy_and_resolve_references().unlock()
    model.attention = kept
    chosen = models.execution_on(mesh, model, size)
  if device.platform == 'cpu':
    return chosen, notes
  why = processes.any_of(disagreement(chosen, backbone, size))
  if why and asked != 'auto':
    raise UserError(
        f'model.attention={asked!r} cannot be used here: {why}. Use auto.'
    )
  if why:
    notes.append(
        f'model.attention={chosen.attention} cannot be used here ({why}); the '
        'reference runs instead'
    )
    chosen = Execution(mesh=mesh)
  notes.append(f'attention: {chosen.attention}')
  return chosen, notes


def _recorded(path: str, device: jax.Device) -> tuple[str, list[str]]:
  """Returns the implementation that a run has used so far, if it can go on.

  Returns:
    The implementation's name, and lines to print. The name is '' if the run
    has not begun, was on another kind of device, or recorded an unknown name.
    It is 'reference' for runs of versions that did not record one.
  """
  file = files.run_path(path, '--workdir') / 'environment.json'
  found = processes.from_primary(lambda: _environment(file))
  if not found:
    return '', []
  kept = found['attention'] if 'attention' in found else 'reference'
  if kept not in list(PLATFORMS):  # The file may hold anything.
    return '', [f'{file} names no attention that this version knows']
  elsewhere = 'device' not in found or found['device'] != device.device_kind
  if elsewhere or device.platform not in PLATFORMS[kept]:
    return '', [
        f'the run was begun on another kind of device than '
        f'{device.device_kind}, with model.attention={kept}; the attention is '
        'chosen anew'
    ]
  return kept, []


def _environment(file: epath.Path) -> dict[str, Any]:
  try:
    return files.read_object(file)
  except OSError:  # Claiming the workdir will report it.
    return {}


def disagreement(execution: Execution, backbone: ViT, image_size: int) -> str:
  """Compares an implementation of attention with the reference.

  Args:
    execution: the implementation to compare.
    backbone: gives the shapes and the dtype.
    image_size: side of the images in pixels.

  Returns:
    A description of the disagreement; '' if the two agree up to the rounding
    of the dtype.
  """
  if execution.attention == 'reference':
    return ''
  real = backbone.tokens(image_size)
  rows = execution.padded(real)
  # With readout 'cls', the last block computes only the class token.
  asked = [rows] + [1] * (backbone.readout == 'cls')
  try:
    for queries in asked:
      why = _difference(execution, backbone, Tokens(rows, real, queries))
      if why:
        return why
  except Exception as e:  # Compilers raise many kinds.
    return f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:200]}'
  return ''


def _difference(execution: Execution, backbone: ViT, tokens: Tokens) -> str:
  images, dim = 2, backbone.dim
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, *shape: jax.random.normal(key, shape)
  x = normal(keys[0], images * tokens.rows, dim)
  kernels = [
      normal(key, dim, width) / math.sqrt(dim)
      for key, width in ((keys[1], 3 * dim), (keys[2], dim))
  ]
  queries = min(tokens.real, tokens.queries)  # Without padding.
  weights = normal(keys[3], images, queries, dim)

  def outcome(attention, dtype):
    def loss(x, kernels):
      cast = lambda a: a.astype(dtype)
      qkv, proj = (
          Dense(cast(kernel), jnp.zeros(kernel.shape[1], dtype), name)
          for kernel, name in zip(kernels, ('qkv', 'proj'), strict=True)
      )
      out = ATTENTION[attention](
          cast(x), qkv, proj, backbone.num_heads, tokens, None
      )
      out = out.reshape(images, -1, dim)[:, :queries].astype(jnp.float32)
      return jnp.sum(out * weights), out

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return jax.tree.leaves(jax.jit(grad)(x, kernels))

  # By default, accelerators round the operands of float32 products.
  with jax.default_matmul_precision('highest'):
    exact = outcome('reference', jnp.float32)
  usual = outcome('reference', backbone.dtype)
  found = outcome(execution.attention, backbone.dtype)
  for a, b, c in zip(exact, usual, found, strict=True):
    # The 1e-5 allows for another order of summation if the reference is exact.
    allowed = MOST_ROUNDING * _distance(b, a) + 1e-5
    if not _distance(c, a) <= allowed:
      return (
          f'it is {_distance(c, a):.1e} from exact products, where '
          f'{allowed:.1e} is allowed'
      )
  return ''


def _distance(a: jax.Array, b: jax.Array) -> float:
  """Returns the RMS of a - b divided by the RMS of b."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2)))
