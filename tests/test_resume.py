"""Continuing a run, exactly, after any kind of end."""

import json
import os
import shutil
import signal
import time

from etils import epath
import jax
import numpy as np
import pytest
import tiny

from mocov3_jax.runs import checkpoints as checkpoints_lib
from mocov3_jax.weights import our_checkpoints

STEPS = 36


# The queue is a part of the state, too.
CHANGES = {'schedule.steps': STEPS, 'objective.queue': 100}


def arguments(workdir, **overrides):
  return [
      *tiny.flags(**(CHANGES | overrides)),
      f'--workdir={workdir}',
  ]


def final_state(workdir):
  """All arrays of the checkpoint after the last step, by name."""
  return dict(our_checkpoints.leaves(checkpoints_lib.restore_whole(
      epath.Path(workdir) / 'checkpoints' / str(STEPS)
  )))


def assert_same_run(workdir, straight):
  assert tiny.metrics(workdir) == tiny.metrics(straight)
  jax.tree.map(
      np.testing.assert_array_equal, final_state(workdir), final_state(straight)
  )


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The workdir of a run without interruption, and its result."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  code, out, err = tiny.call('train', *arguments(workdir))
  assert code == 0, err
  return workdir, json.loads(out.splitlines()[-1])


def kill_at(rows, workdir, sign, **overrides):
  """Starts the run and signals it once so many metrics are written."""
  process = tiny.start(
      'train', *arguments(workdir, **overrides), env_add=tiny.here()
  )
  file = workdir / 'metrics.jsonl'
  while process.poll() is None:
    if file.exists() and file.read_text().count('\n') >= rows:
      process.send_signal(sign)
      break
    time.sleep(0.002)
  return tiny.finish(process)


def test_the_last_line_tells_the_results(straight):
  workdir, result = straight
  assert result['step'] == STEPS
  assert 0 < result['knn/top1'] <= 1 and 0 < result['knn/top1_init'] <= 1
  assert result['train/images_per_second'] > 0
  rows = tiny.metrics(workdir)
  assert sum('train/loss' in row for row in rows) == STEPS
  evaluated = [row['step'] for row in rows if 'knn/top1' in row]
  assert evaluated == [*range(0, STEPS, 10), STEPS]
  assert rows[-1]['knn/top1'] == result['knn/top1']


def test_the_same_line_again_changes_nothing(straight):
  workdir, result = straight
  kept = 'metrics.jsonl', 'result.json', 'environment.json'
  before = {name: (workdir / name).read_text() for name in kept}
  assert json.loads(before['result.json']) == result
  code, out, err = tiny.call('train', *arguments(workdir))
  assert code == 0, err
  again = json.loads(out.splitlines()[-1])
  assert again['knn/top1'] == result['knn/top1']
  assert again['knn/top1_init'] == result['knn/top1_init']
  assert before == {name: (workdir / name).read_text() for name in kept}


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 22])
def test_resume_after_kill_equals_uninterrupted(tmp_path, straight, rows):
  workdir = tmp_path / 'run'
  code, _, _ = kill_at(rows, workdir, signal.SIGKILL)
  assert code == -signal.SIGKILL
  code, _, err = tiny.call('train', *arguments(workdir))
  assert code == 0, err
  assert_same_run(workdir, straight[0])


def test_resume_after_sigterm_equals_uninterrupted(tmp_path, straight):
  workdir = tmp_path / 'run'
  code, out, err = kill_at(15, workdir, signal.SIGTERM)
  assert code == 143 and out == '', err
  saved = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert f'saved step {saved}' in err
  done = [r['step'] for r in tiny.metrics(workdir) if 'train/loss' in r]
  assert done[-1] == saved - 1  # The step was finished, and no more.
  code, _, err = tiny.call('train', *arguments(workdir))
  assert code == 0 and f'continuing at step {saved}' in err
  assert_same_run(workdir, straight[0])


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_ends_at_once(tmp_path, straight):
  workdir = tmp_path / 'run'
  code, out, err = kill_at(15, workdir, signal.SIGINT)
  assert code == 143 and out == '' and 'saved step' in err, err
  process = tiny.start(
      'train', *arguments(tmp_path / 'other'), env_add=tiny.here()
  )
  # While it compiles, the step that it would stop after is far away.
  while not (tmp_path / 'other' / 'checkpoints').exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  time.sleep(0.3)
  process.send_signal(signal.SIGINT)
  code, _, err = tiny.finish(process)
  assert code == 130 and 'Traceback' not in err, err
  code, _, err = tiny.call('train', *arguments(workdir))
  assert code == 0, err
  assert_same_run(workdir, straight[0])


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, straight):
  workdir = tmp_path / 'run'
  kill_at(28, workdir, signal.SIGTERM)
  steps = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  newest = workdir / 'checkpoints' / str(steps[-1])
  for file in (newest / checkpoints_lib.ITEM).rglob('d/*'):
    file.write_bytes(file.read_bytes()[:10])
  code, _, err = tiny.call('train', *arguments(workdir))
  assert code == 0 and f'{steps[-1]} is damaged' in err
  assert f'continuing at step {steps[-2]}' in err
  assert_same_run(workdir, straight[0])


@pytest.mark.parametrize(
    'field, value',
    [('model.dim', 32), ('optimizer.name', 'lars'), ('seed', 3),
     ('data.mean', (0.3,)), ('knn.k', 5)],
)
def test_another_run_in_the_workdir_is_refused(straight, field, value):
  workdir, _ = straight
  before = sorted(p.name for p in workdir.rglob('*'))
  code, out, err = tiny.call('train', *arguments(workdir, **{field: value}))
  assert code == 2 and out == '' and 'Traceback' not in err
  assert field in err
  assert sorted(p.name for p in workdir.rglob('*')) == before


@pytest.mark.slow
def test_monitoring_may_change_when_a_run_is_continued(tmp_path):
  workdir = tmp_path / 'run'
  kill_at(15, workdir, signal.SIGTERM)
  code, _, err = tiny.call(
      'train', *arguments(workdir, **{'knn.every_steps': 6})
  )
  assert code == 0 and 'continuing at step' in err
  evaluated = {r['step'] for r in tiny.metrics(workdir) if 'knn/top1' in r}
  assert {24, 30, 36} <= evaluated


@pytest.mark.slow
def test_a_relative_workdir_works(tmp_path):
  name = os.path.relpath(tmp_path / 'run', tiny.ROOT)
  code, _, err = tiny.call(
      'train', *arguments(name, **{'schedule.steps': 22})
  )
  assert code == 0, err
  assert (tmp_path / 'run' / 'checkpoints' / '22').is_dir()
  code, out, err = tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={name}/checkpoints/20',
      f'--workdir={name}_eval',
  )
  assert code == 0, err
  assert json.loads(out.splitlines()[-1])['checkpoint_step'] == 20


def test_evaluate_repeats_the_monitors_value(straight, tmp_path):
  workdir, result = straight
  code, out, err = tiny.call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={workdir}', f'--workdir={tmp_path / "eval"}',
  )
  assert code == 0, err
  value = json.loads(out.splitlines()[-1])
  assert value['knn/top1'] == result['knn/top1']
  assert value['checkpoint_step'] == STEPS
  assert json.loads((tmp_path / 'eval' / 'result.json').read_text()) == value


@pytest.mark.slow
def test_a_run_that_diverges_says_where_and_keeps_the_last_good(tmp_path):
  workdir = tmp_path / 'run'
  code, out, err = tiny.call(
      'train', *arguments(workdir, **{
          'optimizer.lr_per_256': 1e30, 'schedule.warmup_epochs': 0.5,
          'save.every_steps': 1, 'knn.every_steps': 0,
      })
  )
  assert code == 2 and out == '' and 'Traceback' not in err
  assert 'diverged at step' in err and 'learning rate' in err
  saved = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert f'Last good checkpoint: step {saved}' in err
  diverged = tiny.metrics(workdir)[-1]
  assert diverged['train/diverged'] == 1 and saved < diverged['step']


@pytest.mark.slow
def test_kill_at_any_moment_then_resume(tmp_path, straight):
  workdir = tmp_path / 'run'
  rng = np.random.default_rng(0)
  for _ in range(12):
    process = tiny.start(
        'train', *arguments(workdir), env_add=tiny.here()
    )
    time.sleep(rng.uniform(1.0, 8.0))
    process.send_signal(signal.SIGKILL)
    tiny.finish(process)
  code, _, err = tiny.call('train', *arguments(workdir))
  assert code == 0, err
  assert_same_run(workdir, straight[0])


def test_an_evaluation_whose_row_was_lost_is_made_again(straight, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(straight[0], workdir)
  log = workdir / 'metrics.jsonl'
  lines = log.read_text().splitlines(keepends=True)
  assert 'knn/top1' in lines[-1]
  log.write_text(''.join(lines[:-1]) + lines[-1][:20])
  code, out, err = tiny.call('train', *arguments(workdir))
  assert code == 0 and 'lacks the evaluation of step' in err, err
  assert json.loads(out.splitlines()[-1])['knn/top1'] == (
      straight[1]['knn/top1']
  )
  assert tiny.metrics(workdir) == tiny.metrics(straight[0])
