"""Initialisation, positions and shapes of the networks."""

import json

import flax.linen as nn
from flax.traverse_util import flatten_dict
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.models import attention, block, recompute, vit
from mocov3_jax.models.execution import REFERENCE
from mocov3_jax.models.stem import PatchEmbed
from mocov3_jax.models.vit import sincos_positions
from mocov3_jax.training import flops

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


@pytest.mark.slow
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
  params = flatten_dict(jax.device_get(init(jax.random.key(0))))
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
    variables = tiny.init(network, jax.random.key(1), views, train=True)
    assert {x.dtype.name for x in jax.tree.leaves(variables)} == {'float32'}
    out, _ = tiny.apply(
        network, variables, views, train=True, mutable=['batch_stats']
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
  variables = tiny.init(network, jax.random.key(1), views, train=True)
  out, _ = tiny.apply(
      network, variables, views, train=True, mutable=['batch_stats']
  )
  # The projector ends in a BatchNorm: each view has mean 0 and variance 1.
  np.testing.assert_allclose(out.projections.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(out.projections.var(axis=0), 1, atol=1e-2)


SMALL = {
    'name': 'vit_ti', 'dim': 32, 'depth': 3, 'num_heads': 2, 'patch_size': 4
}


def network(**model):
  c = config(**(SMALL | model))
  return models.build(c.model, c.head, image_size=16)


def outputs_and_gradients(model):
  views = jax.random.normal(jax.random.key(0), (4, 2, 16, 16, 3))
  variables = tiny.init(model, jax.random.key(1), views, train=True)

  def loss(params):
    online, _ = model.apply(
        variables | {'params': params}, views, train=True,
        mutable=['batch_stats'],
    )
    # Of the features: behind the BatchNorms of four rows, rounding grows.
    return jnp.sum(jnp.sin(online.features)), online.features

  (_, features), grads = jax.jit(
      jax.value_and_grad(loss, has_aux=True)
  )(variables['params'])
  return features, grads


@pytest.mark.slow
def test_neither_remat_nor_scan_changes_a_result():
  # With the class token the loop's last block computes more, and rounds
  # otherwise: see below, in float64.
  pooled = {'readout': 'norm_pool'}
  for base, *changes in (
      [{}, {'remat': True}],
      [pooled, {'scan': True}, {'remat': True, 'scan': True}],
  ):
    features, grads = outputs_and_gradients(network(**base))
    for change in changes:
      other = outputs_and_gradients(network(**(base | change)))
      np.testing.assert_allclose(other[0], features, atol=1e-5)
      # The same tree: a checkpoint of one is a checkpoint of the other.
      jax.tree.map(
          lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
          other[1], grads,
      )


@pytest.mark.slow
def test_a_block_keeps_twelve_rows_a_token_and_with_remat_one():
  views = [jax.ShapeDtypeStruct((n, 2, 16, 16, 3), jnp.float32) for n in (1, 2)]
  for remat, rows in (False, 12), (True, 1):
    kept = []
    for depth in 3, 4:
      model = network(remat=remat, depth=depth)
      variables = jax.eval_shape(
          lambda x, m=model: m.init(jax.random.key(0), x, train=True), views[0]
      )
      one, two = (flops.kept_bytes(model, variables, x) for x in views)
      kept.append(two - one)  # Without what does not grow with the batch.
    # Input, sum and their norms, queries, keys and values, what was attended
    # to, the hidden layer of four: each once, and nothing of tokens x tokens.
    dim, tokens = model.backbone.dim, 17
    assert kept[1] - kept[0] == 2 * tokens * rows * dim * 4


@pytest.mark.slow
def test_what_is_to_be_computed_again_is_not_kept_by_the_compiler():
  dim, tokens, batch = 32, 257, 8
  images = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.float32)
  used = {}
  for depth in 3, 7:
    model = vit.ViT(4, dim, depth, num_heads=4)
    variables = jax.eval_shape(
        lambda x, m=model: m.init(jax.random.key(0), x, True), images
    )
    loss = lambda v, x, m=model: jnp.sum(m.apply(v, x, True))
    compiled = jax.jit(jax.grad(loss)).lower(variables, images).compile()
    used[depth] = compiled.memory_analysis().temp_size_in_bytes
  array = batch * tokens * dim * 4
  # Twelve, as above, some of them merged. The attention weights alone would be
  # 4 * 257 / 32 = 32 more, the GELU 4 more.
  assert used[7] - used[3] < 4 * 13 * array


def test_the_last_block_computes_the_class_token_alone():
  with jax.enable_x64(True):
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    model = vit.ViT(4, 32, 2, num_heads=2, dtype=jnp.float64)
    params = tiny.init(model, jax.random.key(1), images, train=True)
    results = [
        jax.jit(jax.value_and_grad(
            lambda p, m=m: jnp.sum(jnp.sin(m.apply(p, images, train=True)))
        ))(params)
        for m in (model, model.clone(scan=True))  # The loop has all tokens.
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
        *results,
    )
    macs = [
        flops.macs(jax.make_jaxpr(
            lambda p, m=m: m.apply(p, images, train=True)
        )(params).jaxpr)
        for m in (model, model.clone(scan=True))
    ]
  # Of 2 x 16 tokens: the projection, the MLP, the products of the queries.
  assert macs[1] - macs[0] == 32 * (9 * 32**2 + 2 * 17 * 32)


def textbook_attention(qkv, queries):
  q, k, v = qkv[:, :queries, 0], qkv[:, :, 1], qkv[:, :, 2]
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1])
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(logits), v)


@pytest.mark.parametrize('queries', [1, 3, 5])
def test_attention_is_that_of_the_textbook(queries):
  with jax.enable_x64(True):
    qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 2, 4), jnp.float64)
    results = [
        jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.sin(f(x, queries))))(qkv)
        for f in (textbook_attention, attention.dot_product_attention)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *results
    )


@pytest.mark.parametrize(('dtype', 'scale', 'close'), [
    # Logits beyond 1000, of which float32 rounds away some 1e-4.
    ('float32', 10, 1e-4),
    ('bfloat16', 1, 2e-2), ('bfloat16', 3, 2e-2),
])
def test_attention_keeps_its_precision(dtype, scale, close):
  shape = 2, 33, 3, 2, 16
  qkv = (scale * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
  toward = jax.random.normal(jax.random.key(1), (2, 33, 2, 16)).astype(dtype)

  got, pull = jax.vjp(lambda x: attention.dot_product_attention(x, 33), qkv)
  gradient = pull(toward)[0]
  assert got.dtype == gradient.dtype == qkv.dtype
  with jax.enable_x64(True):
    wanted, pull = jax.vjp(
        lambda x: textbook_attention(x, 33), qkv.astype(jnp.float64)
    )
    wanted = wanted, pull(toward.astype(jnp.float64))[0]
    for a, b in zip((got, gradient), wanted, strict=True):
      a = np.asarray(a, np.float64)
      assert np.linalg.norm(a - b) < close * np.linalg.norm(b)


def test_norm_and_gelu_are_flaxs():
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 3)
    x, bias = (jax.random.normal(k, s) for k, s in zip(
        keys, [(6, 8), (8,)], strict=False
    ))
    kernel = jax.random.normal(keys[2], (8, 8))
    flax_norm = nn.LayerNorm(epsilon=1e-6, dtype=x.dtype, param_dtype=x.dtype)

    def flaxs(x, scale, bias, kernel):
      affine = {'params': {'scale': scale, 'bias': bias}}
      normed = flax_norm.apply(affine, x * 3 + 1)
      return nn.gelu(normed, approximate=False) @ kernel

    def ours(x, scale, bias, kernel):
      normed = recompute.layer_norm(x * 3 + 1, scale, bias, 1e-6)
      return recompute.gelu_dense(normed, kernel)

    results = [
        jax.jit(jax.value_and_grad(
            lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2, 3)
        ))(x, 2 + bias, bias, kernel)
        for f in (flaxs, ours)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), *results
    )


def test_scan_compiles_one_block():
  views = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.float32)
  variables = jax.eval_shape(
      lambda x: network().init(jax.random.key(0), x, train=True), views
  )
  model, looped = network(), network(scan=True)
  texts = [
      jax.jit(lambda v, x, m=m: m.apply(v, x, train=False))
      .lower(variables, views).as_text()
      for m in (model, looped)
  ]
  softmaxes = [text.count('stablehlo.exponential') for text in texts]
  assert softmaxes == [3, 1]


@pytest.mark.parametrize(
    'readout, positions, tokens',
    [('cls', 'learned', 17), ('pool', 'learned', 16), ('norm_pool', 'none', 0)],
)
def test_readouts_and_positions(readout, positions, tokens):
  model = network(readout=readout, positions=positions)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = tiny.init(model, jax.random.key(1), images[:, None], train=True)
  params = variables['params']['backbone']
  assert ('cls_token' in params) == (readout == 'cls')
  assert ('norm' in params) == (readout != 'pool')
  assert ('pos_embed' in params) == (positions == 'learned')
  if tokens:
    assert params['pos_embed'].shape == (1, tokens, 32)

  def features(images):
    return tiny.apply(
        model, variables, images, train=False, method='features'
    )

  assert features(images).shape == (2, 32)
  # Without positions the order of the patches does not matter; else it does.
  patches = images.reshape(2, 4, 4, 16, 3)
  moved = patches[:, ::-1].reshape(images.shape)
  difference = np.abs(features(moved) - features(images)).max()
  assert (difference < 1e-5) == (positions == 'none')


@pytest.mark.parametrize(
    'change',
    [
        {'mlp_norm': 'batch'},
        pytest.param({'patch_embed': 'conv'}, marks=pytest.mark.slow),
        pytest.param({'patch_embed': 'batch_norm'}, marks=pytest.mark.slow),
        pytest.param(
            {'name': 'resnet18', 'dim': 4, 'depth': 0, 'num_heads': 0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_batchnorm_in_the_backbone_sees_each_view_alone(change):
  model = network(**change)
  assert model.backbone.has_batch_norm
  views = jax.random.normal(jax.random.key(0), (8, 2, 16, 16, 3))
  variables = tiny.init(model, jax.random.key(1), views, train=True)
  encode = jax.jit(
      lambda views: model.apply(
          variables, views, train=True, mutable=['batch_stats'],
          method='encode',
      )[0].features
  )
  # What happens to the second view is nothing to the first.
  # (Half of it: BatchNorm would take a shift of all of it out again.)
  changed = encode(views.at[:4, 1].add(3.0))
  same = encode(views)
  np.testing.assert_array_equal(changed[:, 0], same[:, 0])
  assert np.abs(changed[:, 1] - same[:, 1]).max() > 0.01
  if 'mlp_norm' in change:
    block = variables['batch_stats']['backbone']['blocks_0']
    assert set(block) == {'norm2'}  # LayerNorm stays in the attention.


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
  one = block.Block(2, 64, 'layer', 0.5, jnp.float32, REFERENCE)
  x = jax.random.normal(jax.random.key(0), (64 * 5, 32))
  tokens = attention.Tokens(rows=5, real=5, queries=5)
  variables = tiny.init(one, jax.random.key(1), x, tokens, False)
  branch = tiny.apply(one, variables, x, tokens, False) - x
  outs = np.stack([
      tiny.apply(
        one, variables, x, tokens, True, rngs={'drop_path': jax.random.key(i)}
      ) - x
      for i in range(3)
  ])
  still = np.all(outs == 0, axis=-1).reshape(3, 64, 5)
  # An image is dropped from a branch as a whole: a quarter from both.
  np.testing.assert_array_equal(still.any(-1), still.all(-1))
  assert 0.1 < still.mean() < 0.4
  assert np.abs(branch).max() > 0.01
  backbone = models.build_backbone(config(**SMALL).model, 16, drop_path=0.5)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = tiny.init(backbone, jax.random.key(1), images, train=False)
  plain = models.build_backbone(config(**SMALL).model, 16)
  np.testing.assert_array_equal(
      tiny.apply(backbone, variables, images, train=False),
      tiny.apply(plain, variables, images, train=False),
  )


@pytest.mark.parametrize(
    'change, words',
    [
        ({'readout': 'cl'}, "model.readout='cl'.*Did you mean 'cls'"),
        ({'positions': 'sine'}, 'learned, none, sincos'),
        ({'patch_embed': 'conv', 'patch_size': 1}, 'power of 2'),
        ({'scan': True, 'mlp_norm': 'batch'}, 'model.mlp_norm=layer'),
        ({'frozen_blocks': 3}, 'Allowed: 0; or up to 2, with'),
        ({'frozen_blocks': 1, 'patch_embed': 'learned'}, 'needs .*=frozen'),
        ({'name': 'resnet50', 'dim': 8}, 'model.depth=3 is for ViTs'),
        ({'name': 'resnet49'}, "Did you mean 'resnet"),
        ({'small_images': True}, 'model.small_images=True is for ResNets'),
    ],
)
def test_a_network_that_cannot_be_is_named(change, words):
  with pytest.raises(UserError, match=words):
    network(**change)


def patches(**stem):
  """A patch projection of 2x2 pixels, its variables and some images."""
  module = PatchEmbed(2, 12, **stem)
  images = jax.random.normal(jax.random.key(0), (5, 4, 6, 3))
  return module, tiny.init(module, jax.random.key(1), images, True), images


def test_a_patch_projection_is_one_matrix_for_all_patches():
  module, variables, images = patches()
  variables['params']['bias'] = jnp.arange(12.0)
  found = tiny.apply(module, variables, images, True)
  rows = images.reshape(5, 2, 2, 3, 2, 3).swapaxes(2, 3).reshape(5, 2, 3, 12)
  kernel = variables['params']['kernel'].reshape(12, 12)
  np.testing.assert_allclose(
      found, np.asarray(rows) @ np.asarray(kernel) + np.arange(12.0),
      rtol=1e-5, atol=1e-5,
  )


def test_weight_norm_starts_as_without_and_learns_length_and_direction():
  plain, variables, images = patches()
  normed, learned, _ = patches(weight_norm=True)
  np.testing.assert_array_equal(
      variables['params']['kernel'], learned['params']['kernel']
  )
  np.testing.assert_allclose(
      tiny.apply(plain, variables, images, True),
      tiny.apply(normed, learned, images, True),
      rtol=1e-5, atol=1e-6,
  )
  # Longer kernels are the same network, and their gradient has no part along
  # themselves.
  longer = jax.tree.map(lambda x: x, learned)
  longer['params']['kernel'] *= 3
  np.testing.assert_allclose(
      tiny.apply(normed, longer, images, True),
      tiny.apply(normed, learned, images, True),
      rtol=1e-5, atol=1e-6,
  )
  grads = jax.grad(
      lambda v: jnp.sum(jnp.sin(tiny.apply(normed, v, images, True)))
  )(learned)['params']
  along = jnp.sum(grads['kernel'] * learned['params']['kernel'], (0, 1, 2))
  np.testing.assert_allclose(along, np.zeros(12), atol=1e-4)
  assert np.all(grads['scale'] != 0)


def test_batch_norm_evens_out_the_tokens():
  module, variables, images = patches(batch_norm=True)
  tokens, _ = tiny.apply(
        module, variables, 7 * images + 3, True, mutable=['batch_stats']
  )
  np.testing.assert_allclose(jnp.mean(tokens, (0, 1, 2)), 0, atol=1e-4)
  np.testing.assert_allclose(jnp.std(tokens, (0, 1, 2)), 1, atol=1e-3)


@pytest.mark.parametrize('kind', [
    'learned', pytest.param('clipped', marks=pytest.mark.slow),
    pytest.param('weight_norm', marks=pytest.mark.slow),
])
def test_only_the_frozen_projection_gets_no_gradient(kind):
  for name in kind, 'frozen':
    _, grads = outputs_and_gradients(network(patch_embed=name))
    patch = grads['backbone']['patch_embed']
    assert all(np.any(g) == (name != 'frozen') for g in jax.tree.leaves(patch))
