"""How a run computes: chosen at its start, kept when it goes on, checked."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base import files
from mocov3_jax.models.attention import ATTENTION, Dense, Tokens
from mocov3_jax.models.execution import PLATFORMS, Execution
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import processes

# How much further from float32 than the reference an implementation may be,
# in half precision: each has its own roundings.
MOST_ROUNDING = 2.0


def choose(
    config: ConfigDict, mesh: Mesh, path: str
) -> tuple[Execution, list[str]]:
  """Returns how a run computes on a mesh, and what to say of that.

  A run that is continued on the same kind of device keeps what it had, so that
  it computes the same. On an accelerator, what is chosen is first compared
  with the reference on a small batch, in values and gradients.

  Args:
    config: of the run.
    mesh: to train on.
    path: the workdir.

  Raises:
    UserError: for an implementation that is unknown or cannot run there.
  """
  chosen = models.execution_on(mesh, config.model, config.data.image_size)
  device = mesh.devices.flat[0]
  notes = []
  if config.model.attention == 'auto':
    kept, other_device = _recorded(path, device)
    if other_device:
      notes.append(
          f'the run was begun on another kind of device, with '
          f'model.attention={kept}; on {device.device_kind} it is '
          f'{chosen.attention}'
      )
    elif kept:
      chosen = dataclasses.replace(chosen, attention=kept)
  if device.platform == 'cpu':
    return chosen, notes
  backbone = models.build_backbone(config.model, config.data.image_size)
  if isinstance(backbone, ViT):
    tokens = (config.data.image_size // backbone.patch_size) ** 2
    why = processes.any_of(
        disagreement(chosen, backbone, tokens + (backbone.readout == 'cls'))
    )
    if why:
      notes.append(
          f'model.attention={chosen.attention} cannot be used here ({why}); '
          'the reference runs instead'
      )
      chosen = dataclasses.replace(chosen, attention='reference')
    notes.append(f'attention: {chosen.attention}')
  return chosen, notes


def _recorded(path: str, device: jax.Device) -> tuple[str, bool]:
  """Returns what a begun run computes with, and whether that was elsewhere.

  Returns:
    '' and False if the run is not begun yet. A run of a version that recorded
    nothing has the reference.
  """
  file = files.absolute(path) / 'environment.json'
  found = processes.from_primary(lambda: files.read_object(file))
  if not found:
    return '', False
  kept = found['attention'] if 'attention' in found else 'reference'
  if kept not in list(PLATFORMS):  # Whatever a file may hold.
    return 'something unknown', True
  elsewhere = 'device' not in found or found['device'] != device.device_kind
  return kept, elsewhere or device.platform not in PLATFORMS[kept]


def disagreement(execution: Execution, backbone: ViT, tokens: int) -> str:
  """Compares an implementation of attention with the reference.

  Args:
    execution: what is to be compared.
    backbone: of which the shapes and the dtype are.
    tokens: of an image.

  Returns:
    What is wrong; '' if they agree up to the rounding of the dtype.
  """
  if execution.attention == 'reference':
    return ''
  images, dim = 2, backbone.dim
  rows = execution.padded(tokens)
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, *shape: jax.random.normal(key, shape)
  x = normal(keys[0], images * rows, dim)
  kernels = [
      normal(key, dim, width) / math.sqrt(dim)
      for key, width in ((keys[1], 3 * dim), (keys[2], dim))
  ]
  weights = normal(keys[3], images, tokens, dim)  # Of the real tokens alone.

  def outcome(attention, dtype):
    def loss(x, kernels):
      cast = lambda a: a.astype(dtype)
      qkv, proj = (
          Dense(cast(kernel), jnp.zeros(kernel.shape[1], dtype), name)
          for kernel, name in zip(kernels, ('qkv', 'proj'), strict=True)
      )
      out = ATTENTION[attention](
          cast(x), qkv, proj, backbone.num_heads, Tokens(rows, tokens, rows),
          None,
      )
      out = out.reshape(images, rows, dim)[:, :tokens].astype(jnp.float32)
      return jnp.sum(out * weights), out

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return jax.tree.leaves(jax.jit(grad)(x, kernels))

  try:
    exact = outcome('reference', jnp.float32)
    usual = outcome('reference', backbone.dtype)
    found = outcome(execution.attention, backbone.dtype)
  except Exception as e:  # Compilers have many kinds.
    return f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:200]}'
  for a, b, c in zip(exact, usual, found, strict=True):
    # In float32 the reference is itself, and 1e-5 what rounding does.
    allowed = MOST_ROUNDING * _distance(b, a) + 1e-5
    if not _distance(c, a) <= allowed:
      return (
          f'it is {_distance(c, a):.1e} from the reference in float32, where '
          f'{allowed:.1e} is allowed'
      )
  return ''


def _distance(a: jax.Array, b: jax.Array) -> float:
  """Returns the root mean square of a - b over that of b."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2)))
