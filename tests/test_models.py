"""Initialisation, positions and shapes of the networks."""

import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocov3_jax import config as config_lib
from mocov3_jax import models
from mocov3_jax.models.vit import sincos_positions
from mocov3_jax.tools import torch_names

POSITIONS, _ = golden.load('pos_embed')
INIT_STATS = json.loads((golden.FOLDER / 'init_stats.json').read_text())


@pytest.mark.parametrize('name, dim', [('small', 384), ('base', 768)])
def test_position_table_equals_the_original(name, dim):
  # Float32 angles of up to 13 rad, as the original computes them: 1e-6.
  np.testing.assert_allclose(
      sincos_positions(14, 14, dim), POSITIONS[f'vit_{name}_14x14'], atol=2e-6
  )


def test_positions_of_an_oblong_grid_are_those_of_their_patches():
  table = sincos_positions(4, 6, 32)[0, 1:].reshape(4, 6, 32)
  # Half of the channels tell the row alone, the other half the column alone.
  assert np.ptp(table[..., :16], axis=1).max() == 0
  assert np.ptp(table[..., 16:], axis=0).max() == 0
  assert len(np.unique(table.reshape(24, 32).round(4), axis=0)) == 24
  # What the original puts on a 4 x 6 grid is the table of 6 x 4: the same
  # only where the grid is square.
  np.testing.assert_allclose(
      sincos_positions(6, 4, 32), POSITIONS['grid4x6_dim32'], atol=1e-6
  )


def config(**model):
  """Defaults with a narrow head and this model."""
  c = config_lib.default_config()
  with c.unlocked():
    c.model.update(model)
    c.head.update(hidden_dim=32, out_dim=8)
  return c


@pytest.mark.parametrize(
    'name, model, projector_layers, predictor_out_bn',
    [
        ('vit_small', {'name': 'vit_s'}, 3, True),
        ('vit_conv_small', {'name': 'vit_s', 'patch_embed': 'conv'}, 3, True),
        ('resnet50', {'name': 'resnet50'}, 2, False),
    ],
)
def test_initial_values_are_distributed_as_the_originals(
    name, model, projector_layers, predictor_out_bn
):
  c = config_lib.default_config()
  with c.unlocked():
    c.model.update(model)
    c.head.update(
        projector_layers=projector_layers, predictor_out_bn=predictor_out_bn
    )
  network = models.build(c.model, c.head, c.data.image_size)
  views = jnp.zeros((1, 2, 224, 224, 3))
  init = jax.jit(lambda key: network.init(key, views, train=True)['params'])
  params = torch_names.flatten(jax.device_get(init(jax.random.key(0))))
  head = 'fc' if name == 'resnet50' else 'head'
  for path, leaf in params.items():
    key = golden.golden_name(path, 'base_encoder', head)
    shape, _, std, low, high = INIT_STATS[name][key]
    assert leaf.size == np.prod(shape), key
    if std == 0:  # A constant.
      assert np.ptp(leaf) == 0 and leaf.flat[0] == pytest.approx(low), key
      continue
    # Five standard errors of the mean, and of the standard deviation.
    assert abs(leaf.mean()) < 5 * std / leaf.size**0.5, key
    tolerance = max(0.01, 5 / leaf.size**0.5)
    assert leaf.std() == pytest.approx(std, rel=tolerance), key
    # A uniform distribution reaches its bounds; a normal one is wider.
    uniform = high < 1.8 * std
    assert uniform == (leaf.max() < 1.8 * leaf.std()), key
    if uniform and leaf.size > 10_000:
      assert leaf.min() == pytest.approx(low, rel=0.01), key
      assert leaf.max() == pytest.approx(high, rel=0.01), key
  named = [k for k in INIT_STATS[name] if not k.startswith('momentum')]
  assert len(params) == len([k for k in named if 'pos_embed' not in k])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
  c = config_lib.default_config()
  with c.unlocked():
    c.model.update(name='vit_ti', depth=1, dim=32, num_heads=2, patch_size=4)
    c.head.update(hidden_dim=32, out_dim=8)
  views = jax.random.normal(jax.random.key(0), (4, 2, 8, 8, 3))
  outputs = {}
  for dtype in 'float32', 'bfloat16':
    with c.unlocked():
      c.model.dtype = dtype
    network = models.build(c.model, c.head, image_size=8)
    variables = network.init(jax.random.key(1), views, train=True)
    assert {x.dtype.name for x in jax.tree.leaves(variables)} == {'float32'}
    out, _ = network.apply(
        variables, views, train=True, mutable=['batch_stats']
    )
    assert out.features.dtype == out.predictions.dtype == jnp.float32
    outputs[dtype] = np.asarray(out.features)
  error = np.abs(outputs['float32'] - outputs['bfloat16']).max()
  assert 1e-4 < error < 0.1


def test_views_pass_each_batchnorm_separately():
  c = config_lib.default_config()
  with c.unlocked():
    c.model.update(name='vit_ti', depth=1, dim=32, num_heads=2, patch_size=4)
    c.head.update(hidden_dim=32, out_dim=8)
  network = models.build(c.model, c.head, image_size=8)
  views = jax.random.normal(jax.random.key(0), (16, 2, 8, 8, 3))
  views = views.at[:, 1].add(5.0)
  variables = network.init(jax.random.key(1), views, train=True)
  out, _ = network.apply(variables, views, train=True, mutable=['batch_stats'])
  # The projector ends in a BatchNorm: each view has mean 0 and variance 1.
  np.testing.assert_allclose(out.projections.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(out.projections.var(axis=0), 1, atol=1e-2)
