"""Pre-training that begins with the weights of a checkpoint."""

import json
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.runs import checkpoints
from mocov3_jax.training import initial

SHORT = {
    'schedule.epochs': 2.0, 'schedule.warmup_epochs': 0.5,
    'knn.every_steps': 22, 'save.every_steps': 11, 'save.keep_latest': 9,
    'save.initial': True,
}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A run of random numbers, with heads."""
  return tiny.random_run(
      tmp_path_factory.mktemp('source') / 'run', tiny.config()
  )


def train(workdir, source, **overrides):
  return tiny.call('train', f'--workdir={workdir}', *tiny.flags(
      **(SHORT | {'init.checkpoint': source} | overrides)
  ))


def saved(workdir, step):
  return checkpoints.restore_whole(
      epath.Path(workdir) / 'checkpoints' / str(step)
  )


def equal(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in leaves)


@pytest.fixture(scope='module')
def run(source, tmp_path_factory):
  """A run whose backbone is left alone for an epoch of 22 steps."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  code, _, err = train(
      workdir, source, **{'init.freeze_backbone_epochs': 1.0}
  )
  assert code == 0, err
  assert f'begins with {source}/checkpoints/4, with fresh heads' in err
  return workdir


def test_both_networks_begin_with_the_backbone_to_the_bit(source, run):
  its = saved(source, 4)['params']
  state = saved(run, 0)
  for field in 'params', 'target_params':
    assert equal(state[field]['backbone'], its['backbone'])
    assert not equal(state[field]['projector'], its['projector'])
  assert equal(
      state['params']['projector'], state['target_params']['projector']
  )


def test_a_frozen_backbone_stays_to_the_bit_and_then_learns(source, run):
  its = saved(source, 4)['params']['backbone']
  for step in 11, 22:
    state = saved(run, step)
    assert equal(state['params']['backbone'], its)
    assert equal(state['target_params']['backbone'], its)
    assert not equal(
        state['params']['projector'], saved(run, 0)['params']['projector']
    )
  state = saved(run, 44)
  assert not equal(state['params']['backbone'], its)
  # Its first steps are no larger than others: the moments were there.
  moved = [
      float(np.abs(x - y).max()) for x, y in zip(
          jax.tree.leaves(saved(run, 33)['params']['backbone']),
          jax.tree.leaves(its), strict=True,
      )
  ]
  assert max(moved) < 11 * 2 * 1e-3  # Steps, a bound of AdamW's, the rate.


def test_knn_at_step_0_is_that_of_the_checkpoint(source, run, tmp_path):
  code, out, err = tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={source}', f'--workdir={tmp_path / "knn"}',
  )
  assert code == 0, err
  before = tiny.metrics(run)[0]
  assert before['step'] == 0
  assert before['knn/top1'] == json.loads(out.splitlines()[-1])['knn/top1']


def test_what_it_began_with_is_noted_and_not_needed_again(
    source, run, tmp_path
):
  workdir = tmp_path / 'run'
  shutil.copytree(run, workdir)
  for step in 33, 44:
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  (workdir / 'result.json').unlink()
  before = json.loads((workdir / 'environment.json').read_text())
  assert before['init'] == f'{source}/checkpoints/4'
  assert len(before['init_sha256']) == 64
  away = source.with_name('away')
  source.rename(away)
  try:
    code, _, err = train(
        workdir, source, **{'init.freeze_backbone_epochs': 1.0}
    )
  finally:
    away.rename(source)
  assert code == 0, err
  assert tiny.metrics(workdir) == tiny.metrics(run)
  assert json.loads((workdir / 'environment.json').read_text()) == before


@pytest.fixture(scope='module')
def timm_folder(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp('timm') / 'folder'
  code, _, err = tiny.call('convert', f'--from={source}', f'--to=timm:{folder}')
  assert code == 0, err
  return folder


def test_a_folder_of_timm_is_taken_to_the_bit(source, timm_folder, tmp_path):
  # The program of the run above.
  code, _, err = train(tmp_path / 'run', f'timm:{timm_folder}', **{
      'init.freeze_backbone_epochs': 1.0, 'knn.every_steps': 0,
  })
  assert code == 0, err
  assert f'begins with timm:{timm_folder}, with fresh heads' in err
  state, its = saved(tmp_path / 'run', 0), saved(source, 4)['params']
  for field in 'params', 'target_params':
    assert equal(state[field]['backbone'], its['backbone'])
  before = json.loads((tmp_path / 'run' / 'environment.json').read_text())
  assert before['init'] == f'timm:{timm_folder}'


@pytest.mark.parametrize('what, overrides, words', [
    ('other heads', {'model.num_heads': 4}, ['model.num_heads: 2 there']),
    ('heads wanted', {'init.heads': True}, ['has no predictor']),
    ('no config', {}, ['lacks config.json or model.safetensors']),
    pytest.param(
        'other pixels', {'data.mean': (0.5,)},
        ['data.mean=(0.305,), continued with (0.5,)', 'kNN at step 0'],
        marks=pytest.mark.slow,
    ),
])
def test_a_folder_of_timm_that_does_not_fit(
    timm_folder, tmp_path, what, overrides, words
):
  folder = shutil.copytree(timm_folder, tmp_path / 'folder')
  if what == 'no config':
    (folder / 'config.json').unlink()
  code, _, err = train(tmp_path / 'run', f'timm:{folder}', **{
      'schedule.epochs': 0.1, 'schedule.warmup_epochs': 0.0, **overrides
  })
  assert code == (0 if what == 'other pixels' else 2), err
  for word in words:
    assert word in err, err


@pytest.mark.slow
def test_heads_are_taken_where_they_are_asked_for(source, tmp_path):
  code, _, err = train(tmp_path / 'run', source, **{
      'init.heads': True, 'schedule.epochs': 0.5, 'schedule.warmup_epochs': 0.1,
  })
  assert code == 0 and 'with its heads' in err, err
  assert equal(saved(tmp_path / 'run', 0)['params'], saved(source, 4)['params'])


@pytest.mark.parametrize('what, overrides, words', [
    ('another width', {'model.dim': 32, 'model.num_heads': 4},
     ['does not fit', 'blocks_0/', '(16,) there, (32,) here', 'more']),
    ('another patch', {'model.patch_size': 2},
     ['does not fit', 'patch_embed/kernel']),
    ('other positions', {'model.positions': 'learned'},
     ['backbone/pos_embed: absent there, (1, 5, 16) here']),
    ('other heads', {'model.num_heads': 4},
     ['does not fit', 'model.num_heads: 2 there, 4 here']),
    # A BatchNorm's parameters are called and shaped as a LayerNorm's.
    ('other norms', {'model.mlp_norm': 'batch'},
     ['does not fit', 'norm2/mean: absent there, (16,) here']),
    ('no checkpoint', {}, ["checkpoint='", 'is not a checkpoint']),
    ('no heads', {'init.heads': True}, ['has no predictor and no projector']),
    ('NaN', {}, ['NaN']),
])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    source, tmp_path, what, overrides, words
):
  given = source
  if what == 'no checkpoint':
    given = tmp_path / 'nothing'
  if what in ('no heads', 'NaN'):
    # As `convert` makes it of a file with a backbone alone.
    tree = saved(source, 4)
    params = {'backbone': tree['params']['backbone']}
    if what == 'NaN':
      params['backbone']['cls_token'] = np.full((1, 1, 16), np.nan, np.float32)
    given = tmp_path / 'backbone'
    initial.network.write(
        str(given), tiny.config(), 0, jax.tree.map(jnp.asarray, {
            'params': params
        }),
    )
  code, out, err = train(tmp_path / 'run', given, **overrides)
  assert code == 2 and not out and 'Traceback' not in err, err
  for word in words:
    assert word in err, err
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('given', [
    'run', pytest.param('timm', marks=pytest.mark.slow)
])
def test_the_recipe_continues_what_it_is_given(
    source, timm_folder, tmp_path, given
):
  checkpoint = source if given == 'run' else f'timm:{timm_folder}'
  code, out, err = tiny.call(
      'train', f'--config=configs/continue.py:{checkpoint}',
      f'--workdir={tmp_path / "run"}', '--config.data.source=digits',
      '--config.batch_size=64', '--config.schedule.steps=3',
      '--config.schedule.warmup_epochs=0.0', '--config.head.hidden_dim=16',
      '--config.head.out_dim=8', '--config.knn.every_steps=0',
  )
  assert code == 0, err
  assert json.loads(out.splitlines()[-1])['step'] == 3
  assert equal(
      saved(tmp_path / 'run', 3)['params']['backbone'],
      saved(source, 4)['params']['backbone'],
  )  # Frozen for that long.
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['model']['dim'] == 16
  assert config['init']['checkpoint'] == str(checkpoint)


@pytest.mark.parametrize('given, words', [
    ('', 'names no checkpoint'), (':/nowhere', 'is not a checkpoint'),
    (':timm:/nowhere', 'lacks config.json'),
])
def test_the_recipe_says_what_it_needs(tmp_path, given, words):
  code, out, err = tiny.call(
      'train', f'--config=configs/continue.py{given}',
      f'--workdir={tmp_path / "run"}',
  )
  assert code == 2 and not out and words in err, err
  assert 'UserError' not in err and len(err.splitlines()) == 1


def test_a_workdir_that_holds_another_run_is_refused(source, run):
  code, _, err = train(run, source)
  assert code == 2 and 'init.freeze_backbone_epochs' in err


def test_a_resnet_has_no_layer_decay():
  c = config_lib.default_config()
  c.model.name, c.optimizer.layer_decay = 'resnet18', 0.5
  with pytest.raises(UserError, match='layer_decay=0.5 is for ViTs'):
    build_method(c, config_lib.Plan(1, 1, 0, 0.1))


def test_learned_positions_are_resized_antialiased():
  rng = np.random.default_rng(0)
  first = rng.normal(size=(1, 1, 6))
  ramp = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 8, 6))
  table = np.concatenate([first, ramp.reshape(1, 64, 6)], axis=1)
  found = initial._resized(jnp.asarray(table), 4, has_class=True)
  assert found.shape == (1, 17, 6)
  np.testing.assert_allclose(found[:, :1], first, rtol=1e-6)
  grid = found[0, 1:].reshape(4, 4, 6)
  # The middle of each two rows; the edges of a bicubic filter apart.
  np.testing.assert_allclose(grid[1:3, :, 0].mean(1), [2.5, 4.5], atol=0.05)
  # What alternates from row to row is averaged, and not picked.
  stripes = np.broadcast_to((-1.0) ** np.arange(8)[:, None, None], (8, 8, 6))
  table = np.concatenate([first, stripes.reshape(1, 64, 6)], axis=1)
  found = initial._resized(jnp.asarray(table), 4, has_class=True)
  assert np.abs(found[0, 1:].reshape(4, 4, 6)[1:3]).max() < 0.2
  same = jnp.asarray(table)
  assert initial._resized(same, 8, has_class=True) is same
