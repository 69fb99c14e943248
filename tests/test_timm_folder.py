"""Folders for timm, as far as they can be looked at without it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.runs import checkpoints, network
from mocov3_jax.weights import timm_folder


def export(tmp_path, config=None, **more):
  run = tiny.random_run(tmp_path / 'run', config or tiny.config())
  folder = tmp_path / 'folder'
  code, out, err = tiny.call(
      'convert', f'--from={run}', f'--to=timm:{folder}', *more
  )
  assert code == 0, err
  return run, folder


def test_a_run_becomes_weights_a_config_and_a_card(tmp_path):
  run, folder = export(tmp_path)
  assert sorted(p.name for p in folder.iterdir()) == [
      'README.md', 'config.json', 'model.safetensors'
  ]
  found = json.loads((folder / 'config.json').read_text())
  assert found['architecture'] == 'vit_tiny_patch16_224'
  assert found['model_args'] == {
      'in_chans': 1, 'img_size': 8, 'patch_size': 4, 'embed_dim': 16,
      'depth': 1, 'num_heads': 2, 'class_token': True, 'global_pool': 'token',
      'fc_norm': False, 'pos_embed': 'learn',
  }
  assert found['pretrained_cfg']['mean'] == [0.305]
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert tensors['pos_embed'].shape == (1, 5, 16)
  card = (folder / 'README.md').read_text()
  assert 'moco_v3' in card and '| `batch_size` | 64 |' in card
  # Once more, it is refused.
  code, _, err = tiny.call('convert', f'--from={run}', f'--to=timm:{folder}')
  assert code == 2 and 'exists' in err


@pytest.mark.slow
def test_a_card_tells_data_curve_and_evaluations(tmp_path):
  workdir = tmp_path / 'run'
  code, _, err = tiny.call('train', f'--workdir={workdir}', *tiny.flags())
  assert code == 0, err
  code, _, err = tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={workdir}', f'--workdir={tmp_path / "knn"}',
  )
  assert code == 0, err
  code, _, err = tiny.call(
      'convert', f'--from={workdir}', f'--to=timm:{tmp_path / "folder"}'
  )
  assert code == 0, err
  card = (tmp_path / 'folder' / 'README.md').read_text()
  result = json.loads((workdir / 'result.json').read_text())
  assert '1,437 images, 10 classes' in card
  assert f'| 66 | {result["knn/top1"]:.1%} |' in card
  assert '| knn | 66 |' in card


def test_vit_s_of_the_paper_has_12_heads():
  c = config_lib.default_config()
  assert timm_folder.describe(c)['model_args']['num_heads'] == 12


@pytest.mark.parametrize('description, heads', [
    ({'architecture': 'vit_small_patch16_224'}, 6),
    ({'architecture': 'vit_small_patch16_224',
      'model_args': {'num_heads': 12}}, 12),
    ({'architecture': 'deit_base_patch16_224'}, 12),
    ({'architecture': 'vit_base_patch14_dinov2'}, 12),
    ({}, 0), ({'architecture': 3, 'model_args': 'x'}, 0),
])
def test_heads_are_those_that_a_folder_tells(description, heads):
  assert timm_folder.heads_of(description) == heads


def test_another_projects_folder_comes_in_with_its_normalisation(tmp_path):
  run, folder = export(tmp_path)
  # Without what ours say of themselves.
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  found = json.loads((folder / 'config.json').read_text())
  found['pretrained_cfg'] |= {'mean': [0.25], 'std': [0.75]}
  (folder / 'config.json').write_text(json.dumps(found))
  code, out, err = tiny.call(
      'convert', f'--from=timm:{folder}', f'--to={tmp_path / "back"}'
  )
  assert code == 0, err
  config, checkpoint = network.locate(str(tmp_path / 'back'))
  assert tuple(config.data.mean) == (0.25,)
  assert tuple(config.data.std) == (0.75,)
  assert config.model.num_heads == 2 or (
      json.loads(out.splitlines()[-1])['num_heads'] == 2
  )
  assert 'assumed normalisation' not in err
  before = checkpoints.restore_whole(run / 'checkpoints' / '4')
  after = checkpoints.restore_whole(checkpoint)
  for x, y in zip(
      jax.tree.leaves(before['params']['backbone']),
      jax.tree.leaves(after['params']['backbone']), strict=True,
  ):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('overrides, words', [
    ({'model.patch_embed': 'conv'}, 'patch_embed'),
    ({'model.mlp_norm': 'batch'}, "model.mlp_norm='batch'"),
    ({'model.readout': 'pool'}, "model.readout='pool'"),
    ({'model.name': 'resnet18', 'model.small_images': True}, 'small_images'),
])
def test_what_timm_does_not_have_is_refused(overrides, words):
  c = config_lib.default_config()
  c.update_from_flattened_dict(overrides)
  with pytest.raises(UserError, match=words):
    timm_folder.describe(c)


@pytest.mark.parametrize('what', ['no folder', 'no weights', 'bad mean'])
def test_a_folder_that_is_none_gets_one_message(tmp_path, what):
  _, folder = export(tmp_path)
  if what == 'no folder':
    folder = tmp_path / 'nothing'
  elif what == 'no weights':
    (folder / 'model.safetensors').unlink()
  else:
    found = json.loads((folder / 'config.json').read_text())
    found['pretrained_cfg']['mean'] = ['x']
    (folder / 'config.json').write_text(json.dumps(found))
  code, out, err = tiny.call(
      'convert', f'--from=timm:{folder}', f'--to={tmp_path / "back"}'
  )
  assert code == 2 and 'config.json' in err and 'Traceback' not in err
  assert not (tmp_path / 'back').exists()


def test_a_classifier_goes_along_with_its_names(tmp_path):
  config = tiny.config()
  run = tiny.random_run(tmp_path / 'run', config)
  params = checkpoints.restore_whole(run / 'checkpoints' / '4')['params']
  network.write(
      str(tmp_path / 'probe'), config, 4, jax.tree.map(jnp.asarray, {
          'params': {
              'backbone': params['backbone'],
              'classifier': {
                  'kernel': np.ones((16, 3), np.float32),
                  'bias': np.zeros(3, np.float32),
              },
          },
      }), ('cat', 'dog', 'newt'),
  )
  code, _, err = tiny.call(
      'convert', f'--from={tmp_path / "probe"}', f'--to=timm:{tmp_path / "f"}'
  )
  assert code == 0, err
  found = json.loads((tmp_path / 'f' / 'config.json').read_text())
  assert found['num_classes'] == 3
  assert found['label_names'] == ['cat', 'dog', 'newt']
  tensors = safetensors.numpy.load_file(tmp_path / 'f' / 'model.safetensors')
  assert tensors['head.weight'].shape == (3, 16)


def test_a_folder_goes_into_another(tmp_path):
  _, folder = export(tmp_path)
  code, _, err = tiny.call(
      'convert', f'--from=timm:{folder}', f'--to=timm:{tmp_path / "again"}'
  )
  assert code == 0, err
  one, other = (
      safetensors.numpy.load_file(path / 'model.safetensors')
      for path in (folder, tmp_path / 'again')
  )
  assert one.keys() == other.keys()
  assert all(np.array_equal(one[name], other[name]) for name in one)


def test_damaged_weights_are_named_as_they_were_asked_for(tmp_path):
  _, folder = export(tmp_path)
  (folder / 'model.safetensors').write_bytes(b'no weights')
  code, _, err = tiny.call(
      'train', f'--workdir={tmp_path / "new"}',
      *tiny.flags(**{'init.checkpoint': f'timm:{folder}'}),
  )
  assert code == 2
  assert f'error: init.checkpoint=timm:{folder} cannot be read as safe' in err
  assert not (tmp_path / 'new').exists()
