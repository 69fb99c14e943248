"""Whole runs on folders of photographs, some of them corrupt."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import photos
from PIL import Image
import pytest
import tiny

from mocov3_jax.base.errors import Preempted, UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import photo_tiles, pipeline
from mocov3_jax.evals.evaluator import Evaluator
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import checkpoints
from mocov3_jax.training import pretrain, progress
from mocov3_jax.training import trainer as trainer_lib
from mocov3_jax.training.trainer import Trainer

SMALL = {
    'data.image_size': 32, 'data.mean': '(.485,.456,.406)',
    'data.std': '(.229,.224,.225)', 'model.patch_size': 8,
    'batch_size': 32, 'schedule.epochs': 4.0, 'schedule.warmup_epochs': 1.0,
    'knn.every_steps': 8, 'save.every_steps': 4,
    'data.max_unreadable': 0.2,
}


def flags(folder, **overrides):
  values = SMALL | {'data.source': f'folder:{folder}'} | overrides
  return tiny.flags(**values)


def result(outcome):
  code, out, err = outcome
  assert code == 0, err
  return json.loads(out.splitlines()[-1])


def bad_names(workdir):
  lines = (workdir / 'bad_images.txt').read_text().splitlines()
  return [line.split('\t')[0] for line in lines]


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
  """Ten folders of 16 tiles, 16 of these 160 files cut off."""
  folder = tmp_path_factory.mktemp('labelled')
  photos.write_tiles(folder, tile=48, each=16, corrupt=0.1)
  return folder


@pytest.fixture(scope='module')
def straight(labelled, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'straight'
  return workdir, tiny.call('train', f'--workdir={workdir}', *flags(labelled))


@pytest.mark.slow
def test_a_folder_with_corrupt_files_trains_and_lists_them(straight, labelled):
  workdir, outcome = straight
  final = result(outcome)
  assert 0 <= final['knn/top1'] <= 1 and final['knn/top1_init'] >= 0
  rows = tiny.metrics(workdir)
  replaced = [row['data/unreadable'] for row in rows if 'train/loss' in row]
  assert len(replaced) == 16 and 0 < sum(replaced)
  names = bad_names(workdir)
  assert len(names) == len(set(names)) > 0
  for name in names:
    assert (labelled / name).exists()
  text = (workdir / 'bad_images.txt').read_text().lower()
  assert text.count('truncated') == len(names)
  assert 'classes' in outcome[2] and 'no kNN' not in outcome[2]


@pytest.mark.slow
def test_a_killed_run_on_a_folder_continues_as_if_nothing_had_been(
    straight, labelled, tmp_path
):
  workdir = tmp_path / 'killed'
  process = tiny.start(
      'train', f'--workdir={workdir}', *flags(labelled), env_add=tiny.here()
  )
  for line in process.stderr:
    if line.startswith('step 8/'):
      process.kill()
  process.communicate()
  final = result(tiny.call('train', f'--workdir={workdir}', *flags(labelled)))
  assert final['step'] == 16
  assert tiny.metrics(workdir) == tiny.metrics(straight[0])
  assert sorted(bad_names(workdir)) == sorted(bad_names(straight[0]))


@pytest.mark.slow
def test_too_many_corrupt_files_end_the_run_after_a_save(labelled, tmp_path):
  folder, workdir = tmp_path / 'folder', tmp_path / 'run'
  shutil.copytree(labelled, folder)
  # With labels, the bank of kNN would end it before its first step.
  unlabelled = {'data.labels': 'none'}
  arguments = flags(folder, **unlabelled, **{'data.max_unreadable': 0.01})
  code, out, err = tiny.call('train', f'--workdir={workdir}', *arguments)
  assert code == 2 and out == '' and 'Traceback' not in err
  assert 'data.max_unreadable=0.01' in err and 'bad_images.txt' in err
  step = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert f'Step {step} is saved' in err
  # The same limit ends it again, once as many more could not be read.
  code, _, again = tiny.call('train', f'--workdir={workdir}', *arguments)
  assert code == 2 and f'continuing at step {step}\n' in again
  later = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert later > step and f'Step {later} is saved' in again
  # With a higher limit it goes on where it ended.
  other = tmp_path / 'other'
  shutil.copytree(workdir, other)
  final = result(tiny.call('train', f'--workdir={other}', *flags(
      folder, **unlabelled
  )))
  assert final['step'] == 20
  # And so does the same command, once the files are mended.
  photos.write_tiles(folder, tile=48, each=16)
  final = result(tiny.call('train', f'--workdir={workdir}', *arguments))
  assert final['step'] == 20
  rows = tiny.metrics(workdir)
  assert not any(
      row['data/unreadable'] for row in rows
      if row['step'] >= later and 'train/loss' in row
  )


def small_trainer(folder, evaluate=lambda state: {'test/top1': 0.0}):
  """64 images in 8 steps an epoch, 6 of which may be bad; learns nothing."""
  c = tiny.config(**{
      'data.source': f'folder:{folder}', 'data.mean': (0.5,) * 3,
      'data.std': (0.5,) * 3, 'data.max_unreadable': 0.1, 'batch_size': 8,
      'save.every_steps': 100,
  })
  mesh = sharding.make_mesh()
  source = pretrain.load_splits(c).train

  def step(state, batch):
    values = {'train/loss': jnp.ones(()), 'train/loss_chance': jnp.ones(())}
    return {'step': state['step'] + 1}, values

  return Trainer(
      config=c, schema=config_lib.schema(), plan=config_lib.plan(c, 64),
      mesh=mesh,
      init=lambda: {'step': jnp.zeros((), jnp.int32)}, step=step,
      reader=pretrain.make_reader(c, source, sharding.local_positions(mesh, 8)),
      fingerprint={}, advice='', evaluators=[
          Evaluator(evaluate, 0, 'test/top1', lambda values: '', best=True)
      ],
  )


@pytest.fixture
def spoil(tmp_path):
  """Empties the first `count` images of these steps; f() mends them."""
  folder = tmp_path / 'small'
  folder.mkdir()

  def write():
    for i in range(64):
      Image.new('RGB', (9, 9), (i, 0, 0)).save(folder / f'{i:02}.png')

  def spoil(steps=(), count=0):
    write()
    reader = small_trainer(folder).reader
    for step in steps:
      for index in reader.indices(step)[:count].tolist():
        (folder / reader.source.name(index)).write_bytes(b'')
    return folder

  return spoil


def test_a_checkpoint_is_saved_by_time_as_well(spoil, tmp_path, monkeypatch):
  # The clock goes on by a minute whenever it is asked.
  minutes = itertools.count()
  monkeypatch.setattr(trainer_lib, 'time', types.SimpleNamespace(
      monotonic=lambda: 60.0 * next(minutes), perf_counter=time.perf_counter
  ))
  measured, saved = [], []
  trainer = small_trainer(
      spoil(), lambda state: measured.append(1) or {'test/top1': 0.0}
  )
  trainer.config.save.every_minutes = 5.0
  save, paused = checkpoints.Checkpoints.save, progress.Throughput.paused
  pauses = []  # Of the rate of images, that have begun and not ended.

  def noted_save(self, step, *rest):
    saved.append(step)
    assert pauses  # Saving is no training.
    save(self, step, *rest)

  @contextlib.contextmanager
  def noted_pause(self):
    pauses.append(self)
    with paused(self):
      yield
    pauses.pop()

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', noted_save)
  monkeypatch.setattr(progress.Throughput, 'paused', noted_pause)
  trainer.run(str(tmp_path / 'run'))
  total = trainer.plan.total_steps
  assert saved[-1] == total and 2 <= len(saved) - 1 <= total // 5 + 1
  # Only the first and the last state are evaluated.
  assert len(measured) == 2
  assert all('train/save' not in row for row in tiny.metrics(tmp_path / 'run'))
  trainer.config.save.every_minutes = 0.0
  saved.clear()
  trainer.run(str(tmp_path / 'other'))
  assert saved == [total]


def test_the_initial_state_is_saved_and_kept(spoil, tmp_path):
  trainer = small_trainer(spoil())
  trainer.config.save.initial = True
  trainer.config.save.every_steps = 4
  trainer.run(str(tmp_path / 'run'))
  saved = {int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert saved >= {0, 20, 24} and 8 not in saved
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '24')
  assert small_trainer(spoil()).run(str(tmp_path / 'run'))['step'] == 24


def test_unreadable_images_are_named_as_they_are_met(spoil, tmp_path, capsys):
  trainer = small_trainer(spoil(range(2), 2))
  trainer.config.data.max_unreadable = 1.0
  trainer.run(str(tmp_path / 'run'))
  said = capsys.readouterr().err
  lines = (tmp_path / 'run' / 'bad_images.txt').read_text().splitlines()
  assert len(lines) == 4
  for line in lines:
    name, why = line.split('\t')
    assert said.count(f'unreadable: {name}: {why}\n') == 1
  # Of many, the list has all.
  trainer = small_trainer(spoil(range(4), 5))
  trainer.config.data.max_unreadable = 1.0
  trainer.run(str(tmp_path / 'many'))
  said = capsys.readouterr().err
  assert said.count('unreadable: ') == 11
  assert f'more are listed in {tmp_path}/many/bad_images.txt' in said


def test_the_same_line_goes_on_once_the_files_are_mended(spoil, tmp_path):
  folder, workdir = spoil(range(8), 2), str(tmp_path / 'run')
  # The eighth is noticed while one more step is being computed.
  with pytest.raises(UserError, match=r'10 images .* step 0 up to step 5, .*'):
    small_trainer(folder).run(workdir)
  # Six in the three steps left of this epoch are not too many, as the rule is.
  with pytest.raises(UserError, match=r'images .* step 8 up to step 1\d, .*'):
    small_trainer(folder).run(workdir)
  spoil()
  done = small_trainer(folder).run(workdir)
  assert done['step'] == 24 and done['data/unreadable'] == 0


def test_bad_images_before_an_interruption_are_counted(spoil, tmp_path):
  folder, workdir = spoil(range(8), 2), str(tmp_path / 'run')

  def interrupted(state):
    del state
    signal.raise_signal(signal.SIGTERM)
    return {'test/top1': 0.0}

  with pytest.raises(Preempted, match='saved step 2 '):
    small_trainer(folder, interrupted).run(workdir)
  with pytest.raises(UserError, match='10 images .* step 0 up to step 5, '):
    small_trainer(folder).run(workdir)


def test_a_stop_ends_the_wait_for_a_batch(spoil, tmp_path, monkeypatch):
  trainer, workdir = small_trainer(spoil()), tmp_path / 'run'
  never, read = threading.Event(), pipeline.BatchReader.__call__

  def stuck(self, step):
    if step == 5:
      never.wait()
    return read(self, step)

  def stop_it():
    log = workdir / 'metrics.jsonl'
    while not (log.exists() and log.read_text().count('train/loss') >= 4):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(pipeline.BatchReader, '__call__', stuck)
  threading.Thread(target=stop_it, daemon=True).start()
  try:
    with pytest.raises(Preempted, match='saved step 5 '):
      trainer.run(str(workdir))
  finally:
    never.set()
  # All steps are logged, the last one too, and the run goes on exactly.
  rows = tiny.metrics(workdir)
  assert [r['step'] for r in rows if 'train/loss' in r] == list(range(5))
  assert small_trainer(spoil()).run(str(workdir))['step'] == 24


def test_too_many_in_the_last_step_of_an_epoch_are_noticed(spoil, tmp_path):
  folder = spoil([7], 7)
  with pytest.raises(UserError, match='step 0 up to step 9, '):
    small_trainer(folder).run(str(tmp_path / 'run'))


@pytest.mark.slow
def test_a_folder_without_labels_gets_other_monitors(tmp_path):
  folder = tmp_path / 'flat'
  photos.write_tiles(folder, tile=48, each=8, nested=False)
  workdir = tmp_path / 'run'
  outcome = tiny.call('train', f'--workdir={workdir}', *flags(folder))
  final = result(outcome)
  assert outcome[2].count('no labels, hence no kNN') == 1
  for name in 'alignment', 'uniformity', 'effective_rank':
    assert f'features/{name}' in final
  assert 'knn/top1' not in final
  code, _, err = tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={workdir}', f'--workdir={tmp_path / "eval"}',
  )
  assert code == 2 and "has no labels, which protocol='knn' needs" in err
  assert not (tmp_path / 'eval').exists()
  # It can be evaluated on other data, which has labels.
  other = tmp_path / 'other'
  photos.write_tiles(other, tile=48, each=12)
  evaluated = result(tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={workdir}', f'--workdir={tmp_path / "eval"}',
      f'--config.data.source=folder:{other}',
  ))
  assert 0 <= evaluated['knn/top1'] <= 1


@pytest.mark.slow
def test_evaluate_gives_the_last_value_of_the_monitor(straight, tmp_path):
  workdir, outcome = straight
  evaluated = result(tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={workdir}', f'--workdir={tmp_path / "eval"}',
      '--config.data.max_unreadable=0.2',
  ))
  assert evaluated['knn/top1'] == result(outcome)['knn/top1']


@pytest.mark.slow
def test_a_folder_that_changed_is_not_continued(labelled, tmp_path):
  copy, workdir = tmp_path / 'copy', tmp_path / 'run'
  shutil.copytree(labelled, copy)
  result(tiny.call('train', f'--workdir={workdir}', *flags(copy)))
  next(copy.glob('china/*.jpg')).unlink()
  code, _, err = tiny.call('train', f'--workdir={workdir}', *flags(copy))
  assert code == 2 and 'not what this run began with' in err
  assert 'images: 144 then, 143 now' in err


def test_a_folder_of_files_that_are_no_images_exits_with_2(tmp_path):
  folder = tmp_path / 'junk'
  folder.mkdir()
  for i in range(40):
    (folder / f'{i}.jpg').write_text('junk')
  code, out, err = tiny.call(
      'train', f'--workdir={tmp_path / "run"}', *flags(folder)
  )
  assert code == 2 and out == '' and 'Traceback' not in err
  assert '.jpg: not an image' in err


@pytest.mark.slow
def test_a_folder_that_vanished_exits_with_2(straight, labelled, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(labelled, copy)
  workdir = tmp_path / 'run'
  arguments = flags(copy, **{'schedule.steps': 5})
  result(tiny.call('train', f'--workdir={workdir}', *arguments))
  before = sorted(p.name for p in (workdir / 'checkpoints').iterdir())
  shutil.rmtree(copy)
  code, _, err = tiny.call('train', f'--workdir={workdir}', *arguments)
  assert code == 2 and 'there is no folder' in err
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == before


REAL = {
    'data.max_unreadable': 0.05, 'data.image_size': 32, 'batch_size': 128,
    'model.name': 'vit_ti', 'model.patch_size': 8, 'model.dim': 64,
    'model.depth': 4, 'model.num_heads': 4, 'head.hidden_dim': 256,
    'head.out_dim': 64, 'optimizer.lr_per_256': 3e-3, 'optimizer.b2': 0.95,
    'augment.view1.crop_min': 0.2, 'augment.view2.crop_min': 0.2,
    'augment.view1.blur_prob': 0.0, 'augment.view2.blur_prob': 0.0,
    'schedule.epochs': 50.0, 'schedule.warmup_epochs': 5.0,
    'knn.every_steps': 100,
}


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_pretraining_on_tiles_of_photographs_helps(tmp_path, seed):
  folder = tmp_path / 'tiles'
  photos.write_tiles(folder, tile=40, each=200, corrupt=0.02)
  values = REAL | {'seed': seed}
  final = result(tiny.call(
      'train', f'--config=configs/folder.py:{folder}',
      f'--workdir={tmp_path / "run"}',
      *(f'--config.{name}={value}' for name, value in values.items()),
  ))
  # 160 tiles of ten photographs; about 0.70 with the random network.
  assert final['knn/top1'] > final['knn/top1_init'] + 0.05
  assert bad_names(tmp_path / 'run')


def test_the_halves_of_the_photo_tiles_share_no_picture(tmp_path, monkeypatch):
  pictures = {
      name: lambda: np.zeros((64, 96), np.uint8) for name in 'dabce'
  }
  monkeypatch.setattr(photo_tiles, 'PICTURES', pictures)
  found = {}
  for half in '', 'first', 'second':
    photo_tiles.main(tmp_path / f'tiles{half}', half)
    found[half] = {p.name for p in (tmp_path / f'tiles{half}/train').iterdir()}
  assert found == {
      '': set('abcde'), 'first': set('ace'), 'second': set('bd')
  }
