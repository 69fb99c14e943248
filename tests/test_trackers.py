"""What a tracker is told of a run, also of one that is killed."""

import importlib.util
import json
import os
import signal
import struct
import time

from etils import epath
import pytest
import tiny

from mocov3_jax import trackers
from mocov3_jax.base.errors import UserError
from mocov3_jax.training import step_log

SHORT = {'save.every_steps': 11, 'log.tracker': 'wandb'}


class Service:
  """Records of all runs, by id, as a tracker's service would keep them."""

  def __init__(self):
    self.records, self.names, self.results, self.down = {}, {}, {}, False

  def begin(self, name, run_id, config):
    self.names[run_id] = name
    self.records.setdefault(run_id, [])
    return Connection(self, run_id)


class Connection:

  def __init__(self, service, run_id):
    self._service, self._id = service, run_id

  def log(self, step, values):
    if self._service.down:
      raise ConnectionError('no route')
    self._service.records[self._id].append((step, values))

  def close(self, results):
    if results is not None:
      self._service.results[self._id] = results


@pytest.fixture
def service(monkeypatch):
  found = Service()
  monkeypatch.setitem(
      trackers.TRACKERS, 'fake', trackers.Kind('json', 'fake', found.begin)
  )
  return found


def record(folder, rows=(), name='fake', said=None):
  found = trackers.Record(
      name, epath.Path(folder), {'seed': 0},
      (said if said is not None else []).append,
  )
  found.catch_up(rows)
  return found


def test_the_rows_of_a_step_are_told_together(service, tmp_path):
  found = record(tmp_path)
  found.write(0, {'knn/top1': 0.1})
  found.write(0, {'train/loss': 5.0})
  found.write(1, {'train/loss': 4.0})
  found.flush()
  [told] = service.records.values()
  assert told == [(0, {'knn/top1': 0.1, 'train/loss': 5.0})]
  found.write(2, {'knn/top1': 0.2})
  found.finish({'knn/top1': 0.2})
  assert [step for step, _ in told] == [0, 1, 2]
  [results] = service.results.values()
  assert results == {'knn/top1': 0.2}


def test_a_killed_run_goes_on_with_its_record_and_repeats_nothing(
    service, tmp_path
):
  first = record(tmp_path)
  for step in range(6):
    first.write(step, {'train/loss': float(step)})
  first.flush()  # Tells steps 0 to 4.
  first.write(6, {'train/loss': 6.0})
  # Killed. Saved at step 3, whose evaluation is in metrics.jsonl.
  rows = [{'step': s, 'train/loss': float(s)} for s in range(3)]
  second = record(tmp_path, [*rows, {'step': 3, 'knn/top1': 0.5}])
  for step in range(3, 9):
    second.write(step, {'train/loss': float(step)})
  second.finish({})
  [told] = service.records.values()
  assert told == [(s, {'train/loss': float(s)}) for s in range(9)]
  # A run that is done is not begun again.
  service.records.clear()
  record(tmp_path).finish({})
  assert not service.records


def test_what_was_logged_before_a_tracker_was_asked_for_is_told(
    service, tmp_path
):
  rows = [{'step': s, 'train/loss': float(s)} for s in range(3)]
  record(tmp_path, rows).close()
  [told] = service.records.values()
  assert [step for step, _ in told] == [0, 1]


def test_a_lost_service_does_not_end_the_run(service, tmp_path):
  said = []
  found = record(tmp_path, said=said)
  service.down = True
  for step in range(5):
    found.write(step, {'train/loss': 1.0})
  found.flush()
  found.write(5, {'train/loss': 1.0})
  found.finish({})
  assert len(said) == 1 and 'no route' in said[0] and 'goes on' in said[0]
  # The next start tells all of it.
  service.down = False
  rows = [{'step': s, 'train/loss': 1.0} for s in range(6)]
  record(tmp_path, rows).finish({'loss': 1.0})
  [told] = service.records.values()
  assert [step for step, _ in told] == [0, 1, 2, 3, 4, 5]
  [results] = service.results.values()
  assert results == {'loss': 1.0}


def test_the_end_of_a_diverged_run_is_told(service, tmp_path):
  found = record(tmp_path)
  found.write(0, {'train/loss': 1.0})
  found.write(1, {'train/diverged': 1.0})
  found.end()
  found.close()
  [told] = service.records.values()
  assert told[-1] == (1, {'train/diverged': 1.0})


@pytest.mark.parametrize('how', ['bad mode', 'open run'])
def test_what_wandb_cannot_do_is_one_message(tmp_path, monkeypatch, how):
  wandb = pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_DIR', str(tmp_path))
  monkeypatch.setenv('WANDB_MODE', 'offline' if how == 'open run' else 'bogus')
  if how == 'open run':
    theirs = wandb.init(
        mode='offline', settings=wandb.Settings(console='off', silent=True)
    )
  code, out, err = tiny.call(
      'train', f'--workdir={tmp_path / "run"}', *tiny.flags(**SHORT)
  )
  if how == 'open run':
    theirs.log({'x': 1})  # It is still theirs, and open.
    theirs.finish()
  assert code == 2 and not out and 'Traceback' not in err, err
  words = 'has the run' if how == 'open run' else 'cannot begin a run'
  assert words in err, err


def test_without_a_tracker_nothing_is_written(tmp_path):
  found = record(tmp_path, [{'step': 0, 'train/loss': 1.0}], name='')
  found.write(1, {'train/loss': 1.0})
  found.finish({})
  found.close()
  assert not list(tmp_path.iterdir())


def test_only_the_first_process_tells(service, tmp_path, monkeypatch):
  monkeypatch.setattr(step_log, 'is_primary', lambda: False)
  # What it returns where another process is the first one.
  monkeypatch.setattr(step_log.processes, 'from_primary', lambda make: {})
  config = tiny.config(**{'log.tracker': 'fake'})
  log = step_log.StepLog(
      epath.Path(tmp_path), config,
      step_log.Plan(10, 10, 0, 0.1), (), 0,
  )
  log.evaluation(0, {'knn/top1': 1.0})
  log.close()
  assert not service.records


@pytest.mark.parametrize('note', [
    '{"tracker": "fake", "id": "../../x", "told": 1, "done": false}',
    '{"tracker": "fake", "id": "abcd", "told": "1", "done": false}',
    '{"tracker": "fake"}', '[]',
])
def test_a_damaged_note_is_refused(service, tmp_path, note):
  (tmp_path / 'tracker.json').write_text(note)
  with pytest.raises(UserError, match='tracker.json'):
    record(tmp_path)


def test_a_tracker_that_is_not_known_or_not_installed(tmp_path, monkeypatch):
  code, out, err = tiny.call(
      'train', f'--workdir={tmp_path / "run"}',
      *tiny.flags(**{'log.tracker': 'wandbb'}),
  )
  assert code == 2 and not out
  assert "log.tracker='wandbb' is not known. Did you mean 'wandb'?" in err
  found = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util, 'find_spec',
      lambda name: None if name == 'wandb' else found(name),
  )
  code, out, err = tiny.call(
      'train', f'--workdir={tmp_path / "run"}', *tiny.flags(**SHORT)
  )
  assert code == 2 and not out
  assert "pip install 'mocov3-jax[wandb]'" in err
  assert not (tmp_path / 'run').exists()


def offline_records(folder):
  """The records of all offline parts of wandb's runs, by part.

  A part is a log as LevelDB has it: blocks of 32 KiB of fragments, each with
  checksum, length and kind.
  """
  from wandb.proto import wandb_internal_pb2

  parts = []
  for path in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
    data, at, held, found = path.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
      left = 2**15 - at % 2**15
      if left < 7:
        at += left
        continue
      _, length, kind = struct.unpack('<IHB', data[at : at + 7])
      if not kind:
        break
      held += data[at + 7 : at + 7 + length]
      at += 7 + length
      if kind in (1, 4):  # Whole, or the last fragment.
        found.append(wandb_internal_pb2.Record.FromString(held))
        held = b''
    parts.append(found)
  return parts


def steps_of(part):
  found = {}
  for record in part:
    if record.WhichOneof('record_type') == 'history':
      values = {
          '/'.join(x.nested_key) or x.key: json.loads(x.value_json)
          for x in record.history.item
      }
      assert record.history.step.num not in found
      found[record.history.step.num] = values
  return found


def runs_of(part):
  return [r.run for r in part if r.WhichOneof('record_type') == 'run']


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_wandb_has_a_run_that_was_ended_and_continued_once(
    tmp_path, monkeypatch, how
):
  pytest.importorskip('wandb')
  # Of this process, if it has used wandb: the others are to have their own.
  monkeypatch.delenv('WANDB_SERVICE', raising=False)
  workdir = tmp_path / 'run'
  arguments = [
      f'--workdir={workdir}', *tiny.flags(**SHORT | {
          'schedule.epochs': 100.0, 'schedule.warmup_epochs': 1.0,
          'schedule.steps': 200, 'knn.every_steps': 0,
      }),
  ]
  env = {
      'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path),
      'WANDB_PROJECT': 'a-project', **tiny.here(),
  }
  process = tiny.start('train', *arguments, env_add=env)
  deadline = time.monotonic() + 240
  while not (workdir / 'checkpoints' / '22').exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  os.kill(process.pid, how)
  _, err = process.communicate(timeout=120)
  assert process.returncode in (-9, 143), err
  code, out, err = tiny.finish(tiny.start('train', *arguments, env_add=env))
  assert code == 0, err
  parts = offline_records(tmp_path)
  assert len(parts) == 2
  ids = {run.run_id for part in parts for run in runs_of(part)}
  assert ids == {json.loads((workdir / 'tracker.json').read_text())['id']}
  [run, *_] = runs_of(parts[-1])
  config = {x.key: json.loads(x.value_json) for x in run.config.update}
  assert run.project == 'a-project' and config['model']['dim'] == 16
  first, second = map(steps_of, parts)
  assert not first.keys() & second.keys()
  logged = {}
  for row in tiny.metrics(workdir):
    logged.setdefault(row['step'], {}).update(row)
  told = first | second
  if how == signal.SIGTERM:  # A kill may lose what was told at that moment.
    assert told.keys() == logged.keys()
  assert second and max(second) == max(logged)
  for step, values in told.items():
    for name, value in logged[step].items():
      if name != 'step':
        assert values[name] == pytest.approx(value, rel=1e-12), (step, name)
  summary = {
      item.key: json.loads(item.value_json) for record in parts[-1]
      if record.WhichOneof('record_type') == 'summary'
      for item in record.summary.update if item.key
  }
  assert summary['knn/top1'] == json.loads(out.splitlines()[-1])['knn/top1']
