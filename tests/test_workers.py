"""Images read by several processes are those that one process reads."""

import os
import signal
import time

import numpy as np
import photos
import pytest
import test_shards
import tiny
import toy_tfds

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline, workers
from mocov3_jax.sources import catalog
from mocov3_jax.training import pretrain


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Photographs, some of which are cut off."""
  root = tmp_path_factory.mktemp('photos')
  photos.write_tiles(root, tile=48, each=6, corrupt=0.1)
  return root


@pytest.fixture(scope='module')
def apart():
  """Two processes."""
  return workers.Workers(2, processes=2)


def config(folder, **overrides):
  return tiny.config(**{
      'data.source': f'folder:{folder}', 'data.image_size': 32,
      'data.mean': (0.5,) * 3, 'data.std': (0.2,) * 3, 'batch_size': 12,
  } | overrides)


def reader(c, pool):
  made = pretrain.make_reader(c, pretrain.load_splits(c).train, np.arange(12))
  return pipeline.dataclasses.replace(made, workers=pool, labelled=True)


def test_batches_are_the_same(folder, apart):
  c = config(folder)
  here = reader(c, workers.Workers(2))
  there = reader(c, apart)
  # All are held, so that memory used twice would show.
  held = [there(step) for step in range(8)]
  assert sum((batch.unreadable >= 0).sum() for batch in held) > 2
  for step, batch in enumerate(held):
    for name, found, wanted in zip(
        batch._fields, batch, here(step), strict=True
    ):
      np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_memory_is_used_again_once_nobody_has_the_images(folder, apart):
  there = reader(config(folder), apart)
  sizes = []
  for step in range(6):
    view = there(step).images[3:5]  # A part keeps the whole.
    before = view.copy()
    there(step + 1)
    np.testing.assert_array_equal(view, before)
    del view
    sizes.append(len(apart._apart._free))
  assert len(set(sizes)) == 1


def test_images_to_evaluate_on_are_the_same(folder, apart):
  source = pretrain.load_splits(config(folder)).train
  found = [
      list(pipeline.eval_batches(source, np.arange(16), 16, 24, pool))
      for pool in (workers.Workers(2), apart)
  ]
  assert len(found[0]) > 2
  for here, there in zip(*found, strict=True):
    np.testing.assert_array_equal(there.images, here.images)
    np.testing.assert_array_equal(there.unreadable, here.unreadable)


@pytest.mark.parametrize('kind', ['wds', 'hf', 'tfds'])
def test_other_sources_are_read_by_other_processes(
    tmp_path, apart, monkeypatch, kind
):
  if kind == 'wds':
    test_shards.write_set(tmp_path / 'set')
    spec = f'wds:{tmp_path}/set/*.tar'
  elif kind == 'hf':
    test_shards.table(20).save_to_disk(tmp_path / 'set')
    spec = f'hf:{tmp_path}/set'
  else:
    toy_tfds.prepare(tmp_path, toy_tfds.ToyPhotos)
    monkeypatch.setattr(
        'tensorflow_datasets.core.constants.DATA_DIR', str(tmp_path)
    )
    spec = 'tfds:toy_photos'
  source = catalog.load(spec).train
  found = [
      list(pipeline.eval_batches(source, np.arange(16), 16, 24, pool))
      for pool in (workers.Workers(1), apart)
  ]
  for here, there in zip(*found, strict=True):
    assert (there.unreadable == -1).all()
    np.testing.assert_array_equal(there.images, here.images)


def test_too_many_unreadable_images_end_it_with_the_same_message(
    tmp_path, apart
):
  for n in range(30):
    (tmp_path / f'{n}.jpg').write_bytes(b'no image')
  messages = []
  for pool in workers.Workers(1), apart:
    with pytest.raises(UserError) as error:
      reader(config(tmp_path), pool)(0)
    messages.append(str(error.value))
  assert all('images in a row could not be read' in m for m in messages)


def test_a_process_that_is_killed_is_named(folder):
  pool = workers.Workers(2, processes=2)
  there = reader(config(folder), pool)
  there(0)
  for number in pool._apart._pool._processes:
    os.kill(number, signal.SIGKILL)
  with pytest.raises(UserError, match='has ended by itself.*data.processes'):
    for step in range(100):
      there(step)


def test_processes_leave_a_stop_to_the_one_that_asked_for_them(folder):
  # A batch system sends SIGTERM to all that a job has started.
  pool = workers.Workers(2, processes=2)
  there = reader(config(folder), pool)
  before = there(0)
  for number in [*pool._apart._pool._processes, *(
      n for n in children(os.getpid()) if b'forkserver' in command_of(n)
  )]:
    os.kill(number, signal.SIGTERM)
    os.kill(number, signal.SIGINT)
  time.sleep(0.5)
  for step in range(3):
    there(step)
  np.testing.assert_array_equal(there(0).images, before.images)


def command_of(number):
  with open(f'/proc/{number}/cmdline', 'rb') as file:
    return file.read()


def test_how_many_processes_there_are(folder, monkeypatch):
  source = pretrain.load_splits(config(folder)).train
  for cores, expected in (1, 1), (8, 1), (15, 1), (16, 2), (96, 12), (224, 16):
    monkeypatch.setattr(workers, 'cores', lambda cores=cores: cores)
    assert workers.processes_for(0, source) == expected
  assert workers.processes_for(3, source) == 3
  # Of one size, they are cropped on the device.
  assert workers.processes_for(3, catalog.load('digits').train) == 1
  assert config_lib.default_config().data.processes == 0


def alive(number):
  """Whether a process is there and no zombie."""
  try:
    with open(f'/proc/{number}/stat', encoding='utf-8') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def children(number):
  """The processes that a process has started, and those that they have."""
  found = []
  for task in os.listdir(f'/proc/{number}/task'):
    path = f'/proc/{number}/task/{task}/children'
    with open(path, encoding='utf-8') as file:
      for child in map(int, file.read().split()):
        found += [child, *children(child)]
  return found


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_training_reads_by_processes_which_end_with_it(
    folder, tmp_path, number
):
  flags = tiny.flags(**{
      'data.source': f'folder:{folder}', 'data.image_size': 32,
      'data.mean': '(.5,.5,.5)', 'data.std': '(.2,.2,.2)', 'batch_size': 16,
      'schedule.epochs': 400.0, 'data.max_unreadable': 1.0,
      'save.every_steps': 400,
  })
  process = tiny.start(
      'train', f'--workdir={tmp_path / "run"}', *flags,
      '--config.data.processes=2',
  )
  while 'step 10/' not in (line := process.stderr.readline()):
    assert line, 'the run has ended'
  started = children(process.pid)
  assert len(started) >= 2
  process.send_signal(number)
  code, _, err = tiny.finish(process)
  assert code == (143 if number == signal.SIGTERM else -9)
  assert 'Traceback' not in err and 'leaked' not in err
  end = time.monotonic() + 30
  while any(map(alive, started)):
    assert time.monotonic() < end, [n for n in started if alive(n)]
    time.sleep(0.1)
