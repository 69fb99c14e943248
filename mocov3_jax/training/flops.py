"""What a network costs, read off its trace: nothing is computed."""

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
    backbone, heads: parameters.
    macs: multiply-adds of the backbone for one image (one crop).
    activations: bytes that the backward pass needs of one image's two views,
      in the online network: what autodiff keeps, before XLA fuses or shares.
      With `micro_batch`, those of one micro-batch at a time are kept.
  """

  backbone: int
  heads: int
  macs: int
  activations: int

  def __str__(self) -> str:
    return (
        f'{self.backbone / 1e6:.3g} M parameters in the backbone, '
        f'{self.heads / 1e6:.3g} M in the heads; '
        f'{self.macs / 1e9:.3g} GMACs a crop; '
        f'{self.activations / 2**20:.3g} MiB of activations an image'
    )


def network_cost(
    model: Network, image_shape: tuple[int, int, int]
) -> NetworkCost:
  """Returns size and cost of a network for images [H, W, C]."""
  # One image cannot be split. All implementations of attention do the same
  # work; what they keep is told of the reference.
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
  # What does not grow with the batch, such as the weights, drops out.
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
  """Returns the bytes that autodiff keeps of the forward pass."""
  def residuals(variables, views):
    def forward(params):
      online, _ = model.apply(
          variables | {'params': params}, views,
          train=True, mutable=['batch_stats'],
      )
      return online.predictions

    # The pullback is a tree, and its leaves are what it holds.
    return jax.vjp(forward, variables['params'])[1]

  kept = jax.tree.leaves(jax.eval_shape(residuals, variables, views))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)


def step_flops(
    method: Method, image_shape: tuple[int, int, int], batch_size: int
) -> float:
  """Operations that a training step needs, all devices together.

  Each product once forward and twice backward: without augmentation, and
  without what is computed again for want of memory.
  """
  model = method.model.clone(micro_batches=ONE_BATCH)
  if isinstance(model.backbone, ViT):
    model = model.clone(
        backbone=model.backbone.clone(remat=False, execution=REFERENCE)
    )
  # The views come in whole.
  plain = method.replace(model=model, augment=lambda images, key: images)
  views = jax.ShapeDtypeStruct((batch_size, 2, *image_shape), jnp.float32)
  return traced_flops(plain, views, recomputed=False)


def traced_flops(
    method: Method, images: jax.ShapeDtypeStruct, recomputed: bool = True
) -> float:
  """Operations in the matrix products of a step as it is traced.

  Args:
    method, images: of the step.
    recomputed: whether to count what `recompute.recomputed` marks.
  """
  state = abstract_state(method, images.shape[2:])
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = lambda key, state, images: train_step(method, key, state, images)
  jaxpr = jax.make_jaxpr(step)(key, state, images).jaxpr
  return 2.0 * macs(jaxpr, recomputed)


def macs(jaxpr: core.Jaxpr, recomputed: bool = True) -> int:
  """Multiply-adds in the matrix products and convolutions of a program.

  Bodies of loops count as often as they run, which XLA's own analysis does
  not do.

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
      # The gradient of a strided convolution has zeros between its inputs.
      zeros = math.prod(eqn.params['lhs_dilation'])
      total += (
          math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel)
          // (outputs * zeros)
      )
    each = [macs(inner, recomputed) for inner in inner_jaxprs(eqn)]
    # Of the branches of a condition, one runs.
    once = max(each) if name == 'cond' else sum(each)
    total += once * _times(eqn)
  return total


def _times(eqn: core.JaxprEqn) -> int:
  """Returns how often what is inside of an equation runs."""
  if eqn.primitive.name == 'scan':
    return eqn.params['length']
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  if eqn.primitive.name == 'pallas_call':
    return math.prod(eqn.params['grid_mapping'].grid)
  return 1


def pallas_grids(jaxpr: core.Jaxpr) -> dict[str, int]:
  """Returns how many programs each Pallas kernel has, by the kernel's name."""
  found = {}
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'pallas_call':
      found[eqn.params['name']] = _times(eqn)
    else:
      for inner in inner_jaxprs(eqn):
        found |= pallas_grids(inner)
  return found


def inner_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """Yields the programs that an equation holds."""
  for value in eqn.params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        yield part.jaxpr
      elif isinstance(part, core.Jaxpr):
        yield part
