"""Bad input: exit code 2, one message, no traceback, nothing written."""

import json
import sys

import pytest
import tiny

from mocov3_jax.runs import workdir

sys.path.insert(0, str(tiny.ROOT / 'configs'))
import digits  # noqa: E402

CONFIG = '--config=configs/digits.py'

# name: (command, arguments after --workdir, what the message must name)
CASES = {
    'unknown field': (
        'train', [CONFIG, '--config.optimizer.lr_per_265=1'],
        ['lr_per_265', 'Did you mean optimizer.lr_per_256?'],
    ),
    'unknown field like no other': (
        'train', [CONFIG, '--config.optimizer.b3=1'],
        ['optimizer.b3=1', 'Allowed: optimizer.b1, optimizer.b2'],
    ),
    'a switch that is none': (
        'train', [CONFIG, '--noconfig.seed'],
        ['--noconfig.seed', 'True or False', 'Use --config.seed=VALUE'],
    ),
    'a switch that is not known': (
        'train', [CONFIG, '--noconfig.model.rematt'],
        ['--noconfig.model.rematt', 'Did you mean model.remat?'],
    ),
    'a field of another kind of config': (
        'evaluate', [CONFIG, '--config.checkpoint=docs'],
        ["'checkpoint'", "an evaluation's config", 'configs/eval_knn.py'],
    ),
    'unknown group': (
        'train', [CONFIG, '--config.optimiser.name=lars'],
        ['optimiser', 'Did you mean optimizer.'],
    ),
    'wrong type': (
        'train', [CONFIG, '--config.batch_size=many'],
        ['config.batch_size=many', 'int'],
    ),
    'fraction for an integer': (
        'train', [CONFIG, '--config.batch_size=1.5'], ['config.batch_size=1.5']
    ),
    'negative learning rate': (
        'train', [CONFIG, '--config.optimizer.lr_per_256=-1'],
        ['optimizer.lr_per_256=-1.0', '0 or more'],
    ),
    'heads do not divide dim': (
        'train', [CONFIG, '--config.model.num_heads=5'],
        ['model.num_heads=5', 'model.dim=64'],
    ),
    'image is no multiple of the patch': (
        'train', [CONFIG, '--config.model.patch_size=3'],
        ['data.image_size=8', 'model.patch_size=3'],
    ),
    'unknown source': (
        'train', [CONFIG, '--config.data.source=digit'],
        ["data.source='digit'", "Did you mean 'digits'"],
    ),
    'unknown model': (
        'train', [CONFIG, '--config.model.name=vit_m'],
        ["model.name='vit_m'", 'vit_s'],
    ),
    'warmup longer than training': (
        'train', [CONFIG, '--config.schedule.warmup_epochs=1e6'],
        ['schedule.warmup_epochs=1000000.0', 'no longer'],
    ),
    'batch larger than the data': (
        'train', [CONFIG, '--config.batch_size=2000'],
        ['batch_size=2000', '1437'],
    ),
    'wrong number of channels': (
        'train', [CONFIG, '--config.data.mean=(.1,.2,.3)',
                  '--config.data.std=(.1,.2,.3)'],
        ['data.mean=(0.1, 0.2, 0.3)', '1 channels'],
    ),
    'config of another command': (
        'train', ['--config=configs/eval_knn.py'],
        ['unknown fields', 'checkpoint'],
    ),
    'recipe given to evaluate': (
        'evaluate', [CONFIG], ['unknown fields', 'augment.view1.blur_prob']
    ),
    'a picture of no run': (
        'visualize', ['attention', '--checkpoint=/nowhere', '--out=/no/x.png'],
        ["'/nowhere'"],
    ),
    'no numbers': (
        'train', [CONFIG, "--config.data.mean=('a',)"], ["data.mean=('a',)"]
    ),
    'a bucket': ('train', [CONFIG, '--workdir=gs://b/run'], ['gs://b/run']),
    'missing config file': (
        'train', ['--config=configs/digit.py'],
        ['configs/digit.py does not exist', 'digits'],
    ),
    'a folder for a config': (
        'train', ['--config=configs'], ['configs is a folder']
    ),
    'no config': ('train', [], ['required: --config=...']),
    'empty workdir': ('train', [CONFIG, '--workdir='], ['--workdir is empty']),
    'unknown flag': (
        'train', [CONFIG, '--epochs=1'], ['epochs', '--config.GROUP.FIELD']
    ),
    'a word without dashes': ('train', [CONFIG, 'seed=1'], ["'seed=1'"]),
    'more rows than a batch': (
        'preview', [CONFIG, '--out=/nowhere/x.png', '--count=1000'],
        ['--count=1000', 'from 1 to 256, the images of a batch'],
    ),
    'sheet that cannot be written': (
        'preview', [CONFIG, '--out=/nowhere/x.png', '--count=1'],
        ['--out=/nowhere/x.png'],
    ),
    'a folder that is not there': (
        'train', ['--config=configs/folder.py:/no/photos'],
        ["data.source='folder:/no/photos'", 'there is no folder'],
    ),
    'no folder named': (
        'train', ['--config=configs/folder.py'],
        ["data.source='folder:'", 'folder:PATH'],
    ),
    'a folder without images': (
        'train', ['--config=configs/folder.py:launch'],
        ['holds no image', '.jpg'],
    ),
    'fewer images than a batch': (
        'train', ['--config=configs/folder.py:docs/images'],
        ['batch_size=256', 'training images'],
    ),
    'labels that are not there': (
        'train', ['--config=configs/folder.py:docs/images',
                  '--config.data.labels=no.csv'],
        ["data.labels='no.csv'", 'path and label'],
    ),
    'labels for digits': (
        'train', [CONFIG, '--config.data.labels=none'],
        ["data.labels='none'", 'only for folder'],
    ),
    'an unknown TFDS set': (
        'train', [CONFIG, '--config.data.source=tfds:cifar11'],
        ['data.source=tfds:cifar11', 'Nearest: ', 'cifar10'],
    ),
    'a share above one': (
        'train', [CONFIG, '--config.data.max_unreadable=2'],
        ['data.max_unreadable=2.0', 'from 0 to 1'],
    ),
    'benchmark of nothing': (
        'benchmark', [CONFIG], ['none', 'input, augment']
    ),
    'benchmark of what is not known': (
        'benchmark', ['inputs', CONFIG], ["'inputs'", "'input'"]
    ),
    'benchmark of a source of one size': (
        'benchmark', ['input', CONFIG], ['one size', 'folder:PATH']
    ),
    'not a checkpoint': (
        'evaluate',
        ['--config=configs/eval_knn.py', '--config.checkpoint=docs'],
        ["checkpoint='docs'", 'workdir of a run'],
    ),
    'a file of weights for a checkpoint': (
        'extract', ['--checkpoint=README.md', '--out=/nowhere/x.npz'],
        ["checkpoint='README.md' is a file", 'mocov3_jax.convert'],
    ),
    'no checkpoint given': (
        'evaluate', ['--config=configs/eval_knn.py'],
        ['required: --config.checkpoint=...'],
    ),
    'unknown protocol': (
        'evaluate',
        ['--config=configs/eval_knn.py', '--config.protocol=nn'],
        ["protocol='nn'", 'knn'],
    ),
    'a checkpoint of nothing': (
        'extract', ['--checkpoint=docs', '--out=/nowhere/x.npz'],
        ["checkpoint='docs'"],
    ),
    'an unknown layer': (
        'extract',
        ['--checkpoint=docs', '--out=/nowhere/x.npz', '--layer=head'],
        ["--layer='head'", 'backbone, projector'],
    ),
    'features of another kind': (
        'extract', ['--checkpoint=docs', '--out=/nowhere/x.csv'],
        ['--out=/nowhere/x.csv', '.npz'],
    ),
    'a slice of no known chip': (
        'plan', [CONFIG, '--topology=v5f:2x2'],
        ["--topology='v5f'", 'v4, v5e, v5p, v6e'],
    ),
    'nothing to convert': ('convert', [], ['--from=...', '--to=...']),
    'two folders to convert': (
        'convert', ['--from=docs', '--to=/nowhere/x'], ['.pth.tar']
    ),
    'weights that are not there': (
        'convert', ['--from=no.safetensors', '--to=/nowhere/x'],
        ['no.safetensors does not exist'],
    ),
    'weights that are none': (
        'convert', ['--from=README.safetensors', '--to=README.md'],
        ['--to=README.md exists'],
    ),
    'a report of no run': (
        'report', ['--out=report.html'], ['no run was given', 'RUN']
    ),
    'a report of what is not a run': (
        'report', ['docs', '--out=report.html'], ["'docs' is neither a run"]
    ),
    'a report of runs that are not there': (
        'report', ['/nowhere', '--out=report.html'],
        ["'/nowhere' is neither a run"],
    ),
    'a report in no folder': (
        'report', ['docs', '--out=/nowhere/x.html'],
        ['--out=/nowhere/x.html', '/nowhere is not a folder'],
    ),
    'a report of no known kind': (
        'report', ['docs', '--out=report.pdf'],
        ['--out=report.pdf', '.html, .png, .csv'],
    ),
    'a report of an unknown format': (
        'report', ['docs', '--out=report.html', '--format=htm'],
        ["--format='htm'", "Did you mean 'html'"],
    ),
    'a report that goes nowhere': ('report', ['docs'], ['--out=...']),
    'an unknown encoder': (
        'convert',
        ['--from=docs', '--to=/nowhere/x.pth', '--encoder=key'],
        ["--encoder='key'", 'momentum, query'],
    ),
    'a sweep over no field': (
        'sweep', [CONFIG, '--grid', 'optimizer.lr_per_265=1'],
        ["'optimizer.lr_per_265'", "Did you mean 'optimizer.lr_per_256'"],
    ),
    'a sweep of evaluations': (
        'sweep', ['--config=configs/eval_knn.py', '--grid', 'seed=1,2'],
        ['unknown fields', 'checkpoint'],
    ),
    'a sweep over nothing': (
        'sweep', [CONFIG, '--grid', 'seed'], ["'seed'", 'FIELD=VALUE']
    ),
    'a sweep with a value of another type': (
        'sweep', [CONFIG, '--grid', 'batch_size=64,1.5'], ['batch_size=1.5']
    ),
    'a sweep with a last value out of range': (
        'sweep', [CONFIG, '--grid', 'schedule.warmup_epochs=1,1e6'],
        ['warmup_epochs=1000000.0', 'no longer'],
    ),
    'a sweep without seeds': (
        'sweep', [CONFIG, '--seeds=0'], ['--seeds=0']
    ),
    'a sweep evaluated by no protocol': (
        'sweep', [CONFIG, '--evaluate=configs/eval_lin.py'],
        ['configs/eval_lin.py', 'eval_linear'],
    ),
    'a sweep for an unknown scheduler': (
        'sweep', [CONFIG, '--print=pbs'], ["--print='pbs'", 'commands']
    ),
    'a sweep printed for Slurm itself': (
        'sweep', [CONFIG, '--print=slurm'],
        ['--print=slurm', '--print=commands >commands.txt',
         'launch/sweep_array.sbatch commands.txt'],
    ),
}


# One case of each command is a process of its own, as a user's would be.
PROCESSES = {command: name for name, (command, *_) in reversed(CASES.items())}


def outcome(how, name, folder):
  """Runs a case by `tiny.call` or `tiny.run`."""
  command, arguments, _ = CASES[name]
  if command in ('train', 'evaluate', 'sweep'):
    arguments = [f'--workdir={folder}', *arguments]
  return how(command, *arguments)


def check(name, folder, code, out, err):
  assert code == 2, err
  assert out == ''
  assert 'Traceback' not in err
  assert err.startswith('error: ') and err.count('error: ') == 1
  for word in CASES[name][2]:
    assert word in err
  assert not folder.exists()


@pytest.mark.parametrize('name', CASES)
def test_bad_input_gets_one_clear_message(name, tmp_path):
  folder = tmp_path / 'run'
  check(name, folder, *outcome(tiny.call, name, folder))


@pytest.mark.parametrize('command', PROCESSES)
def test_a_process_says_the_same_and_exits_with_2(command, tmp_path):
  name, folder = PROCESSES[command], tmp_path / 'run'
  check(name, folder, *outcome(tiny.run, name, folder))


def test_a_config_file_that_is_broken_is_named(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('def get_config(:\n')
  code, _, err = tiny.call('train', f'--config={path}', '--workdir=/nowhere/x')
  assert code == 2 and 'mine.py' in err and 'Traceback' not in err


def test_a_config_file_without_get_config_is_named(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('x = 1\n')
  # In one process, files are loaded over each other.
  code, _, err = tiny.run('train', f'--config={path}', '--workdir=/nowhere/x')
  assert code == 2 and 'get_config' in err and 'Traceback' not in err


def test_a_recipe_that_misspells_a_field_is_told_so(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
      'from mocov3_jax.config import default_config\n'
      'def get_config():\n'
      '  c = default_config()\n'
      '  c.optimizer.lr_per_265 = 1.0\n'
      '  return c\n'
  )
  code, _, err = tiny.call('train', f'--config={path}', '--workdir=/nowhere/x')
  assert code == 2 and 'lr_per_265' in err and 'Traceback' not in err


@pytest.mark.parametrize(
    'body, word',
    [
        ('c.schedule.epochs = "160"', 'TypeError'),
        ('c.mdoel.depth = 3', 'Did you mean "model"'),
        ('return None', 'returned nothing'),
        ('1 / 0', 'ZeroDivisionError'),
    ],
)
def test_a_recipe_that_fails_is_told_why(tmp_path, body, word):
  path = tmp_path / 'mine.py'
  path.write_text(
      'from mocov3_jax.config import default_config\n'
      'def get_config():\n'
      '  c = default_config()\n'
      f'  {body}\n'
      '  return c\n'
  )
  code, _, err = tiny.call('train', f'--config={path}', '--workdir=/nowhere/x')
  assert code == 2 and word in err and 'Traceback' not in err
  assert err.count('\n') == 1


def test_a_batch_that_does_not_divide_over_the_devices_is_named(tmp_path):
  process = tiny.start(
      'train', CONFIG, f'--workdir={tmp_path / "run"}',
      env_add={'XLA_FLAGS': '--xla_force_host_platform_device_count=3'},
  )
  code, _, err = tiny.finish(process)
  assert code == 2 and 'batch_size=256' in err and '3 devices' in err
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_what_does_not_fit_into_memory_says_what_needs_less(tmp_path):
  code, out, err = tiny.call(
      'train', CONFIG, f'--workdir={tmp_path}',
      '--config.objective.queue=1000000000000',
  )
  assert code == 2 and out == '' and 'Traceback' not in err
  message = err.splitlines()[-1]
  assert message.startswith('error: ') and 'ut of memory' in message
  assert 'micro_batch' in message and 'batch_size' in message


def test_checkpoints_that_are_no_folder_are_named(tmp_path):
  run = tmp_path / 'run'
  run.mkdir()
  c = workdir.to_json(digits.get_config())
  (run / 'config.json').write_text(json.dumps(c))
  (run / 'checkpoints').write_text('mine\n')
  code, _, err = tiny.call('train', CONFIG, f'--workdir={run}')
  assert code == 2 and 'checkpoints' in err and 'Traceback' not in err
  assert (run / 'checkpoints').read_text() == 'mine\n'


@pytest.mark.parametrize('place', ['a file', 'below a file'])
def test_a_workdir_that_cannot_be_written_is_named(tmp_path, place):
  file = tmp_path / 'file'
  file.write_text('mine\n')
  run = file if place == 'a file' else file / 'run'
  code, _, err = tiny.call('train', CONFIG, f'--workdir={run}')
  assert code == 2 and f'--workdir={run} cannot be written' in err
  assert 'Traceback' not in err and file.read_text() == 'mine\n'


def test_help_names_the_flags():
  code, out, _ = tiny.run('train', '--help')
  assert code == 0 and '--workdir' in out and 'Pre-trains' in out


def test_every_command_is_covered():
  commands = {
      path.stem for path in (tiny.ROOT / 'mocov3_jax').glob('*.py')
      if not path.name.startswith('__')
  }
  assert commands == {case[0] for case in CASES.values()}


@pytest.mark.parametrize('given, meant', [
    ('epochs', 'schedule.epochs'), ('lr_per_256', 'optimizer.lr_per_256'),
    ('optimzer.lr_per_256', 'optimizer.lr_per_256'),
    ('optimizer.lr', 'optimizer.lr_per_256'), ('shedule.epochs',
    'schedule.epochs'), ('model.patchsize', 'model.patch_size'),
    ('schedule.epoch', 'schedule.epochs'), ('knn.temperatur',
    'knn.temperature'), ('source', 'data.source'),
])
def test_a_field_is_found_by_its_name_in_any_group(tmp_path, given, meant):
  code, _, err = tiny.call(
      'train', CONFIG, f'--workdir={tmp_path / "run"}', f'--config.{given}=1'
  )
  said = err.split('Did you mean ')[1].split('?')[0]
  assert code == 2 and meant in said, err
