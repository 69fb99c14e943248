"""Weights in and out: ours, the release's, and timm's."""

import gzip
import json
import sys

import golden
import jax
import numpy as np
import pytest
import tiny

from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.method.build import build_method
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import checkpoints, network
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.training import pretrain
from mocov3_jax.weights import (
  convert,
  our_checkpoints,
  state_dict,
  torch_checkpoints,
  torch_names,
  torch_optimizer,
)
from mocov3_jax.weights import files as weight_files

with gzip.open(golden.FOLDER / 'state_dict_names.json.gz') as names:
  NAMES = json.load(names)
RESNET_HEAD = {'projector_layers': 2, 'predictor_out_bn': False}
ARCHITECTURES = {
    'vit_small': ({'name': 'vit_s'}, {}),
    'vit_base': ({'name': 'vit_b'}, {}),
    'vit_conv_small': ({'name': 'vit_s', 'patch_embed': 'conv'}, {}),
    'vit_conv_base': ({'name': 'vit_b', 'patch_embed': 'conv'}, {}),
    'resnet50': ({'name': 'resnet50'}, RESNET_HEAD),
}
FULL = ('params', 'batch_stats', 'target_params', 'target_batch_stats')


def architecture(name):
  model, head = ARCHITECTURES[name]
  c = config_lib.default_config()
  with c.unlocked():
    c.model.update(model)
    c.head.update(head)
  return c


def small_config(**overrides):
  return tiny.config(**{
      'schedule.steps': 4, 'schedule.warmup_epochs': 0.0,
      'knn.every_steps': 0, 'save.every_steps': 2,
  } | overrides)


RESNET = {
    'model.name': 'resnet18', 'model.dim': 4, 'model.depth': 0,
    'model.num_heads': 0, 'model.small_images': True,
    'optimizer.name': 'lars', 'head.projector_layers': 2,
    'head.predictor_out_bn': False,
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A ViT and a ResNet of random numbers: (config, workdir) by name."""
  folder = tmp_path_factory.mktemp('runs')
  found = {
      'vit': (small_config(), folder / 'vit'),
      'resnet': (small_config(**RESNET), folder / 'resnet'),
  }
  for config, path in found.values():
    tiny.random_run(path, config)
  return found


def leaves(workdir, fields=FULL):
  """All arrays of a checkpoint by path."""
  _, folder = checkpoints.find(str(workdir))
  tree = checkpoints.restore_whole(folder)
  return {
      path: x for path, x in our_checkpoints.leaves(tree) if path[0] in fields
  }


def assert_same(one, other):
  assert one.keys() == other.keys()
  for path, array in one.items():
    np.testing.assert_array_equal(array, other[path], err_msg=str(path))
    assert array.dtype == other[path].dtype


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_name_and_shape_of_the_release_has_its_place(name):
  config = architecture(name)
  places = state_dict.full_places(config)
  constants = state_dict.constants(config, places, step=1)
  ours = {n: list(p.shape) for n, p in places.items()}
  ours |= {n: list(x.shape) for n, x in constants.items()}
  theirs = {
      n.removeprefix('module.'): shape
      for n, (shape, _) in NAMES[name]['state_dict'].items()
  }
  assert ours == theirs
  # One to one: no two tensors share a place.
  assert len({p.path for p in places.values()}) == len(places)
  assert torch_names.in_order(ours) == list(theirs)
  order = torch_optimizer.parameter_order(ours)
  assert order == NAMES[name]['parameter_order']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_parameter_counts_are_the_originals(name):
  config = architecture(name)
  count = {'base_encoder': 0, 'predictor': 0}
  for path, leaf in network.network_shapes(config).items():
    if path[0] == 'params':
      owner = 'predictor' if path[1] == 'predictor' else 'base_encoder'
      count[owner] += leaf.size
  # The original counts its fixed positions, too.
  if name != 'resnet50':
    count['base_encoder'] += state_dict.position_table(config).size
  wanted = NAMES[name]['n_params']
  assert count == {k: wanted[k] for k in count}


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_a_backbone_has_the_names_of_the_releases_export(name):
  if name == 'resnet50':  # There the release leaves the projector in.
    config = architecture(name)
    places = state_dict.backbone_places(config, 'query')
    assert set(places) < set(NAMES[name]['deit'])
    return
  config = architecture(name)
  places = state_dict.backbone_places(config, 'query')
  constants = state_dict.constants(config, places, step=1)
  names = {n: list(p.shape) for n, p in places.items()}
  names |= {n: list(x.shape) for n, x in constants.items()}
  assert names == NAMES[name]['deit']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_the_architecture_is_read_off_the_tensors(name):
  config = architecture(name)
  places = state_dict.full_places(config)
  tensors = {
      n: np.broadcast_to(np.float32(0), p.shape) for n, p in places.items()
  }
  tensors |= state_dict.constants(config, places, step=1)
  file = weight_files.File(tensors, {}, (), '', 0.0)
  found, _ = torch_checkpoints._inferred('x.pth.tar', file, True, 0)
  for group in 'model', 'head':
    assert found[group] == config[group]
  assert found.data.image_size == 224


def test_round_trip_through_safetensors_is_exact(runs, tmp_path, capsys):
  for name, (_, run) in runs.items():
    file, back = tmp_path / f'{name}.safetensors', tmp_path / name
    for encoder, fields in ('query', FULL[:2]), ('momentum', FULL[2:]):
      file.unlink(missing_ok=True)
      result = convert.convert(str(run), str(file), encoder)
      there = convert.convert(str(file), str(back / encoder))
      wanted = {
          (FULL[:2][fields.index(path[0])], *path[1:]): array
          for path, array in leaves(run, fields).items()
          if path[1] == 'backbone'
      }
      assert_same(leaves(back / encoder), wanted)
      assert result['tensors'] == there['tensors'] == len(wanted)
  # The report names each tensor on both sides, and its shape.
  lines = capsys.readouterr().out.splitlines()
  wanted = ['blocks.0.attn.qkv.weight', '->',
            'params/backbone/blocks_0/attn/qkv/kernel', '(16,', '48)']
  assert wanted in [line.split() for line in lines]


def test_a_converted_backbone_has_the_same_features(runs, tmp_path):
  config, run = runs['vit']
  file, back = str(tmp_path / 'a.safetensors'), str(tmp_path / 'back')
  convert.convert(str(run), file)
  convert.convert(file, back)
  x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
  features = []
  for folder in run, back:
    found = network.find(str(folder))
    params, stats = network.restore(found, sharding.make_mesh())
    features.append(found.model.apply(
        {'params': params, 'batch_stats': stats}, x, train=False,
        method='features',
    ))
  np.testing.assert_array_equal(*features)


def test_golden_features_after_the_real_converter(tmp_path):
  arrays, meta = golden.load('vit_step')
  tensors = {
      name.removeprefix('init/base_encoder.'): array
      for name, array in arrays.items()
      if name.startswith('init/base_encoder.') and '.head.' not in name
  }
  file = tmp_path / 'tiny.safetensors'
  weight_files.write_safetensors(file, tensors, '')
  with pytest.raises(UserError, match='--num_heads=N'):
    convert.convert(str(file), str(tmp_path / 'run'))
  convert.convert(str(file), str(tmp_path / 'run'), num_heads=4)
  found = network.find(str(tmp_path / 'run'))
  assert found.model.backbone.patch_size == 8
  assert found.config.data.image_size == 32
  params, stats = network.restore(found, sharding.make_mesh())
  for x, feature in ('x1', 'feat1'), ('x2', 'feat2'):
    got = found.model.apply(
        {'params': params, 'batch_stats': stats},
        arrays[x].transpose(0, 2, 3, 1), train=False, method='features',
    )
    want = arrays[feature]
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def release_tensors(config, seed=0):
  """Random tensors of a whole checkpoint of the release."""
  rng = np.random.default_rng(seed)
  places = state_dict.full_places(config)
  tensors = {
      n: rng.normal(size=p.shape).astype(np.float32)
      for n, p in places.items()
  }
  return tensors | state_dict.constants(config, places, step=3)


def backbone_file(path, change):
  """A safetensors file of a small ViT's backbone, after `change`."""
  config = tiny.config()
  places = state_dict.backbone_places(config, 'query')
  tensors = {n: np.ones(p.shape, np.float32) for n, p in places.items()}
  tensors |= state_dict.constants(config, places, step=0)
  change(tensors)
  weight_files.write_safetensors(path, tensors, '')


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda t: t.pop('norm.weight'), ['missing: norm.weight']),
        (
            lambda t: t.update(extra=np.zeros(3, np.float32)),
            ['left over: extra', '--ignore'],
        ),
        (
            lambda t: t.update({'norm.bias': np.zeros(3, np.float32)}),
            ['norm.bias (3,) instead of (16,)'],
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if 'blocks' in n],
            ['blocks.0.norm1.weight'],
        ),
        (lambda t: t.pop('patch_embed.proj.weight'), ['neither a ViT nor']),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_written(
    tmp_path, change, words
):
  backbone_file(tmp_path / 'a.safetensors', change)
  with pytest.raises(UserError) as error:
    convert.convert(
        str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2
    )
  for word in words:
    assert word in str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('prefix', ['module.', 'module.backbone.'])
def test_prefixes_of_wrappers_in_safetensors_are_understood(tmp_path, prefix):
  def wrap(tensors):
    for name in list(tensors):
      tensors[f'{prefix}{name}'] = tensors.pop(name)

  file = tmp_path / 'a.safetensors'
  backbone_file(file, wrap)
  result = convert.convert(str(file), str(tmp_path / 'run'), num_heads=2)
  assert result['tensors'] == 17


def test_leftovers_that_are_named_are_left_out(tmp_path, capsys):
  backbone_file(
      tmp_path / 'a.safetensors',
      lambda t: t.update({'x.a': np.zeros(3, np.float32),
                          'x.b': np.zeros(3, np.float32)}),
  )
  result = convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2,
      ignore=('x.*',),
  )
  assert result['left_out'] == 3  # And the fixed positions.
  assert 'x.a' in capsys.readouterr().out


def test_another_architecture_than_the_configs_is_refused(tmp_path):
  backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  with pytest.raises(UserError) as error:
    convert.convert(
        str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'),
        config=tiny.config(**{'model.depth': 2}),
    )
  assert 'missing: blocks.1.norm1.weight' in str(error.value)


def test_learned_positions_are_kept(tmp_path):
  table = np.random.default_rng(0).normal(size=(1, 5, 16))
  backbone_file(
      tmp_path / 'a.safetensors',
      lambda t: t.update(pos_embed=table.astype(np.float32)),
  )
  convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2
  )
  config = workdir_lib.read_training_config(tmp_path / 'run')
  assert config.model.positions == 'learned'
  found = leaves(tmp_path / 'run')
  np.testing.assert_array_equal(
      found['params', 'backbone', 'pos_embed'], table.astype(np.float32)
  )


def test_a_linear_classifier_travels_along(tmp_path):
  head = np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32)
  backbone_file(
      tmp_path / 'a.safetensors',
      lambda t: t.update({'head.weight': head,
                          'head.bias': np.ones(10, np.float32)}),
  )
  convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2
  )
  convert.convert(str(tmp_path / 'run'), str(tmp_path / 'b.safetensors'))
  one, two = (
      weight_files.read(tmp_path / f'{name}.safetensors', '--from')
      for name in 'ab'
  )
  assert_same(one.tensors, two.tensors)


def test_positions_of_a_half_precision_file_are_still_the_fixed_ones(tmp_path):
  def halve(tensors):
    for name, x in tensors.items():
      tensors[name] = x.astype(np.float16)

  backbone_file(tmp_path / 'a.safetensors', halve)
  result = convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2
  )
  assert result['positions'] == 'sincos' and result['image_size'] == 8
  dtypes = {x.dtype.name for x in leaves(tmp_path / 'run').values()}
  assert dtypes == {'float32'}


def test_ignoring_the_positions_does_not_make_a_network_without(tmp_path):
  backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  result = convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2,
      ignore=('pos_embed',),
  )
  assert result['positions'] == 'sincos' and result['image_size'] == 8


def test_a_small_vit_of_unknown_heads_is_not_guessed_at(tmp_path):
  config = config_lib.default_config()
  config.model.depth = 1
  places = state_dict.backbone_places(config, 'query')
  tensors = {n: np.ones(p.shape, np.float32) for n, p in places.items()}
  tensors |= state_dict.constants(config, places, step=0)
  weight_files.write_safetensors(tmp_path / 'a.safetensors', tensors, '')
  with pytest.raises(UserError, match='--num_heads=12 or --num_heads=6'):
    convert.convert(str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'))
  result = convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=6
  )
  assert result['num_heads'] == 6


def test_a_file_of_ours_tells_all_of_its_config(runs, tmp_path):
  config, run = runs['resnet']
  convert.convert(str(run), str(tmp_path / 'a.safetensors'))
  convert.convert(str(tmp_path / 'a.safetensors'), str(tmp_path / 'back'))
  assert (tmp_path / 'back' / 'checkpoints' / '4').is_dir()  # The step, too.
  back = workdir_lib.read_training_config(tmp_path / 'back')
  assert workdir_lib.to_json(back) == workdir_lib.to_json(config)


def test_a_run_over_more_devices_than_there_are_goes_out_and_back(tmp_path):
  config = small_config(fsdp_devices=2)
  tiny.random_run(tmp_path / 'run', config)
  file = str(tmp_path / 'a.safetensors')
  convert.convert(str(tmp_path / 'run'), file)
  convert.convert(file, str(tmp_path / 'back'))
  back = workdir_lib.read_training_config(tmp_path / 'back')
  assert back.fsdp_devices == 2
  convert.convert(file, str(tmp_path / 'again'), config=config)
  with pytest.raises(UserError, match='unknown fields'):
    convert.convert(file, str(tmp_path / 'eval'), config=eval_config())


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'ignore': ('heads.*',)}, '--ignore=heads.* names nothing'),
        ({'encoder': 'momentum'}, 'gets both encoders'),
        ({'num_heads': -2}, '--num_heads=-2'),
        ({'config': tiny.config(), 'num_heads': 2}, '--num_heads=2, but'),
    ],
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, arguments, words):
  backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  with pytest.raises(UserError) as error:
    convert.convert(
        str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), **arguments
    )
  assert words in str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'change',
    [
        {'norm.weight': np.ones(16, np.int32)},
        {'norm.weight': np.ones(16, np.complex64)},
        {'blocks.0.norm1.weight': np.float32(1)},
        {'pos_embed': np.zeros(5, np.float32)},
        {'pos_embed': np.zeros((1, 0, 16), np.float32)},
        {'patch_embed.proj.weight': np.zeros((16, 1, 0, 0), np.float32)},
        {'head.weight': np.float32(1)},
        {'dist_token': np.zeros((1, 1, 16), np.float32)},
    ],
    ids=lambda change: '-'.join(change),
)
def test_odd_tensors_are_refused(tmp_path, change):
  def put(tensors):
    tensors |= {n: np.asarray(x) for n, x in change.items()}

  backbone_file(tmp_path / 'a.safetensors', put)
  with pytest.raises(UserError):
    convert.convert(
        str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'), num_heads=2
    )


def test_an_output_that_cannot_be_written_is_named(runs, tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(UserError, match='cannot be written'):
    convert.convert(
        str(runs['vit'][1]), str(tmp_path / 'file' / 'a.safetensors')
    )


def test_a_truncated_safetensors_file_is_refused(tmp_path):
  backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  data = (tmp_path / 'a.safetensors').read_bytes()
  (tmp_path / 'a.safetensors').write_bytes(data[: len(data) // 2])
  with pytest.raises(UserError, match='cannot be read as safetensors'):
    convert.convert(str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'))


def test_an_old_config_is_told_so(runs, tmp_path):
  _, run = runs['vit']
  saved = json.loads((run / 'config.json').read_text())
  del saved['model']['readout']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(UserError, match='lacks fields: model.readout'):
    workdir_lib.read_training_config(files.absolute(str(tmp_path)))


def test_a_complete_state_is_recognised(runs):
  for config, run in runs.values():
    found = our_checkpoints.read(str(run))
    state, used = our_checkpoints.train_state(found)
    assert used == set(found.flat)
    method = build_method(config, config_lib.Plan(1, 1, 0, 1.0))
    wanted = jax.tree.structure(method.optimizer.init(state.params))
    assert jax.tree.structure(state.opt_state) == wanted
    some = {k: v for k, v in found.flat.items() if k[0] in FULL}
    partial = state_dict.Weights(config, 4, some, {})
    assert our_checkpoints.train_state(partial) == (None, set())


@pytest.mark.slow
def test_a_run_whose_queue_is_missing_continues_with_an_empty_one(
    runs, tmp_path
):
  _, run = runs['vit']
  config = small_config(**{'knn.queue_share': 0.1})  # Two batches.
  found = our_checkpoints.read(str(run))
  whole = state_dict.Weights(config, 2, found.flat, found.names)
  _, complete = our_checkpoints.write(str(tmp_path / 'whole'), whole)
  assert complete
  assert pretrain.pretrain(config, str(tmp_path / 'whole'))['step'] == 4
  rows = [r for r in tiny.metrics(tmp_path / 'whole') if 'train/loss' in r]
  assert [row['step'] for row in rows] == [2, 3]
  assert [row['knn/queue_filled'] for row in rows] == [0.0, 0.5]


def test_a_backbone_alone_cannot_continue(tmp_path, capsys):
  backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  result = convert.convert(
      str(tmp_path / 'a.safetensors'), str(tmp_path / 'run'),
      config=small_config(),
  )
  assert not result['can_continue']
  assert 'train cannot continue' in capsys.readouterr().err


def test_torch_is_asked_for_where_it_is_not_installed(
    runs, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='pip install torch'):
    convert.convert(str(runs['vit'][1]), str(tmp_path / 'a.pth.tar'))
