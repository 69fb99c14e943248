"""The machine is input as well: disks, locks, homes, backends, Ctrl-C."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

from etils import epath
import jax
import pytest
import tiny

from mocov3_jax.base import errors, files
from mocov3_jax.config import command_line
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import processes
from mocov3_jax.runs import checkpoints, history, metrics, workdir

DISK_FULL = ValueError(
    'RESOURCE_EXHAUSTED: Error writing local file "/x/_sharding": Failed '
    'writing: "/x/_sharding" [OS error 28: ENOSPC No space left on device]'
)
NO_MEMORY = RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')


def said(capsys, error):
  """What a command says, and its exit code, when this error ends it."""
  def define(flags):
    def act():
      raise error
    return act

  code = command_line.run('Doc.', define, ['x'])
  return code, capsys.readouterr().err


@pytest.mark.parametrize('error, words', [
    (DISK_FULL, 'no space is left on the disk'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'no space is left'),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'no space is left'),
    (NO_MEMORY, 'less at a time'), (MemoryError('much'), 'less at a time'),
    (RuntimeError("Unable to initialize backend 'tpu': no libtpu"),
     'JAX_PLATFORMS'),
])
def test_each_failure_of_the_machine_has_its_own_message(capsys, error, words):
  code, err = said(capsys, error)
  assert code == 2 and words in err and err.count('\n') == 1
  assert ('on the disk' in err) != ('less at a time' in err) or (
      'JAX_PLATFORMS' in err
  )


def test_a_bug_is_raised(capsys):
  with pytest.raises(KeyError):
    said(capsys, KeyError('x'))


@pytest.mark.parametrize('platform', ['gpu', 'cuda', 'tpu', 'nonsense'])
def test_a_backend_that_is_not_there_is_named(platform):
  if platform in {d.platform for d in jax.devices()}:
    pytest.skip('it is there')
  code = (
      'import sys; from mocov3_jax.config import command_line as c\n'
      'import jax\n'
      'sys.exit(c.run("", lambda flags: lambda: jax.device_count(), ["x"]))'
  )
  found = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True,
      cwd=tiny.ROOT, env=os.environ | {'JAX_PLATFORMS': platform},
  )
  assert found.returncode == 2 and 'Traceback' not in found.stderr
  assert f'error: JAX_PLATFORMS={platform}: ' in found.stderr


@pytest.mark.parametrize('error', [DISK_FULL, NO_MEMORY, OSError(
    errno.EMFILE, 'Too many open files'
)])
def test_a_checkpoint_is_not_blamed_for_the_machine(
    tmp_path, monkeypatch, error
):
  made = checkpoints.Checkpoints(epath.Path(tmp_path), 1, 0, print)
  made.save(1, {'x': jax.numpy.ones(3)}, {})
  made.wait()

  def failing(*_):
    raise error

  monkeypatch.setattr(made, '_restore_step', failing)
  with pytest.raises(type(error)):
    made.restore({'x': jax.ShapeDtypeStruct((3,), 'float32')})
  assert (tmp_path / 'checkpoints' / '1').is_dir()
  made.close()


@pytest.mark.parametrize('number', [
    errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK
])
def test_a_file_system_without_locks_is_used_with_a_word(
    tmp_path, monkeypatch, capsys, number
):
  def flock(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', flock)
  with workdir.claimed(
      str(tmp_path / 'run'), tiny.config(), config_lib.schema()
  ):
    pass
  assert 'has no locks' in capsys.readouterr().err
  assert history.status(epath.Path(tmp_path / 'run')) == 'stopped'


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with pytest.raises(errors.UserError, match='Input/output error'):
    with workdir.claimed(
        str(tmp_path / 'run'), tiny.config(), config_lib.schema()
    ):
      pass


def test_a_user_without_a_home_compiles_anew(monkeypatch):
  monkeypatch.setattr(files, 'user_cache', lambda name: None)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    processes.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


@pytest.mark.parametrize('end', [
    b'\xff\xfe\x80', b'\x00' * 40, b'{"step": 3, "x', b'7\n', b'[1]\n', b'{}\n',
    b'\n\n', b'null',
])
def test_whatever_a_crash_leaves_at_the_end_of_the_metrics(tmp_path, end):
  rows = [{'step': n, 'train/loss': 1.0} for n in range(3)]
  text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  (tmp_path / 'metrics.jsonl').write_bytes(text + end)
  writer = metrics.MetricWriter(epath.Path(tmp_path), 3)
  writer.write(3, {'train/loss': 0.5})
  writer.close()
  found = metrics.read_metrics(epath.Path(tmp_path / 'metrics.jsonl'))
  assert found == [*rows, {'step': 3, 'train/loss': 0.5}]


def test_an_empty_result_is_written_anew_and_named_by_readers(tmp_path):
  path = epath.Path(tmp_path)
  (tmp_path / 'result.json').write_text('')
  with pytest.raises(errors.UserError, match='result.json is damaged'):
    files.read_object(path / 'result.json')
  workdir.write_result({'step': 3}, path)
  assert files.read_object(path / 'result.json') == {'step': 3}
  workdir.write_result({'step': 4}, path)
  assert files.read_object(path / 'result.json') == {'step': 3}


def test_ctrl_c_ends_a_wait_that_python_does_not_see():
  # Blocked in C, with the lock of the interpreter given up.
  code = (
      'import ctypes, sys; from mocov3_jax.base import exits\n'
      'with exits.leave_at_ctrl_c():\n'
      '  print("waiting", flush=True)\n'
      '  ctypes.CDLL(None).sleep(60)\n'
  )
  process = subprocess.Popen(
      [sys.executable, '-c', code], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, cwd=tiny.ROOT,
  )
  assert process.stdout.readline() == 'waiting\n'
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 130 and err == 'interrupted\n', err


def test_after_such_a_wait_ctrl_c_is_what_it_was():
  from mocov3_jax.base import exits
  before = signal.getsignal(signal.SIGINT)
  with exits.leave_at_ctrl_c():
    assert signal.getsignal(signal.SIGINT) is not before
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize('vendor, platforms, told', [
    ('0x8086', '', True), ('0x1ae0', '', False), ('0x8086', 'tpu,cpu', False),
])
def test_libtpu_is_left_alone_where_there_may_be_a_tpu(
    monkeypatch, tmp_path, vendor, platforms, told
):
  (tmp_path / '0000:00:04.0').mkdir()
  (tmp_path / '0000:00:04.0' / 'vendor').write_text(f'{vendor}\n')
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(os, 'environ', {
      k: v for k, v in os.environ.items() if not k.startswith('TPU_')
  })
  command_line.quieten_libtpu(str(tmp_path))
  assert ('TPU_WORKER_HOSTNAMES' in os.environ) == told


def test_decoders_are_hidden_and_the_last_words_of_a_crash_are_not():
  code = (
      'import os, sys\n'
      'from mocov3_jax.base import console\n'
      'console.hide_decoders()\n'
      'console.say("before")\n'
      'os.write(2, b"Corrupt JPEG data: 3 extraneous bytes before marker\\n")\n'
      'os.write(2, b"ZIPDecode: Decoding error at scanline 0.\\n")\n'
      'os.write(2, b"F0000 what the library says\\n")\n'
      'os.abort()\n'
  )
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=tiny.ROOT, capture_output=True,
      text=True,
  )
  assert done.returncode == -signal.SIGABRT
  assert sorted(done.stderr.splitlines()) == [
      'F0000 what the library says', 'before'
  ]
