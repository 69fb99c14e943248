"""Sweeps: grids, whose turn it is, tables; mostly with runs that are played."""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags
import pytest
import tiny

from mocov3_jax.base.errors import Preempted, UserError
from mocov3_jax.runs import history, metrics
from mocov3_jax.runs import table as sweep_table
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.sweeps import grid as sweep_grid
from mocov3_jax.sweeps import running as sweeping
from mocov3_jax.sweeps import sweep as sweep_lib

# ml_collections reads config files by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')
DIGITS = str(tiny.ROOT / 'configs/digits.py')
LINEAR = str(tiny.ROOT / 'configs/eval_linear.py')
RATES = 'optimizer.lr_per_256=5e-5,1e-4'
EMBED = 'model.patch_embed=learned,frozen'


def read(argv):
  """(config, overrides) of a command line, as the commands read it."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
      'config', flag_values=values, sys_argv=['x', *argv]
  )
  values(['x', *argv])
  return holder.value, values['config'].override_values


def grid_of(*axes, seeds=1, config=DIGITS, **overrides):
  """The grid of a command line, and the config of all its runs."""
  given = [f'--config.{k}={v}' for k, v in overrides.items()]
  base, found = read([f'--config={config}', *given])
  return sweep_grid.parse(config, base, found, axes, seeds), base


def points_of(*arguments, **keywords):
  return sweep_grid.points(*grid_of(*arguments, **keywords))


def flag(command, name):
  """The value of --NAME= in a command."""
  (found,) = (w for w in command if w.startswith(f'--{name}='))
  return found.split('=', 1)[1]


class Players:
  """Instead of processes: writes what a run would, and notes its name.

  Attributes:
    acts: {part of a name: what happens there}, 'NaN', an exit code or a
      function of the folder that returns (exit code, message).
    started: 'NAME' of each training, 'NAME/FOLDER' of each evaluation.
    pauses: how often there was nothing to do but wait.
  """

  def __init__(self, root, acts=None, between=lambda: None):
    self.root, self.acts, self.between = root, acts or {}, between
    self.started, self.pauses = [], 0

  def __call__(self):
    return contextlib.nullcontext(self)

  def pause(self):
    self.pauses += 1
    assert self.pauses < 5
    self.between()

  def start(self, command):
    folder = pathlib.Path(flag(command, 'workdir'))
    name = str(folder.relative_to(self.root))
    self.started.append(name)
    act = next((v for k, v in self.acts.items() if k in name), 0)
    code, said = act(folder) if callable(act) else (act, 'so it said')
    if code == 0 or code == 'NaN':
      play(command, folder, diverged=code == 'NaN')
    return sweeping.Ended(2 if code == 'NaN' else code, said)


def play(command, folder, diverged=False):
  """What a run, or an evaluation, leaves behind."""
  folder.mkdir(parents=True, exist_ok=True)
  config, _ = read([w for w in command if w.startswith('--config')])
  text = json.dumps(workdir_lib.to_json(config))
  (folder / 'config.json').write_text(text)
  if 'mocov3_jax.evaluate' in command:
    result = {
        'protocol': 'linear', 'linear/top1': 0.75, 'workdir': str(folder),
        'checkpoint_step': 4, 'encoder': 'query',
        'settings': workdir_lib.to_json(config),
    }
    with open(pathlib.Path(flag(command, 'config.checkpoint'))
              / 'results.jsonl', 'a') as file:
      file.write(json.dumps(result) + '\n')
  else:
    row = {'step': 3} | ({'train/diverged': 1.0} if diverged else {})
    (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
    result = {'step': 4, 'knn/top1': 0.5 + 0.1 * config.seed}
  if not diverged:
    (folder / 'result.json').write_text(json.dumps(result))


def sweep(root, *axes, acts=None, files=(), between=lambda: None, **keywords):
  """Sweeps with players; returns (result, players)."""
  players = Players(root, acts, between)
  result = sweep_lib.sweep(
      *grid_of(*axes, **keywords), str(root), files, players
  )
  return result, players


def test_values_are_split_outside_of_brackets():
  grid, _ = grid_of('data.std=(0.3,),(0.4,)', 'augment.view1.crop_ratio=[1,2]')
  assert grid.axes['data.std'] == ((0.3,), (0.4,))
  assert grid.axes['augment.view1.crop_ratio'] == ((1, 2),)
  grid, _ = grid_of('model.remat=true,False', 'data.source=digits,folder:/a/b')
  assert grid.axes['model.remat'] == (True, False)
  assert grid.axes['data.source'] == ('digits', 'folder:/a/b')


@pytest.mark.parametrize('axes, keywords, words', [
    (['data.std'], {}, ["'data.std'", 'FIELD=VALUE']),
    (['optimizer=adamw'], {}, ["no config field 'optimizer'", 'GROUP.FIELD']),
    ([RATES, RATES], {}, ['lr_per_256 is given twice', 'one --grid a field']),
    (['batch_size=64,,32'], {}, ['value 2 is empty']),
    (['batch_size='], {}, ['value 1 is empty']),
    (['optimizer.lr_per_256=1e-4,0.0001'], {}, ['0.0001 is there twice']),
    (['data.std=(1,2'], {}, ['bracket']),
    (['data.std=1)'], {}, ['bracket']),
    (['batch_size=many'], {}, ['batch_size=many', 'int']),
    (['model.remat=maybe'], {}, ['model.remat=maybe', 'the kind of False']),
    (['seed=0,1'], {'seeds': 2}, ['--grid seed', '--seeds=2']),
    ([], {'seeds': 2, 'seed': 1}, ['--seeds=2', '--config.seed=1']),
    ([RATES], {'optimizer.lr_per_256': 1}, ['--config.optimizer.lr_per_256']),
])
def test_a_bad_axis_gets_one_clear_message(axes, keywords, words):
  with pytest.raises(UserError) as e:
    grid_of(*axes, **keywords)
  for word in words:
    assert word in str(e.value)


def test_a_grid_is_the_product_of_its_axes_and_seeds():
  found = points_of(RATES, EMBED, seeds=2)
  assert [p.title for p in found] == [
      f'lr_per_256={rate} patch_embed={embed} seed={seed}'
      for rate in ('5e-05', '0.0001') for embed in ('learned', 'frozen')
      for seed in (0, 1)
  ]
  assert found[-1].config.optimizer.lr_per_256 == 1e-4
  assert found[-1].config.seed == 1


def test_names_are_the_same_for_other_orders_and_more_values():
  few = {p.name for p in points_of(RATES, EMBED)}
  more = {p.name for p in points_of(EMBED, f'{RATES},3e-4', seeds=3)}
  assert few < more and len(more) == 18
  assert 'patch_embed=frozen,lr_per_256=0.0001,seed=0' in few


def test_names_fit_a_file_system_and_stay_unique():
  long = 'folder:/' + 'x' * 300
  values = ['digits', 'folder:/a b', 'folder:/a_b', long, long + 'y']
  found = points_of(f'data.source={",".join(values)}', 'model.name=a,b')
  names = [p.name for p in found]
  assert len(set(names)) == 10
  assert all(len(name) < 250 and '/' not in name for name in names)
  assert 'source=digits,model.name=a,seed=0' in names  # 'name' is ambiguous.


def test_the_flags_of_a_run_give_its_config():
  found = points_of(
      'data.std=(0.3,),0.4', RATES, 'model.remat=false,true', seeds=2,
      **{'data.mean': '(0.2,)', 'schedule.steps': 7},
  )
  assert len(found) == 16
  for point in found:
    assert read(point.flags)[0].to_dict() == point.config.to_dict()
    assert point.config.data.mean == (0.2,)


def test_the_seed_of_the_config_is_that_of_a_single_run():
  assert [p.config.seed for p in points_of(seed=5)] == [5]
  assert [p.config.seed for p in points_of('seed=3,7')] == [3, 7]
  assert points_of('seed=3,7')[0].name == points_of(seed=3)[0].name


@pytest.mark.parametrize('axis, words', [
    ('model.name=vit_ti,vit_m', ['model.name=vit_m', 'Allowed']),
    ('optimizer.name=adamw,sgd', ["optimizer.name='sgd'"]),
    ('optimizer.weight_decay=0,-1', ['weight_decay=-1.0', '0 or more']),
    ('data.source=digits,folder:/no', ['there is no folder']),
    ('batch_size=64,2000', ['batch_size=2000', '1437']),
    ('fsdp_devices=1,0', ['fsdp_devices=0', 'at least 1']),
])
def test_the_last_value_is_checked_before_the_first_run(tmp_path, axis, words):
  players = Players(tmp_path / 's')
  with pytest.raises(UserError) as e:
    sweep_lib.sweep(*grid_of(axis), str(tmp_path / 's'), [], players)
  for word in words:
    assert word in str(e.value)
  assert not players.started and not (tmp_path / 's').exists()


def test_what_depends_on_the_devices_is_left_to_the_run():
  c = {'fsdp_devices': 4, 'micro_batch': 16, 'batch_size': 256}
  sweep_lib.check_points(points_of(**c), False)


def test_a_sweep_ends_with_a_table_and_does_nothing_twice(tmp_path, capsys):
  result, players = sweep(tmp_path, RATES, EMBED, seeds=2)
  assert len(players.started) == len(set(players.started)) == 8
  assert {k: v for k, v in result.items() if k != 'table'} == {
      'workdir': str(tmp_path), 'runs': 8, 'done': 8, 'diverged': 0,
  }
  assert len(result['table']) == 4
  row = result['table'][1]
  assert row['optimizer.lr_per_256'] == 5e-5
  assert row['model.patch_embed'] == 'frozen' and row['seeds'] == 2
  assert row['knn/top1_mean'] == pytest.approx(0.55)
  assert row['knn/top1_sd'] == pytest.approx(0.1 / 2**0.5)
  err = capsys.readouterr().err
  assert '[3/8] lr_per_256=5e-05 patch_embed=frozen seed=0\n' in err
  assert '[8/8] done in 0:00:00, kNN 60.0 %\n' in err
  assert '; 5 to go, about 0:00:00\n' in err
  assert err.splitlines()[-4].split() == [
      '5e-05', 'learned', '2', '0', '0', '55.00', '±', '7.07', '%'
  ]
  again, players = sweep(tmp_path, RATES, EMBED, seeds=2)
  assert not players.started and again == result


def test_a_run_that_diverged_is_in_the_table_and_not_in_the_mean(tmp_path):
  acts = {'5e-05,seed=1': 'NaN'}
  result, _ = sweep(tmp_path, RATES, seeds=3, acts=acts)
  row = result['table'][0]
  assert result['diverged'] == 1
  assert (row['seeds'], row['done'], row['diverged']) == (3, 2, 1)
  assert row['knn/top1_mean'] == pytest.approx(0.6)
  again, players = sweep(tmp_path, RATES, seeds=3)
  assert not players.started and again == result


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(
    tmp_path, capsys
):
  acts = {'5e-05,seed=0': 2, '5e-05,seed=1': -9}
  with pytest.raises(UserError) as e:
    sweep(tmp_path, RATES, seeds=2, acts=acts)
  for word in (
      '2 of 4 runs failed', 'lr_per_256=5e-05 seed=0: exit code 2: so it said',
      'killed by SIGKILL (out of memory?): so it said', 'tries them again',
  ):
    assert word in str(e.value)
  err = capsys.readouterr().err
  assert err.splitlines()[-2].split() == ['5e-05', '0', '0', '2', '-']
  result, players = sweep(tmp_path, RATES, seeds=2)
  assert players.started == [
      'lr_per_256=5e-05,seed=0', 'lr_per_256=5e-05,seed=1'
  ]
  assert result['done'] == 4


@pytest.mark.parametrize('code', [143, -signal.SIGTERM])
def test_a_run_that_was_stopped_stops_the_sweep(tmp_path, code):
  with pytest.raises(Preempted, match='the same command continues'):
    sweep(tmp_path, RATES, acts={'0.0001': code})
  result, players = sweep(tmp_path, RATES)
  assert players.started == ['lr_per_256=0.0001,seed=0']
  assert result['done'] == 2


def test_a_run_that_another_process_holds_comes_last(tmp_path, capsys):
  (point, *_) = points_of(RATES)
  folder = tmp_path / point.name
  folder.mkdir()
  config = json.dumps(workdir_lib.to_json(point.config))
  (folder / 'config.json').write_text(config)
  with open(folder / '.lock', 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    result, players = sweep(tmp_path, RATES, between=file.close)
  assert players.started == [
      'lr_per_256=0.0001,seed=0', 'lr_per_256=5e-05,seed=0'
  ]
  assert players.pauses == 1 and result['done'] == 2
  err = capsys.readouterr().err
  assert 'other processes, which hold: lr_per_256=5e-05 seed=0\n' in err


def test_a_lost_race_for_a_run_is_no_failure(tmp_path):
  def lose(folder):  # The winner does it at once.
    play(['x', *points_of(RATES)[0].flags], folder)
    return 2, f'--workdir={folder} is in use by another process. Allowed: ...'

  result, players = sweep(tmp_path, RATES, acts={'5e-05': lose})
  assert len(players.started) == 2 and result['done'] == 2


def test_a_sweep_may_grow_by_values_and_seeds(tmp_path):
  sweep(tmp_path, RATES)
  result, players = sweep(tmp_path, f'{RATES},3e-4', seeds=2)
  assert result['done'] == 6 and len(players.started) == 4
  _, players = sweep(tmp_path, 'optimizer.lr_per_256=1e-4')
  assert not players.started
  kept = json.loads((tmp_path / 'sweep.json').read_text())
  assert kept['axes'] == {'optimizer.lr_per_256': [5e-5, 1e-4, 3e-4]}
  assert kept['seeds'] == [0, 1] and kept['config'] == DIGITS
  assert len({run['name'] for run in kept['runs']}) == 6
  assert 'mocov3_jax.train' in kept['runs'][0]['command']


@pytest.mark.parametrize('axes, keywords, words', [
    ([RATES], {'schedule.epochs': 20}, ['overrides.schedule.epochs', '20.0']),
    ([RATES, EMBED], {}, ['fields of the grid', 'model.patch_embed']),
    ([RATES], {'config': f'{DIGITS}:byol'}, ['config: ', 'byol']),
])
def test_another_sweep_in_the_folder_is_refused(
    tmp_path, axes, keywords, words
):
  sweep(tmp_path, RATES)
  players = Players(tmp_path)
  with pytest.raises(UserError, match='holds another sweep') as e:
    sweep_lib.sweep(*grid_of(*axes, **keywords), str(tmp_path), [], players)
  assert all(word in str(e.value) for word in words)
  assert not players.started


def test_what_computes_the_same_may_change(tmp_path):
  sweep(tmp_path, RATES)
  _, players = sweep(tmp_path, RATES, **{'data.threads': 1})
  assert not players.started


def test_a_recipe_that_was_edited_is_refused(tmp_path):
  recipe = tmp_path / 'mine.py'
  shutil.copy(DIGITS, recipe)
  sweep(tmp_path / 's', RATES, config=str(recipe))
  text = recipe.read_text().replace('epochs = 160.0', 'epochs = 170.0')
  recipe.write_text(text)
  os.utime(recipe, (1, 1))  # Python would take its cache of the same second.
  with pytest.raises(UserError, match='schedule.epochs: 160.0 in the workdir'):
    sweep(tmp_path / 's', f'{RATES},1', config=str(recipe))


def test_the_workdir_of_a_run_and_a_damaged_file_are_refused(tmp_path):
  (tmp_path / 'sweep.json').write_text('{"config": 1')
  with pytest.raises(UserError, match=r'sweep\.json is damaged'):
    sweep(tmp_path, RATES)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='is the workdir of a run'):
    sweep(tmp_path, RATES)


def test_runs_that_are_done_are_evaluated_once(tmp_path):
  acts = {'5e-05,seed=0': 'NaN'}
  files = [f'{LINEAR}:small']
  result, players = sweep(tmp_path, RATES, acts=acts, files=files)
  assert players.started == [
      'lr_per_256=5e-05,seed=0', 'lr_per_256=0.0001,seed=0',
      'lr_per_256=0.0001,seed=0/eval_linear_small',
  ]
  assert result['table'][1]['eval_linear_small/top1_mean'] == 0.75
  assert 'eval_linear_small/top1_mean' not in result['table'][0]
  files.append(LINEAR)
  acts = {'/eval_linear': 2}
  with pytest.raises(UserError, match='lr_per_256=0.0001 seed=0: exit code 2'):
    sweep(tmp_path, RATES, acts=acts, files=files)
  result, players = sweep(tmp_path, RATES, files=files)
  assert players.started == ['lr_per_256=0.0001,seed=0/eval_linear']


@pytest.mark.parametrize('files, words', [
    ([DIGITS], ['digits.py', 'unknown fields']),
    ([f'{LINEAR}:tiny'], ['eval_linear.py:tiny', 'Allowed: imagenet, small']),
    ([LINEAR, LINEAR], ['share the folder eval_linear']),
])
def test_a_bad_protocol_gets_one_clear_message(files, words):
  with pytest.raises(UserError) as e:
    sweep_lib.check_protocols(files)
  assert all(word in str(e.value) for word in words)


def test_the_table_leaves_out_what_runs_without_labels_lack(tmp_path):
  found = [
      history.Run(
          tmp_path, {'seed': seed, 'data.std': [0.5]}, [], status, {}, []
      )
      for seed, status in enumerate(['done', 'stopped', 'absent'])
  ]
  (row,) = sweep_table.aggregate(found, ['data.std'])
  assert row == {
      'data.std': [0.5], 'seeds': 3, 'done': 1, 'diverged': 0, 'unfinished': 2
  }
  assert sweep_table.as_text([row], {'data.std': 'std'}).split() == [
      'std', 'done', 'diverged', 'unfinished', '(0.5,)', '1', '0', '2'
  ]


def test_an_evaluation_elsewhere_is_named_by_its_protocol(tmp_path):
  line = {
      'protocol': 'knn', 'workdir': '/out/7', 'knn/top1': 0.25,
      'checkpoint_step': 9, 'encoder': 'query',
      'settings': {'data': {'labels_per_class': 0}},
  }
  few = {'settings': {'data': {'labels_per_class': 10}}}
  lines = [line] + [
      line | {'knn/top1': 0.125} | other
      for other in ({'checkpoint_step': 5}, {'encoder': 'momentum'}, few)
  ]
  result = {'step': 9, 'knn/top1': 0.5}
  found = history.Run(tmp_path, {}, [], 'done', result, lines)
  (row,) = sweep_table.aggregate([found], [])
  assert row['knn/top1_mean'] == 0.5 and row['eval_knn/top1_mean'] == 0.25
  assert row['knn/top1_sd'] is None


def printed(capsys, root, *axes, files=(), **keywords):
  grid, base = grid_of(*axes, **keywords)
  assert sweep_lib.main(grid, base, str(root), files, 'commands') is None
  return capsys.readouterr()


def test_the_runs_that_are_left_are_printed_as_lines_of_shell(tmp_path, capsys):
  root = tmp_path / 'a sweep'
  sweep(root, 'optimizer.lr_per_256=5e-5')
  capsys.readouterr()
  before = sorted(root.rglob('*'))
  out, err = printed(capsys, root, RATES, seeds=2)
  names = ['lr_per_256=5e-05,seed=1', 'lr_per_256=0.0001,seed=0',
           'lr_per_256=0.0001,seed=1']
  lines = [shlex.split(line) for line in out.splitlines()]
  assert [flag(line, 'workdir') for line in lines] == [
      str(root / name) for name in names
  ]
  assert lines[0][:3] == [sys.executable, '-m', 'mocov3_jax.train']
  assert err == '' and sorted(root.rglob('*')) == before
  out, _ = printed(capsys, root, RATES, files=[f'{LINEAR}:small'])
  assert [line.count(' && ') for line in out.splitlines()] == [0, 1]
  out, err = printed(capsys, root, 'optimizer.lr_per_256=5e-5')
  assert out == '' and 'all 1 runs are complete' in err


def test_the_runs_that_are_left_are_printed_for_no_scheduler(tmp_path):
  root = str(tmp_path / 'a sweep')
  for how in 'slurm', 'jobset':
    with pytest.raises(UserError) as e:
      sweep_lib.main(*grid_of(RATES), root, [], how)
    assert f'--print={how} ' in str(e.value)
    _, first, second, _ = str(e.value).splitlines()
    assert shlex.split(first) == [
        'python', '-m', 'mocov3_jax.sweep', '...', '--print=commands',
        '>commands.txt',
    ]
    # The second line counts those that the first has printed.
    (tmp_path / 'commands.txt').write_text('one\ntwo\nthree\n')
    done = subprocess.run(
        ['bash', '-c', f'sbatch() {{ echo "$@"; }}; {second}'], cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )
    assert done.stdout.split() == [
        '--array=0-2%4', 'launch/sweep_array.sbatch', 'commands.txt'
    ]
  for how in 'command', '':
    with pytest.raises(UserError, match=f"--print='{how}'.*Allowed: commands"):
      sweep_lib.main(*grid_of(RATES), root, [], how)


def test_a_child_says_what_went_wrong(capsys):
  text = 'import sys; sys.exit("hm\\nerror: it\\n  is\\n")'
  with sweeping.Children() as children:
    ended = children.start([sys.executable, '-c', text])
  assert ended == sweeping.Ended(1, 'it is')
  assert capsys.readouterr().err.startswith('hm\nerror: it\n')


def test_a_run_is_its_own_where_slurm_started_several_sweeps(monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '8')
  text = (
      'from mocov3_jax.parallel import processes\n'
      'processes.start(None, None, None)\n'
      'import jax, sys\n'
      'sys.exit(3 if jax.distributed.is_initialized() else 0)\n'
  )
  with sweeping.Children() as children:
    assert children.start([sys.executable, '-c', text]).code == 0


@pytest.mark.parametrize('numbers, code', [
    ([signal.SIGTERM], 143), ([signal.SIGINT], 143),
    ([signal.SIGINT, signal.SIGINT], 130),
])
def test_a_signal_to_the_sweep_reaches_the_run(numbers, code):
  # It sends the signals itself; a first one has to come back as SIGTERM.
  text = (
      'import os, signal, sys, time\n'
      'came = []\n'
      'def note(number, _):\n'
      '  came.append(number)\n'
      'signal.signal(signal.SIGTERM, note)\n'
      'signal.signal(signal.SIGINT, note)\n'
      f'for i, number in enumerate({[int(n) for n in numbers]}, 1):\n'
      '  os.kill(os.getppid(), number)\n'
      '  while len(came) < i: time.sleep(0.01)\n'
      'sys.exit(143 if came == [15] else 130 if came == [15, 2] else 1)\n'
  )
  with sweeping.Children() as children:
    assert children.start([sys.executable, '-c', text]).code == code
    with pytest.raises(Preempted):
      children.start([sys.executable, '-c', text])
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(sys.platform != 'linux', reason='needs PR_SET_PDEATHSIG')
def test_a_run_is_stopped_when_its_sweep_is_killed(tmp_path):
  run = (
      'import pathlib, signal, sys, time\n'
      'def save(*_):\n'
      f'  pathlib.Path({str(tmp_path / "saved")!r}).touch()\n'
      '  sys.exit(143)\n'
      'signal.signal(signal.SIGTERM, save)\n'
      'print("ready", file=sys.stderr, flush=True)\n'
      'time.sleep(60)\n'
  )
  process = subprocess.Popen(
      [sys.executable, '-c', (
          'import sys\n'
          'from mocov3_jax.sweeps import running as sweeping\n'
          'with sweeping.Children() as children:\n'
          f'  children.start([sys.executable, "-c", {run!r}])\n'
      )], cwd=tiny.ROOT, stderr=subprocess.PIPE, text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert process.stderr.readline() == 'ready\n'
  process.kill()
  process.communicate()
  wait_for((tmp_path / 'saved').exists, 10)


def wait_for(ready, seconds):
  end = time.monotonic() + seconds
  while not ready():
    assert time.monotonic() < end
    time.sleep(0.05)


TINY = {
    k: v for k, v in tiny.flat_overrides().items()
    if k != 'optimizer.lr_per_256'
} | {'schedule.epochs': 0.5, 'schedule.warmup_epochs': 0.1}


def command_line(root, **overrides):
  return [
      '--config=configs/digits.py', f'--workdir={root}',
      *(f'--config.{k}={v}' for k, v in (TINY | overrides).items()),
  ]


@pytest.mark.slow
def test_a_sweep_of_processes_trains(tmp_path):
  code, out, err = tiny.run(
      'sweep', *command_line(tmp_path / 's', **{'schedule.steps': 4}),
      '--grid', 'optimizer.lr_per_256=4e-3',
  )
  assert code == 0, err
  result = json.loads(out)
  run = history.read(tmp_path / 's/lr_per_256=0.004,seed=0')
  assert (result['runs'], result['done'], run.result['step']) == (1, 1, 4)
  assert '[1/1] lr_per_256=0.004 seed=0\n' in err and '\nstep 4/4  kNN' in err
  assert result['table'][0]['knn/top1_mean'] == run.result['knn/top1']


@pytest.mark.slow
def test_a_sweep_that_was_killed_finishes_without_loss_or_repetition(tmp_path):
  root = tmp_path / 's'
  line = command_line(root, **{
      'schedule.epochs': 30, 'save.every_steps': 50, 'knn.every_steps': 50
  }) + [
      '--grid', 'optimizer.lr_per_256=4e-3,1e38', '--grid', EMBED, '--seeds=2',
  ]
  names = {
      f'patch_embed={embed},lr_per_256={rate},seed={seed}'
      for embed, rate, seed in itertools.product(
          ('learned', 'frozen'), ('0.004', '1e+38'), (0, 1)
      )
  }
  process = subprocess.Popen(
      [sys.executable, '-m', 'mocov3_jax.sweep', *line], cwd=tiny.ROOT,
      start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  # In the midst of the third run, after its first checkpoint.
  third = root / 'patch_embed=frozen,lr_per_256=0.004,seed=0'
  for text in process.stderr:
    if text.startswith('[3/8]'):
      break
  wait_for(lambda: any(
      row['step'] > 60 for row in rows_of(third)
  ), 120)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  before = {
      p: (p.stat().st_ino, p.stat().st_mtime_ns)
      for name in names - {third.name} for p in (root / name).rglob('*')
      if p.is_file()
  }
  assert {p.parent.name for p in before if p.name == 'result.json'} == {
      'patch_embed=learned,lr_per_256=0.004,seed=0',
      'patch_embed=learned,lr_per_256=0.004,seed=1',
  }
  assert not (third / 'result.json').exists()

  code, out, err = tiny.finish(tiny.start('sweep', *line), 600)
  assert code == 0, err
  result = json.loads(out)
  assert (result['runs'], result['done'], result['diverged']) == (8, 4, 4)
  assert {p.name for p in root.iterdir() if p.is_dir()} == names
  for path, found in before.items():
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == found, path
  # The third went on from a checkpoint, and none was trained twice.
  assert 'continuing at step' in err
  steps = [row['step'] for row in rows_of(third) if 'train/loss' in row]
  assert steps == list(range(660))
  assert err.count('training diverged at step') == 4
  titles = [t for t in err.splitlines() if ' seed=' in t and '[' in t]
  assert len({t for t in titles if 'hold' not in t}) == 6
  for row in result['table']:
    diverged = row['optimizer.lr_per_256'] == 1e38
    assert (row['done'], row['diverged']) == ((0, 2) if diverged else (2, 0))
    assert ('knn/top1_mean' in row) != diverged


def rows_of(folder):
  return metrics.read_metrics(folder / 'metrics.jsonl')
