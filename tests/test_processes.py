"""Training by several processes, for real, on forced CPU devices."""

import json
import os
import pathlib
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import tiny

CALM = {
    'model.dim': 32, 'head.hidden_dim': 128, 'head.out_dim': 32,
    'optimizer.lr_per_256': 1e-3, 'schedule.steps': 10,
    'schedule.warmup_epochs': 0.1, 'knn.every_steps': 5,
    'save.every_steps': 5,
}


def start(
    workdir, processes, devices=8, others=(), first_alone=False, **overrides
):
  """Starts all processes of a run, with `others` in all but the first."""
  flags = tiny.flags(**(CALM | overrides))
  return start_command(
      ['train', f'--workdir={workdir}', *flags], processes, devices, others,
      first_alone,
  )


def start_command(
    command, processes, devices=8, others=(), first_alone=False
):
  """Starts a command in all processes."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  force = f'--xla_force_host_platform_device_count={devices // processes}'
  # Each process compiles for itself, which takes longer than to compute.
  quick = os.getenv('XLA_FLAGS', '').replace('_level=1', '_level=0')
  several = [] if processes == 1 else [
      f'--coordinator={address}', f'--num_processes={processes}'
  ]
  return [
      tiny.start(
          *command, *several, *[f'--process_id={i}'] * (processes > 1),
          *others[:i],
          env_add={'XLA_FLAGS': f'{quick} {force}'},
      )
      for i in range(1 if first_alone else processes)
  ]


def finish(processes):
  return [tiny.finish(p) for p in processes]


def rows(workdir):
  return {
      r['step']: r for r in tiny.metrics(workdir) if 'train/loss' in r
  }


def losses(workdir):
  found = rows(workdir)
  return [found[step]['train/loss'] for step in sorted(found)]


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """A run of one process and eight devices."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  (result,) = finish(start(workdir, 1))
  assert result[0] == 0, result[2]
  return workdir


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """The same run of two processes of four devices each."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  return workdir, finish(start(workdir, 2))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(one, two):
  workdir, results = two
  for code, _, err in results:
    assert code == 0, err
  np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)


@pytest.mark.slow
def test_the_first_process_alone_speaks_and_writes(two):
  workdir, results = two
  (_, out, err), (_, other_out, other_err) = results
  assert json.loads(out.splitlines()[-1])['step'] == 10
  assert 'kNN' in err and '{' not in other_out  # Gloo says something.
  assert 'step' not in other_err
  steps = [r['step'] for r in tiny.metrics(workdir) if 'train/loss' in r]
  assert steps == list(range(10))


@pytest.mark.parametrize(
    'processes, devices',
    [(1, 1), (4, 8)],
)
@pytest.mark.slow
def test_a_checkpoint_of_two_processes_continues_on_others(
    one, two, tmp_path, processes, devices
):
  # The first half, as two processes of four devices saved it.
  workdir = tmp_path / 'run'
  copy_of(two[0], workdir, step=5)
  for code, _, err in finish(start(workdir, processes, devices)):
    assert code == 0, err
  np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)


@pytest.mark.slow
def test_passes_and_a_split_state_have_the_losses_of_neither(one, tmp_path):
  (result,) = finish(
      start(tmp_path / 'run', 1, micro_batch=4, fsdp_devices=2)
  )
  assert result[0] == 0, result[2]
  np.testing.assert_allclose(losses(tmp_path / 'run'), losses(one), rtol=1e-5)


def copy_of(source, target, step):
  """A copy of a workdir that has only got to `step`."""
  shutil.copytree(source, target)
  for folder in (target / 'checkpoints').iterdir():
    if folder.name.isdigit() and int(folder.name) > step:
      shutil.rmtree(folder)


def wait_for(workdir, step, seconds=120):
  """Waits until a run has logged a step."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    file = pathlib.Path(workdir) / 'metrics.jsonl'
    if file.exists() and f'"step": {step}' in file.read_text():
      return
    time.sleep(0.1)
  raise TimeoutError(f'no step {step} in {workdir}')


LONG = {'schedule.steps': 3000, 'save.every_steps': 1000,
        'knn.every_steps': 1000}


@pytest.mark.slow
def test_sigterm_to_one_saves_the_same_step_in_all(tmp_path):
  processes = start(tmp_path / 'run', 2, **LONG)
  wait_for(tmp_path / 'run', 3)
  processes[1].send_signal(signal.SIGTERM)
  results = finish(processes)
  assert [code for code, _, _ in results] == [143, 143], results
  said = {err.splitlines()[-1] for _, _, err in results}
  assert len(said) == 1 and 'stopped: saved step' in said.pop()


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_message(tmp_path):
  processes = start(tmp_path / 'run', 2, **LONG)
  wait_for(tmp_path / 'run', 3)
  os.kill(processes[1].pid, signal.SIGKILL)
  before = time.monotonic()
  code, _, err = tiny.finish(processes[0], timeout=150)
  assert time.monotonic() - before < 120
  assert code not in (0, 2, 143), err
  assert 'lost another process' in err or 'heartbeat' in err, err
  tiny.finish(processes[1])


@pytest.mark.slow
def test_bad_input_ends_all_processes_alike(tmp_path):
  (tmp_path / 'file').write_text('mine')
  results = finish(start(tmp_path / 'file' / 'run', 2))
  assert [code for code, _, _ in results] == [2, 2], results
  assert 'cannot be written' in results[0][2]
  assert 'Traceback' not in results[0][2] + results[1][2]


@pytest.mark.slow
def test_processes_of_different_configs_are_refused(tmp_path):
  processes = start(tmp_path / 'run', 2, others=['--config.seed=1'])
  for code, out, err in finish(processes):
    assert code == 2 and '{' not in out and 'Traceback' not in err, err
    assert 'differ in seed. Use the same command' in err
  assert not (tmp_path / 'run').exists()


def test_ctrl_c_ends_a_process_that_waits_for_others(tmp_path):
  first = start(tmp_path / 'run', 2, first_alone=True)[0]
  assert 'waiting for the other processes' in first.stderr.readline()
  first.send_signal(signal.SIGINT)
  code, _, err = tiny.finish(first, timeout=30)
  assert code == 130 and 'interrupted' in err
  assert not (tmp_path / 'run').exists()


def test_half_of_the_flags_is_refused(tmp_path):
  code, _, err = tiny.run(
      'train', f'--workdir={tmp_path / "run"}', *tiny.flags(),
      '--num_processes=2',
  )
  assert code == 2 and '--process_id=None' in err


# What each protocol needs beside the checkpoint, to be short.
PROTOCOLS = {
    'knn': {}, 'logistic': {'logistic.inverse_penalties': (0.1, 1.0)},
    'linear': {'schedule.steps': 6, 'linear.lr_per_256': (0.1, 1.0)},
    'finetune': {'schedule.steps': 6, 'schedule.warmup_epochs': 0.2},
}


def evaluation(protocol, run, out, **overrides):
  """The command that evaluates a run."""
  overrides = {
      'checkpoint': run, 'batch_size': 64, 'log.every_steps': 1,
  } | PROTOCOLS[protocol] | overrides
  return [
      'evaluate', f'--config=configs/eval_{protocol}.py', f'--workdir={out}',
      *(f'--config.{name}={value}' for name, value in overrides.items()),
  ]


@pytest.mark.slow
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_two_processes_evaluate_as_one_does(one, tmp_path, protocol):
  found = []
  for processes in 1, 2:
    # Of its own, since each evaluation adds a line to it.
    run = tmp_path / f'run{processes}'
    shutil.copytree(one, run)
    out = tmp_path / f'{protocol}{processes}'
    results = finish(start_command(evaluation(protocol, run, out), processes))
    for code, _, err in results:
      assert code == 0, err
    for _, out_text, _ in results[1:]:
      assert '{' not in out_text  # The first alone speaks.
    result = json.loads((out / 'result.json').read_text())
    assert json.loads(results[0][1].splitlines()[-1]) == result
    (line,) = (run / 'results.jsonl').read_text().splitlines()
    assert json.loads(line)[f'{protocol}/top1'] == result[f'{protocol}/top1']
    found.append((result, out))
  (alone, alone_out), (together, together_out) = found
  own = [name for name in alone if name.startswith(f'{protocol}/')]
  assert len(own) > 1
  if protocol in ('knn', 'logistic'):
    for name in own:
      assert together[name] == alone[name], name
    return
  np.testing.assert_allclose(losses(together_out), losses(alone_out), rtol=1e-5)
  assert together[f'{protocol}/top1'] == pytest.approx(
      alone[f'{protocol}/top1'], abs=1e-5
  )
  # The network that it leaves is one that one process can use.
  code, out_text, err = tiny.run(
      *evaluation('knn', together_out, tmp_path / 'again')
  )
  assert code == 0, err


@pytest.mark.slow
def test_sigterm_to_one_ends_an_evaluation_in_all(one, tmp_path):
  # Batches so small that there are many, of which any may be the last.
  command = evaluation('knn', one, tmp_path / 'knn', batch_size=8)
  processes = start_command(command, 2)
  end = time.monotonic() + 120
  while not (tmp_path / 'knn' / 'config.json').exists():
    assert time.monotonic() < end
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  results = finish(processes)
  assert [code for code, _, _ in results] == [143, 143], results
  for _, _, err in results:
    assert 'stopped during an evaluation' in err and 'Traceback' not in err
  for code, _, err in finish(start_command(command, 2)):
    assert code == 0, err


@pytest.mark.slow
def test_sigterm_during_the_monitor_saves_and_is_measured_again(one, tmp_path):
  workdir = tmp_path / 'run'
  copy_of(one, workdir, step=5)
  # What was measured at step 5 is lost, so that the run begins with it.
  rows = [
      row for row in tiny.metrics(workdir)
      if row['step'] < 5 or 'train/loss' in row
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (workdir / 'metrics.jsonl').write_text(text)
  (process,) = start(workdir, 1)
  line = ''
  while 'evaluating now' not in line:
    line = process.stderr.readline()
    assert line, 'the run has ended'
  process.send_signal(signal.SIGTERM)
  code, _, err = tiny.finish(process)
  assert code == 143 and 'stopped: saved step 5' in err, err
  for code, _, err in finish(start(workdir, 1)):
    assert code == 0, err
  assert tiny.metrics(workdir) == tiny.metrics(one)
