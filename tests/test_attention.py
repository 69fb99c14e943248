"""Implementations of attention: one result, and the choice among them."""

import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.method.build import build_method
from mocov3_jax.models import execution as execution_lib
from mocov3_jax.models.attention import ATTENTION, Dense, Tokens
from mocov3_jax.models.execution import Execution
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import sharding
from mocov3_jax.training import attention_choice, pretrain

HERE = 'einsum', 'pallas'  # cuDNN is for GPUs.


@functools.cache
def outcome(name, num_heads, head_dim, tokens, dtype=jnp.float32):
  """Output of the real tokens, and all gradients; padding holds junk."""
  images, dim = 2, num_heads * head_dim
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (images, tokens.rows, dim))
  x = x.at[:, tokens.real :].set(1e3).reshape(-1, dim)
  matrix = lambda key, n: jax.random.normal(key, (dim, n)) / math.sqrt(dim)
  layers = (
      Dense(matrix(keys[1], 3 * dim), jax.random.normal(keys[2], (3 * dim,)),
            'qkv'),
      Dense(matrix(keys[3], dim), jax.random.normal(keys[4], (dim,)), 'proj'),
  )
  real = min(tokens.real, tokens.queries)
  toward = jax.random.normal(keys[5], (images, real, dim))

  def loss(x, arrays):
    qkv, proj = (
        Dense(a.astype(dtype), b.astype(dtype), layer.name)
        for (a, b), layer in zip(arrays, layers, strict=True)
    )
    out = ATTENTION[name](x.astype(dtype), qkv, proj, num_heads, tokens, None)
    out = out.reshape(images, tokens.queries, dim)[:, :real]
    return jnp.sum(out.astype(jnp.float32) * toward), out

  with jax.default_matmul_precision('highest'):
    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        x, [(layer.kernel, layer.bias) for layer in layers]
    )
  return [out, *jax.tree.leaves(grads)]


def distance(found, wanted):
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-9)


# Tokens of the recipes: digits, photo tiles and CIFAR, ImageNet at 224 pixels
# with patches of 16 and of 14; with and without a class token.
SHAPES = [
    (4, 8, Tokens(17, 17, 17)), (2, 64, Tokens(65, 65, 65)),
    (4, 32, Tokens(200, 197, 200)), (2, 64, Tokens(200, 197, 200)),
    (2, 64, Tokens(196, 196, 196)), (2, 64, Tokens(200, 197, 1)),
    (1, 80, Tokens(264, 257, 264)), (3, 16, Tokens(48, 37, 3)),
]


@pytest.mark.parametrize('name', HERE)
@pytest.mark.parametrize('num_heads, head_dim, tokens', SHAPES)
def test_all_equal_the_reference_in_float32(name, num_heads, head_dim, tokens):
  wanted = outcome('reference', num_heads, head_dim, tokens)
  for a, b in zip(
      outcome(name, num_heads, head_dim, tokens), wanted, strict=True
  ):
    assert distance(a, b) < 1e-5


@pytest.mark.parametrize('name', HERE)
@pytest.mark.parametrize('num_heads, head_dim, tokens', [
    (2, 64, Tokens(200, 197, 200)), (4, 32, Tokens(72, 65, 1)),
])
def test_in_half_precision_they_round_as_much(
    name, num_heads, head_dim, tokens
):
  case = num_heads, head_dim, tokens
  exact = outcome('reference', *case)
  usual = outcome('reference', *case, jnp.bfloat16)
  for a, b, c in zip(
      outcome(name, *case, jnp.bfloat16), usual, exact, strict=True
  ):
    assert distance(a, c) < 1.5 * distance(b, c) + 1e-5


def small_vit(**changes):
  return ViT(patch_size=4, dim=32, depth=2, num_heads=2, **changes)


@pytest.mark.parametrize('readout, mlp_norm', [
    ('cls', 'layer'), ('pool', 'batch'),
    pytest.param('norm_pool', 'layer', marks=pytest.mark.slow),
    pytest.param('pool', 'layer', marks=pytest.mark.slow),
    pytest.param('cls', 'batch', marks=pytest.mark.slow),
])
def test_padding_changes_no_network(readout, mlp_norm):
  # 25 or 26 tokens, of which the kernel makes 32.
  images = jax.random.normal(jax.random.key(0), (2, 20, 20, 3))
  plain = small_vit(readout=readout, mlp_norm=mlp_norm)
  padded = plain.clone(execution=Execution('pallas', keep_gelu=True))
  variables = tiny.init(plain, jax.random.key(1), images, train=True)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
      jnp.shape, tiny.init(padded, jax.random.key(1), images, train=True)
  )

  def run(model):
    def loss(params):
      features, stats = model.apply(
          variables | {'params': params}, images, train=True,
          mutable=['batch_stats'],
      )
      return jnp.sum(jnp.sin(features)), stats

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
      run(padded), run(plain),
  )


def test_a_batch_that_the_mesh_does_not_divide_runs_by_the_reference():
  mesh = sharding.make_mesh()
  chosen = Execution('pallas', True, mesh)
  assert chosen.for_images(16) == chosen
  assert chosen.for_images(3) == execution_lib.REFERENCE
  alone = dataclasses.replace(chosen, mesh=None)
  assert alone.for_images(3) == alone


@pytest.mark.parametrize('asked, platform, dtype, tokens, head_dim, name', [
    ('auto', 'cpu', 'bfloat16', 197, 64, 'reference'),
    ('auto', 'tpu', 'bfloat16', 197, 64, 'pallas'),
    ('auto', 'tpu', 'bfloat16', 197, 32, 'pallas'),
    ('auto', 'tpu', 'bfloat16', 257, 80, 'pallas'),
    ('auto', 'tpu', 'bfloat16', 1025, 64, 'einsum'),
    ('auto', 'tpu', 'bfloat16', 197, 48, 'einsum'),
    ('auto', 'tpu', 'float32', 197, 64, 'reference'),
    ('auto', 'gpu', 'bfloat16', 197, 64, 'cudnn'),
    # NaN in cuDNN's backward pass, of odd lengths once they are padded.
    ('auto', 'gpu', 'bfloat16', 64, 64, 'reference'),
    ('auto', 'gpu', 'bfloat16', 191, 64, 'reference'),
    ('auto', 'gpu', 'bfloat16', 197, 12, 'reference'),
    ('auto', 'gpu', 'bfloat16', 197, 256, 'reference'),
    ('auto', 'gpu', 'float32', 197, 64, 'reference'),
    ('reference', 'tpu', 'bfloat16', 197, 64, 'reference'),
    ('pallas', 'cpu', 'float32', 17, 8, 'pallas'),
])
def test_auto_is_a_table(asked, platform, dtype, tokens, head_dim, name):
  assert execution_lib.choose(
      asked, platform, dtype, tokens, head_dim, '9.0'
  ) == name


@pytest.mark.parametrize('capability, name', [
    ('8.0', 'cudnn'), ('12.0', 'cudnn'), ('7.5', 'reference'),
    ('gfx942', 'reference'), ('', 'reference'),
])
def test_cudnn_wants_a_gpu_that_has_it(capability, name):
  assert execution_lib.choose(
      'auto', 'gpu', 'bfloat16', 197, 64, capability
  ) == name


@pytest.mark.parametrize('asked, platform, dtype, words', [
    ('palas', 'tpu', 'bfloat16', "Did you mean 'pallas'"),
    ('pallas', 'gpu', 'bfloat16', "'pallas' does not run on a GPU. Use auto"),
    ('cudnn', 'cpu', 'bfloat16', "'cudnn' does not run on a CPU"),
    ('cudnn', 'gpu', 'float32', 'needs model.dtype=bfloat16'),
])
def test_what_cannot_run_is_refused(asked, platform, dtype, words):
  with pytest.raises(UserError, match=words):
    execution_lib.choose(asked, platform, dtype, 197, 64)


def test_a_resnet_has_no_attention_to_choose():
  c = config_lib.default_config()
  c.model.name, c.model.attention = 'resnet50', 'einsum'
  with pytest.raises(UserError, match='model.attention.*is for ViTs'):
    models.build_backbone(c.model, 224)


def broken(x, qkv, proj, num_heads, tokens, mesh):
  # Attends to padding as well: a mistake of some thousandths.
  del mesh
  whole = tokens._replace(real=tokens.rows)
  return ATTENTION['einsum'](x, qkv, proj, num_heads, whole, None)


def failing(*_):
  raise NotImplementedError('no such kernel\nand more')


@pytest.mark.parametrize('implementation, words', [
    (None, ''), (broken, 'from exact products'),
    (failing, 'NotImplementedError: no such kernel'),
])
def test_an_implementation_is_compared_before_it_is_used(
    monkeypatch, implementation, words
):
  if implementation:
    monkeypatch.setitem(ATTENTION, 'pallas', implementation)
  why = attention_choice.disagreement(
      Execution('pallas'), small_vit(dtype=jnp.bfloat16), 20
  )
  assert (words in why and '\n' not in why) if words else why == ''


@pytest.mark.parametrize('before, name, said', [
    (None, 'reference', ''),  # Not begun: as the table has it.
    ({'device': 'cpu', 'attention': 'einsum'}, 'einsum', ''),
    ({'device': 'cpu'}, 'reference', ''),  # Of a version without the choice.
    ({'device': 'TPU v4', 'attention': 'pallas'}, 'reference',
     'begun on another kind of device than cpu, with model.attention=pallas'),
    ({'device': 'cpu', 'attention': ['x']}, 'reference',
     'names no attention that this version knows'),
])
def test_a_continued_run_keeps_its_attention(tmp_path, before, name, said):
  if before:
    (tmp_path / 'environment.json').write_text(json.dumps(before))
  chosen, notes = attention_choice.choose(
      tiny.config(), sharding.make_mesh(), str(tmp_path)
  )
  assert chosen.attention == name
  assert said in ''.join(notes) and bool(notes) == bool(said)


class Tpu:
  """A mesh of one device that is said to be a TPU."""

  devices = np.array([types.SimpleNamespace(
      platform='tpu', device_kind='TPU v5 lite'
  )])
  size = 1


def test_an_accelerator_falls_back_to_the_reference(monkeypatch, tmp_path):
  c = tiny.config(**{'model.dtype': 'bfloat16', 'model.dim': 64,
                     'model.num_heads': 2})
  mesh = Tpu()
  chosen, notes = attention_choice.choose(c, mesh, str(tmp_path))
  assert chosen.attention == 'pallas' and chosen.keep_gelu
  assert notes == ['attention: pallas']
  monkeypatch.setitem(ATTENTION, 'pallas', failing)
  chosen, notes = attention_choice.choose(c, mesh, str(tmp_path))
  assert chosen.attention == 'reference' and not chosen.keep_gelu
  assert 'cannot be used here (NotImplementedError' in notes[0]
  # What was asked for by name is not replaced.
  c.model.attention = 'pallas'
  with pytest.raises(UserError, match="'pallas' cannot be used here.*Use auto"):
    attention_choice.choose(c, mesh, str(tmp_path))


def test_a_run_of_an_earlier_version_keeps_all_of_it(tmp_path):
  (tmp_path / 'environment.json').write_text('{"device": "TPU v5 lite"}')
  c = tiny.config(**{'model.dtype': 'bfloat16', 'model.dim': 64,
                     'model.num_heads': 2})
  chosen, notes = attention_choice.choose(c, Tpu(), str(tmp_path))
  assert chosen.attention == 'reference' and not chosen.keep_gelu
  assert notes == ['attention: reference']


def test_a_run_records_its_attention(tmp_path):
  c = tiny.config(**{
      'schedule.steps': 2, 'schedule.warmup_epochs': 0.0,
      'model.attention': 'einsum',
  })
  pretrain.pretrain(c, str(tmp_path))
  found = json.loads((tmp_path / 'environment.json').read_text())
  assert found['attention'] == 'einsum'


@pytest.mark.slow
def test_ten_losses_are_as_close_as_a_rounding_of_the_input():
  c = tiny.config(**{'model.dtype': 'bfloat16', 'schedule.epochs': 3.0})
  mesh = sharding.make_mesh(jax.devices()[:1])
  splits = pretrain.load_splits(c)
  plan = config_lib.plan(c, len(splits.train))
  reader = pretrain.make_reader(
      c, splits.train, sharding.local_positions(mesh, c.batch_size)
  )
  batches = list(pipeline.train_batches(reader, 0, 10, 2))

  def losses(name, rounding=0.0):
    method = build_method(c, plan, 1, Execution(name, name != 'reference'))
    plain = method.augment

    def augmented(images, key):
      views = plain(images, key)
      up = jax.random.bernoulli(jax.random.key(1), 0.5, views.shape)
      scale = 1 + jnp.where(up, rounding, -rounding)
      return (views.astype(jnp.float32) * scale).astype(views.dtype)

    step = sharding.jit_step(
        *pretrain.make_step(c, method.replace(augment=augmented)), mesh
    )
    state, found = step.init(), []
    for batch in batches:
      state, values = step(state, sharding.to_global(batch, mesh))
      found.append(float(values['train/loss']))
    return np.asarray(found)

  usual = losses('reference')
  # bfloat16 has eight bits, of which the last is 2^-7 of the first: a rounding
  # is half of that at most. With less, all values would be rounded back.
  apart = np.abs(losses('reference', 2.0**-8) - usual).max()
  assert apart > 0
  for name in HERE:
    assert np.abs(losses(name) - usual).max() <= apart
