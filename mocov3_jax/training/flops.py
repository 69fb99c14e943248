"""The cost of a network, counted in its trace without running it."""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

from clu import parameter_overview
import jax
from jax.extend import core
import jax.numpy as jnp

from mocov3_jax.method.train_step import Method, abstract_state, train_step
from mocov3_jax.models import Network, recompute
from mocov3_jax.models.execution import REFERENCE
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel.microbatch import ONE_BATCH

PyTree = Any


@dataclasses.dataclass(frozen=True)
class NetworkCost:
  """Size and cost of a network.

  Attributes:
    backbone, heads: number of parameters.
    macs: multiply-adds of the backbone for one image (one crop).
    activations: bytes that autodiff keeps for the backward pass, for the two
      views of one image in the online network, before XLA fuses or shares
      buffers. With `micro_batch`, only those of one micro-batch are kept at a
      time.
  """

  backbone: int
  heads: int
  macs: int
  activations: int

  def __str__(self) -> str:
    return (
        f'{self.backbone / 1e6:.3g} M parameters in the backbone, '
        f'{self.heads / 1e6:.3g} M in the heads; '
        f'{self.macs / 1e9:.3g} GMACs per crop; '
        f'{self.activations / 2**20:.3g} MiB of activations per image'
    )


def network_cost(
    model: Network, image_shape: tuple[int, int, int]
) -> NetworkCost:
  """Returns the size and cost of a network for images [H, W, C]."""
  # One image cannot be split into micro-batches. All implementations of
  # attention do the same work; the activations are those of the reference.
  model = model.clone(micro_batches=ONE_BATCH)
  if isinstance(model.backbone, ViT):
    model = model.clone(backbone=model.backbone.clone(execution=REFERENCE))

  def views(count):
    return jax.ShapeDtypeStruct((count, 2, *image_shape), jnp.float32)

  variables = jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, train=True), views(1)
  )
  count = parameter_overview.count_parameters
  backbone = count(variables['params']['backbone'])
  forward = jax.make_jaxpr(
      lambda v, x: model.apply(v, x[:, 0], train=False, method='features')
  )(variables, views(1))
  # The difference drops what does not grow with the batch, such as weights.
  one, two = (kept_bytes(model, variables, views(n)) for n in (1, 2))
  return NetworkCost(
      backbone=backbone,
      heads=count(variables['params']) - backbone,
      macs=macs(forward.jaxpr),
      activations=two - one,
  )


def kept_bytes(
    model: Network, variables: PyTree, views: jax.ShapeDtypeStruct
) -> int:
  """Returns the bytes that autodiff keeps from the forward pass."""
  def residuals(variables, views):
    def forward(params):
      online, _ = model.apply(
          variables | {'params': params}, views,
          train=True, mutable=['batch_stats'],
      )
      return online.predictions

    # The pullback is a pytree; its leaves are the arrays that it keeps.
    return jax.vjp(forward, variables['params'])[1]

  kept = jax.tree.leaves(jax.eval_shape(residuals, variables, views))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)


def step_flops(
    method: Method, image_shape: tuple[int, int, int], batch_size: int
) -> float:
  """Returns the floating-point operations of a training step on all devices.

  Each product counts once in the forward and twice in the backward pass.
  Augmentation does not count, nor does recomputation that saves memory.
  """
  model = method.model.clone(micro_batches=ONE_BATCH)
  if isinstance(model.backbone, ViT):
    model = model.clone(
        backbone=model.backbone.clone(remat=False, execution=REFERENCE)
    )
  # The views are given, so no augmentation is traced.
  plain = method.replace(model=model, augment=lambda images, key: images)
  views = jax.ShapeDtypeStruct((batch_size, 2, *image_shape), jnp.float32)
  return traced_flops(plain, views, recomputed=False)


def traced_flops(
    method: Method, images: jax.ShapeDtypeStruct, recomputed: bool = True
) -> float:
  """Returns the operations of the matrix products in the trace of a step.

  Args:
    method: the parts of the step.
    images: shape and dtype of its images.
    recomputed: whether to count what `recompute.recomputed` marks.
  """
  state = abstract_state(method, images.shape[2:])
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = lambda key, state, images: train_step(method, key, state, images)
  jaxpr = jax.make_jaxpr(step)(key, state, images).jaxpr
  return 2.0 * macs(jaxpr, recomputed)


def macs(jaxpr: core.Jaxpr, recomputed: bool = True) -> int:
  """Returns the multiply-adds of matrix products and convolutions in a program.

  Unlike in XLA's own analysis, the body of a loop counts once per iteration.

  Args:
    jaxpr: the program.
    recomputed: whether to count what `recompute.recomputed` marks.
  """
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if not recomputed and recompute.is_recomputed(eqn):
      continue
    if name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += math.prod(eqn.outvars[0].aval.shape) * math.prod(
          shape[axis] for axis in contracted
      )
    elif name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      outputs = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
      # The gradient of a strided convolution inserts zeros between its
      # inputs, which do not count.
      zeros = math.prod(eqn.params['lhs_dilation'])
      total += (
          math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel)
          // (outputs * zeros)
      )
    each = [macs(inner, recomputed) for inner in inner_jaxprs(eqn)]
    # Only one branch of a conditional runs.
    once = max(each) if name == 'cond' else sum(each)
    total += once * _times(eqn)
  return total


def _times(eqn: core.JaxprEqn) -> int:
  """Returns how often the inner programs of an equation run."""
  if eqn.primitive.name == 'scan':
    return eqn.params['length']
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  if eqn.primitive.name == 'pallas_call':
    return math.prod(eqn.params['grid_mapping'].grid)
  return 1


def pallas_grids(jaxpr: core.Jaxpr) -> dict[str, int]:
  """Returns the number of grid programs of each Pallas kernel, by name."""
  found = {}
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'pallas_call':
      found[eqn.params['name']] = _times(eqn)
    else:
      for inner in inner_jaxprs(eqn):
        found |= pallas_grids(inner)
  return found


def inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """Yields the jaxprs inside an equation."""
  for value in eqn.params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        yield part.jaxpr
      elif isinstance(part, core.Jaxpr):
        yield part
