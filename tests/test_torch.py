"""Against PyTorch, where it is installed."""

import argparse
import os
import pickle

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convert
import tiny

from mocov3_jax import models
from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.method import objectives, optimizers
from mocov3_jax.method.train_step import Method, TrainState, train_step
from mocov3_jax.models import heads, resnet
from mocov3_jax.runs import network
from mocov3_jax.training import pretrain
from mocov3_jax.weights import (
  convert,
  state_dict,
  torch_checkpoints,
  torch_names,
  torch_optimizer,
)

torch = pytest.importorskip('torch')
torch_moco = pytest.importorskip('torch_moco')


def test_ten_lars_steps_in_float64():
  width, hidden, outputs, steps = 8, 32, 16, 10
  rate = lambda step: 0.5 * min(1, step / 3)
  momentum = lambda step: 1 - 0.1 * (1 - step / steps)
  torch.manual_seed(0)
  nets = torch_moco.Networks(width, hidden, outputs).double()
  with torch.no_grad():  # Off the zeros and ones, so that all must be right.
    for p in nets.parameters():
      p.add_(0.05 * torch.randn_like(p))
  nets.momentum_encoder.load_state_dict(nets.base_encoder.state_dict())
  trained = [*nets.base_encoder.parameters(), *nets.predictor.parameters()]
  buffers = [torch.zeros_like(p) for p in trained]
  x = torch.randn(steps, 2, 16, 3, 32, 32, dtype=torch.float64)

  with jax.enable_x64(True):
    model = models.Network(
        backbone=resnet.ResNet((1, 1, 1, 1), True, width, dtype=jnp.float64),
        projector=heads.MlpHead(2, hidden, outputs, dtype=jnp.float64),
        predictor=heads.MlpHead(
            2, hidden, outputs, out_bn=False, dtype=jnp.float64
        ),
    )
    c = config_lib.default_config().optimizer
    c.update(name='lars', weight_decay=1e-3)
    schedule = lambda step: jnp.array([rate(i) for i in range(steps)])[step]
    method = Method(
        model=model,
        objective=objectives.Objective(
            lambda online, target, past: objectives.moco_v3(
                online, target, temperature=1.0
            ), has_target=True,
        ),
        optimizer=optimizers.build(c, schedule),
        augment=lambda images, key: images,
        learning_rate=schedule,
        momentum=lambda step: jnp.array(
            [momentum(i) for i in range(steps)]
        )[step],
    )
    state = our_state(method, nets)
    step = jax.jit(train_step, static_argnums=0)
    for i in range(steps):
      for p in trained:
        p.grad = None
      loss = torch_moco.loss(nets, *x[i], momentum(i), 1.0)
      loss.backward()
      torch_moco.lars(trained, buffers, rate(i), 0.9, 1e-3, 1e-3)
      views = jnp.asarray(x[i].numpy().transpose(1, 0, 3, 4, 2))
      state, metrics, _ = step(method, jax.random.key(0), state, views)
      np.testing.assert_allclose(
          metrics['train/loss'], loss.item(), rtol=1e-9, err_msg=str(i)
      )
    want = our_state(method, nets)
    for field in test_convert.FULL:
      jax.tree.map(
          lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
          getattr(state, field), getattr(want, field),
      )


def our_state(method, nets):
  """The torch networks as our state, in float64."""
  arrays = {k: v.numpy() for k, v in nets.state_dict().items()}
  shapes = jax.eval_shape(
      lambda: method.model.init(
          jax.random.key(0), jnp.zeros((2, 2, 32, 32, 3)), train=True
      )
  )
  flat = {}
  for collection, *rest in flatten_dict(shapes):
    name = torch_names.torch_name(tuple(rest), 'fc')
    for owner, fields in network.FIELDS.items():
      full = name if rest[0] == 'predictor' else f'{owner}.{name}'
      if rest[0] == 'predictor' and owner == 'momentum_encoder':
        continue
      path = (fields[collection], *rest)
      flat[path] = jnp.asarray(torch_names.to_our_layout(arrays[full], path))
  tree = unflatten_dict(flat)
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      opt_state=method.optimizer.init(tree['params']),
      past_keys=(),
      **tree,
  )


runs = test_convert.runs


def test_round_trip_through_the_release_is_exact(runs, tmp_path):
  everything = (*test_convert.FULL, 'step', 'opt_state')
  for name, (config, run) in runs.items():
    file, back = tmp_path / f'{name}.pth.tar', tmp_path / name
    convert.convert(str(run), str(file))
    # A file of ours tells its recipe; from others, --config does.
    content = torch.load(file, weights_only=True)
    if name == 'vit':
      del content['mocov3_jax']
      torch.save(content, file)
    result = convert.convert(
        str(file), str(back), config=config if name == 'vit' else None
    )
    assert result['step'] == 4 and result['can_continue']
    test_convert.assert_same(
        test_convert.leaves(back, everything),
        test_convert.leaves(run, everything),
    )


def test_a_converted_run_can_be_continued(tmp_path):
  config, run = test_convert.small_config(), tmp_path / 'run'
  pretrain.pretrain(config, str(run))
  file, back = tmp_path / 'a.pth.tar', tmp_path / 'back'
  # From step 2: a workdir that had only got so far.
  convert.convert(f'{run}/checkpoints/2', str(file))
  convert.convert(str(file), str(back), config=config)
  pretrain.pretrain(config, str(back))
  test_convert.assert_same(
      test_convert.leaves(back), test_convert.leaves(run)
  )


def stripped(run, file, *prefixes):
  """A checkpoint as the release would write it, without some tensors."""
  convert.convert(str(run), str(file))
  content = torch.load(file, weights_only=True)
  del content['mocov3_jax']
  content['state_dict'] = {
      n: x for n, x in content['state_dict'].items()
      if not n.removeprefix('module.').startswith(prefixes)
  }
  torch.save(content, file)


def test_without_a_recipe_the_optimizer_is_left_out(runs, tmp_path, capsys):
  _, run = runs['vit']
  file, back = tmp_path / 'a.pth.tar', tmp_path / 'back'
  stripped(run, file, 'nothing')
  result = convert.convert(str(file), str(back), num_heads=2)
  assert not result['can_continue']
  assert 'kept only with --config' in capsys.readouterr().out
  test_convert.assert_same(
      test_convert.leaves(back), test_convert.leaves(run)
  )


def test_a_stripped_checkpoint_is_converted_without_what_is_gone(
    runs, tmp_path
):
  _, run = runs['vit']
  file, back = tmp_path / 'a.pth.tar', tmp_path / 'back'
  stripped(run, file, 'momentum_encoder.', 'predictor.')
  convert.convert(str(file), str(back), num_heads=2)
  want = {
      path: x
      for path, x in test_convert.leaves(run, test_convert.FULL[:2]).items()
      if path[1] != 'predictor'
  }
  test_convert.assert_same(test_convert.leaves(back), want)
  # Of a part that is there, nothing may be missing.
  stripped(run, file := tmp_path / 'b.pth.tar', 'predictor.1.weight')
  with pytest.raises(UserError, match=r'missing: predictor\.1\.weight'):
    convert.convert(str(file), str(tmp_path / 'c'), num_heads=2)


def test_a_recipe_that_a_checkpoint_does_not_complete_is_said(
    runs, tmp_path, capsys
):
  config, run = runs['vit']
  file = tmp_path / 'a.pth.tar'
  stripped(run, file, 'predictor.')
  result = convert.convert(str(file), str(tmp_path / 'back'), config=config)
  assert not result['can_continue']
  assert 'train cannot continue' in capsys.readouterr().err


def test_a_checkpoint_has_the_keys_of_the_release(runs, tmp_path):
  _, run = runs['vit']
  convert.convert(str(run), str(tmp_path / 'a.pth.tar'))
  content = torch.load(tmp_path / 'a.pth.tar', weights_only=True)
  wanted = test_convert.NAMES['vit_small']
  assert list(content) == [*wanted['checkpoint_keys'], 'mocov3_jax']
  group = content['optimizer']['param_groups'][0]
  assert set(group) == set(wanted['optimizer_param_groups'])
  assert set(content['optimizer']['state'][0]) == set(
      wanted['optimizer_state_keys']
  )
  order = torch_optimizer.parameter_order(
      {n.removeprefix('module.'): x for n, x in content['state_dict'].items()}
  )
  frozen = {
      order[i] for i in range(len(order))
      if i not in content['optimizer']['state']
  }
  base = {n for n in frozen if not n.startswith('momentum_encoder.')}
  assert base == {
      'base_encoder.pos_embed', 'base_encoder.patch_embed.proj.weight',
      'base_encoder.patch_embed.proj.bias',
  }
  # PyTorch's own AdamW accepts it.
  parameters = [
      torch.nn.Parameter(content['state_dict'][f'module.{n}']) for n in order
  ]
  torch.optim.AdamW(parameters).load_state_dict(content['optimizer'])


def test_the_releases_linear_probe_and_deit_files_are_read(tmp_path):
  def with_head(tensors):
    tensors['head.weight'] = np.ones((10, 16), np.float32)
    tensors['head.bias'] = np.zeros(10, np.float32)

  test_convert.backbone_file(tmp_path / 'a.safetensors', with_head)
  state = {
      n: torch.tensor(x) for n, x in test_convert.weight_files.read(
          tmp_path / 'a.safetensors', '--from'
      ).tensors.items()
  }
  probe = {
      'epoch': 90, 'arch': 'vit_small', 'best_acc1': torch.tensor(76.7),
      'state_dict': {f'module.{n}': x for n, x in state.items()},
      'optimizer': {'state': {0: {'momentum_buffer': torch.zeros(3)}},
                    'param_groups': []},
  }
  torch.save(probe, tmp_path / 'probe.pth.tar')
  torch.save(
      {'model': state, 'args': argparse.Namespace(lr=1)}, tmp_path / 'deit.pth'
  )
  torch.save(
      {n: x.bfloat16() if x.is_floating_point() else x
       for n, x in state.items()},
      tmp_path / 'bare.pth',
  )
  for name in 'probe.pth.tar', 'deit.pth', 'bare.pth':
    back = tmp_path / name.split('.')[0]
    result = convert.convert(
        str(tmp_path / name), str(back), num_heads=2,
    )
    assert result['tensors'] == 19
    assert result['positions'] == 'sincos' and result['image_size'] == 8
    head = test_convert.leaves(back)['params', 'classifier', 'kernel']
    assert head.shape == (16, 10) and head.dtype == np.float32


@pytest.mark.parametrize(
    'content, words',
    [
        ({'net': {'a': torch.zeros(1)}}, 'neither a ViT nor a ResNet'),
        (
            {'model': {'a': torch.zeros(1)}, 'model_ema': {
                'a': torch.zeros(1)}},
            "'model', 'model_ema'",
        ),
        (
            {'module.norm.weight': torch.zeros(1),
             'norm.weight': torch.zeros(1)},
            'norm.weight twice',
        ),
        (
            {'state_dict': {'encoder_q.0.weight': torch.zeros(1)},
             'optimizer': {'state': {0: {'momentum_buffer': torch.zeros(1)}}}},
            'neither a ViT nor a ResNet',
        ),
        (
            {'student': {'a': torch.zeros(1)}, 'teacher': {
                'a': torch.zeros(1)}},
            "--ignore=student takes 'teacher'",
        ),
        ([torch.zeros(1)], 'holds a list'),
    ],
    ids=lambda x: str(x)[:20],
)
def test_odd_files_are_refused(tmp_path, content, words):
  torch.save(content, tmp_path / 'a.pth')
  with pytest.raises(UserError, match=words):
    convert.convert(
        str(tmp_path / 'a.pth'), str(tmp_path / 'run'), num_heads=2
    )


def test_prefixes_of_wrappers_and_parameters_are_understood(tmp_path):
  test_convert.backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  tensors = test_convert.weight_files.read(
      tmp_path / 'a.safetensors', '--from'
  ).tensors
  torch.save(
      {f'module._orig_mod.{n}': torch.nn.Parameter(torch.tensor(x))
       for n, x in tensors.items()},
      tmp_path / 'weights.bin',
  )
  result = convert.convert(
      str(tmp_path / 'weights.bin'), str(tmp_path / 'run'), num_heads=2
  )
  assert result['tensors'] == 17


def test_a_file_with_a_teacher_and_a_student_gives_either(tmp_path):
  test_convert.backbone_file(tmp_path / 'a.safetensors', lambda t: None)
  tensors = test_convert.weight_files.read(
      tmp_path / 'a.safetensors', '--from'
  ).tensors
  content = {
      owner: {
          f'{prefix}backbone.{n}': factor * torch.tensor(x)
          for n, x in tensors.items()
      } | {f'{prefix}head.mlp.0.weight': torch.zeros(3, 16)}
      for owner, prefix, factor in (
          ('student', 'module.', 1.0), ('teacher', '', 2.0)
      )
  }
  # The positions are a table.
  for state in content.values():
    for name in state:
      if name.endswith('pos_embed'):
        state[name] = torch.tensor(tensors['pos_embed'])
  torch.save(content | {'optimizer': {'lr': 1e-3}, 'epoch': 3},
             tmp_path / 'dino.pth')
  for keep, drop, factor in (
      ('student', 'teacher', 1.0), ('teacher', 'student', 2.0)
  ):
    result = convert.convert(
        str(tmp_path / 'dino.pth'), str(tmp_path / keep), num_heads=2,
        ignore=(drop, 'head.mlp.*'),
    )
    assert result['tensors'] == 17
    kernel = test_convert.leaves(tmp_path / keep)[
        'params', 'backbone', 'norm', 'scale'
    ]
    np.testing.assert_array_equal(kernel, factor * tensors['norm.weight'])


@pytest.mark.parametrize('optimizer', [
    {'lr': 0.1}, [1, 2], {'state': [1]}, {'state': {'a': {}}}, 'none',
], ids=str)
def test_an_unfamiliar_optimizer_is_left_out(tmp_path, optimizer, capsys):
  config = test_convert.small_config()
  tensors = {
      n: torch.tensor(x)
      for n, x in test_convert.release_tensors(config).items()
  }
  torch.save(
      {'state_dict': tensors, 'optimizer': optimizer}, tmp_path / 'a.pth.tar'
  )
  result = convert.convert(
      str(tmp_path / 'a.pth.tar'), str(tmp_path / 'run'), config=config
  )
  assert not result['can_continue']
  out, err = capsys.readouterr()
  assert 'optimizer' in out and 'not a state of the release' in out
  assert 'train cannot continue' in err


def test_epochs_are_those_of_the_release(tmp_path):
  config = tiny.config(batch_size=4096)
  for step, epoch in (312, 1), (93_600, 300), (311, 0):
    flat = {
        (f, *path[1:]): np.ones(x.shape, np.float32)
        for path, x in network.network_shapes(config).items()
        for f in (path[0], f'target_{path[0]}')
    }
    source = state_dict.Weights(config, step, flat, {})
    file = tmp_path / f'{step}.pth.tar'
    torch_checkpoints.write(file, source, 'query')
    content = torch.load(file, weights_only=True)
    assert content['epoch'] == epoch
    assert 'optimizer' not in content  # There was none.


class Malicious:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


@pytest.mark.parametrize('how', ['pickle', 'torch', 'inside'])
def test_a_malicious_pickle_is_refused_and_creates_nothing(tmp_path, how):
  trap, file = Malicious(tmp_path / 'created'), tmp_path / 'evil.pth.tar'
  if how == 'pickle':
    file.write_bytes(pickle.dumps(trap))
  elif how == 'torch':
    torch.save(trap, file)
  else:
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'x': trap}, file)
  code, out, err = tiny.run(
      'convert', f'--from={file}', f'--to={tmp_path / "run"}'
  )
  assert code == 2, err
  assert err.startswith(f'error: --from={file} is refused')
  assert '\x1b' not in err and len(err.splitlines()) == 1
  assert 'Traceback' not in err and not out
  assert sorted(p.name for p in tmp_path.iterdir()) == ['evil.pth.tar']


def test_a_truncated_file_is_refused(runs, tmp_path):
  file = tmp_path / 'a.pth.tar'
  convert.convert(str(runs['vit'][1]), str(file))
  data = file.read_bytes()
  for part in data[: len(data) // 2], data[:100], b'':
    file.write_bytes(part)
    with pytest.raises(UserError, match=r'a\.pth\.tar'):
      convert.convert(str(file), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()
