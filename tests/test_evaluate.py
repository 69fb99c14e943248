"""Evaluations as commands: results, resumption, what is refused."""

import csv
import json
import shutil
import signal
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from scipy import stats
import tiny

from mocov3_jax import sources
from mocov3_jax.base.errors import UserError
from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.evals import confidence, logistic
from mocov3_jax.evals.opened import Opened
from mocov3_jax.method import optimizers
from mocov3_jax.parallel import sharding
from mocov3_jax.protocols import finetune
from mocov3_jax.protocols import setup as setup_lib
from mocov3_jax.runs import metrics, network

LINEAR = '--config=configs/eval_linear.py:small'
FINETUNE = '--config=configs/eval_finetune.py:small'
SHORT = ['--config.schedule.epochs=2']
WARM = [*SHORT, '--config.schedule.warmup_epochs=1']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A checkpoint to evaluate."""
  path = tmp_path_factory.mktemp('trained') / 'run'
  return tiny.random_run(path, tiny.config())


def evaluate(run, out, *arguments, how=tiny.call):
  config, *rest = arguments  # A config comes before its fields.
  return how(
      'evaluate', config, f'--config.checkpoint={run}', f'--workdir={out}',
      *rest,
  )


def result(run, out, *arguments, how=tiny.call):
  code, text, err = evaluate(run, out, *arguments, how=how)
  assert code == 0, err
  return json.loads(text.splitlines()[-1])


def test_every_protocol_leaves_a_result_that_says_how_it_was_obtained(
    run, tmp_path
):
  for protocol, arguments in {
      'knn': ['--config=configs/eval_knn.py'],
      'logistic': ['--config=configs/eval_logistic.py',
                   '--config.encoder=momentum'],
      'linear': [LINEAR, *SHORT],
      'finetune': [FINETUNE, *WARM, '--config.batch_size=96'],
  }.items():
    found = result(run, tmp_path / protocol, *arguments)
    assert found == json.loads(
        (tmp_path / protocol / 'result.json').read_text()
    )
    top1 = found[f'{protocol}/top1']
    low, high = found[f'{protocol}/top1_interval']
    assert 0 <= low <= top1 <= high <= 1
    assert found['protocol'] == protocol and found['checkpoint_step'] == 4
    assert found['test_images'] == 360 and found['train_images'] == 1437
    assert found['settings']['encoder'] == found['encoder']
    assert found['checkpoint'] == str(run / 'checkpoints' / '4')
  rows = [
      json.loads(line)
      for line in (run / 'results.jsonl').read_text().splitlines()
  ]
  assert [row['protocol'] for row in rows][-4:] == [
      'knn', 'logistic', 'linear', 'finetune'
  ]


def test_a_probe_reports_every_rate_last_and_best(run, tmp_path):
  found = result(
      run, tmp_path / 'o', LINEAR, *SHORT, '--config.linear.lr_per_256=(0.1,1)'
  )
  by_rate = found['linear/by_rate']
  assert set(by_rate) == {'0.1', '1'}
  rows = [r for r in tiny.metrics(tmp_path / 'o') if 'test/top1' in r]
  assert [r['step'] for r in rows] == [0, 11, 22]
  for rate, its in by_rate.items():
    trained = [r[f'test/top1_rate_{rate}'] for r in rows[1:]]
    assert its == {'last': trained[-1], 'best': max(trained)}
  assert found['linear/top1'] == max(r['last'] for r in by_rate.values())
  assert len(found['backbone_sha256']) == 64


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [
    [LINEAR, '--config.linear.batch_norm=True'],
    [FINETUNE, '--config.schedule.warmup_epochs=1', '--config.batch_size=96',
     '--config.finetune.ema=0.9'],
], ids=['linear', 'finetune'])
def test_a_network_that_was_trained_is_used_like_any_other(
    run, tmp_path, arguments
):
  out = tmp_path / 'o'
  config, *rest = arguments
  found = result(run, out, config, *SHORT, *rest)

  def call(command, *arguments):
    code, text, err = tiny.call(command, *arguments)
    assert code == 0, err
    return json.loads(text.splitlines()[-1])

  # What it says of the test images is what it was tested on.
  table, arrays = tmp_path / 'p.csv', tmp_path / 'f.npz'
  said = call(
      'extract', f'--checkpoint={out}', f'--predict={table}', f'--out={arrays}'
  )
  with table.open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == said['labelled']
  tested = np.load(arrays)['splits'] == 'test'
  assert tested.sum() == found['test_images']
  right = np.array([row['class'] == row['label'] for row in rows])
  assert right[tested].mean() == found[f'{found["protocol"]}/top1']
  assert 0 < float(rows[0]['probability_2']) <= float(rows[0]['probability'])
  # As a file it is a backbone with timm's classifier, which says the same.
  file = tmp_path / 'w.safetensors'
  call('convert', f'--from={out}', f'--to={file}')
  weights = load_file(file)
  features = np.load(arrays)['features']
  logits = features @ weights['head.weight'].T + weights['head.bias']
  classes = np.load(arrays)['classes']
  assert [row['class'] for row in rows] == classes[logits.argmax(1)].tolist()
  # Its features can be evaluated; a checkpoint of the training cannot.
  call(
      'evaluate', '--config=configs/eval_knn.py',
      f'--config.checkpoint={out}', f'--workdir={tmp_path / "knn"}',
  )
  step = out / 'checkpoints' / str(found['step'])
  code, _, err = evaluate(step, tmp_path / 'no', '--config=configs/eval_knn.py')
  assert code == 2 and 'is the workdir of an evaluation' in err


@pytest.mark.parametrize('classes', [3, ['a'], [1] * 10, {'a': 1}])
def test_names_of_classes_that_do_not_fit_are_refused(
    run, tmp_path, classes
):
  c = tiny.config()
  tree = {'params': {
      'backbone': network.restore(
          network.find(str(run)), sharding.make_mesh()
      )[0]['backbone'],
      'classifier': {'kernel': np.ones((16, 10), np.float32),
                     'bias': np.zeros(10, np.float32)},
  }}
  network.write(str(tmp_path / 'net'), c, 1, tree)
  flags = [
      f'--checkpoint={tmp_path / "net"}', f'--predict={tmp_path / "p.csv"}'
  ]
  (tmp_path / 'net' / 'classes.json').write_text(
      json.dumps({'classes': classes})
  )
  code, _, err = tiny.call('extract', *flags)
  assert code == 2 and 'does not name the 10 classes' in err
  (tmp_path / 'net' / 'classes.json').unlink()
  assert tiny.call('extract', *flags)[0] == 0
  assert (tmp_path / 'p.csv').read_text().splitlines()[1].split(',')[2] == '0'


def test_a_training_that_was_not_finished_says_what_to_do(run, tmp_path):
  result(run, tmp_path / 'o', LINEAR, *SHORT)
  shutil.rmtree(tmp_path / 'o' / 'network')
  flags = [f'--checkpoint={tmp_path / "o"}', f'--predict={tmp_path / "p.csv"}']
  code, _, err = tiny.call('extract', *flags)
  assert code == 2 and 'Try the same evaluate command once more' in err
  result(run, tmp_path / 'o', LINEAR, *SHORT)
  assert tiny.call('extract', *flags)[0] == 0


@pytest.mark.parametrize('flags, words', [
    ([], 'nothing to write'),
    (['--predict=p.csv'], 'has no classifier'),
    (['--predict=p.txt'], 'does not end with .csv'),
    (['--predict=p.csv', '--encoder=momentum'],
     'without --layer and --encoder'),
])
def test_predictions_that_cannot_be_are_refused(run, flags, words):
  code, _, err = tiny.call('extract', f'--checkpoint={run}', *flags)
  assert code == 2 and words in err


@pytest.mark.slow
@pytest.mark.parametrize('config', [LINEAR, FINETUNE], ids=['linear', 'tune'])
def test_an_evaluation_that_was_stopped_goes_on_exactly(
    run, tmp_path, config
):
  arguments = [
      config, '--config.schedule.epochs=60', '--config.log.every_steps=1',
      '--config.test_every_steps=50',
  ]
  straight = result(run, tmp_path / 'a', *arguments, how=tiny.run)
  process = tiny.start(
      'evaluate', config, f'--config.checkpoint={run}',
      f'--workdir={tmp_path / "b"}', *arguments[1:],
  )
  log = tmp_path / 'b' / 'metrics.jsonl'
  deadline = time.monotonic() + 120
  while not (log.exists() and log.read_text().count('\n') > 30):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  code, _, err = tiny.finish(process)
  assert code == 143 and 'saved step' in err, err
  continued = result(run, tmp_path / 'b', *arguments, how=tiny.run)
  assert tiny.metrics(tmp_path / 'a') == tiny.metrics(tmp_path / 'b')
  for name in straight:
    if name.startswith(('linear/', 'finetune/')):
      assert continued[name] == straight[name]


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--config=configs/eval_knn.py', '--config.protocol=svm'],
         ["protocol='svm'", 'finetune', 'linear']),
        ([LINEAR, '--config.encoder=teacher'], ['teacher', 'momentum, query']),
        ([LINEAR, '--config.batch_size=5000'], ['batch_size=5000', '1437']),
        ([LINEAR, '--config.linear.lr_per_256=(1,1)'],
         ['linear.lr_per_256', 'different numbers']),
        ([FINETUNE, '--config.batch_size=96',
          '--config.data.labels_per_class=999'],
         ['data.labels_per_class=999', 'training images']),
        ([FINETUNE, '--config.finetune.drop_path=1.0'],
         ['finetune.drop_path=1.0', 'below 1']),
        (['--config=configs/eval_linear.py:tiny'], ['imagenet, small']),
        ([FINETUNE, '--config.batch_size=96', '--config.checkpoint=/nowhere'],
         ["'/nowhere'"]),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else '',
)
def test_what_cannot_be_is_refused(run, tmp_path, arguments, words):
  code, out, err = evaluate(run, tmp_path / 'o', *arguments)
  assert code == 2 and not out, err
  for word in words:
    assert word in err
  assert 'Traceback' not in err and not (tmp_path / 'o').exists()


def test_a_probe_is_tied_to_its_checkpoint_and_labels(run, tmp_path):
  mine = tmp_path / 'run'
  shutil.copytree(run, mine)
  later = mine / 'checkpoints' / '4'
  shutil.copytree(later, mine / 'checkpoints' / '3')
  later.rename(tmp_path / '4')
  out = tmp_path / 'o'
  first = result(mine, out, LINEAR, *SHORT)
  assert first['checkpoint_step'] == 3
  assert result(mine, out, LINEAR, *SHORT)['linear/top1'] == (
      first['linear/top1']
  )
  before = (mine / 'results.jsonl').read_text()
  (tmp_path / '4').rename(later)  # Now the newest.
  code, _, err = evaluate(mine, out, LINEAR, *SHORT)
  assert code == 2 and 'checkpoint_step: 3 then, 4 now' in err, err
  assert (mine / 'results.jsonl').read_text() == before


def test_what_does_not_change_a_result_may_change(run, tmp_path):
  knn = '--config=configs/eval_knn.py'
  first = result(run, tmp_path / 'o', knn)
  again = result(run, tmp_path / 'o', knn, '--config.data.threads=1')
  assert again['knn/top1'] == first['knn/top1']


@pytest.mark.slow
def test_a_probe_that_is_repeated_keeps_its_first_record(run, tmp_path):
  line = [LINEAR, *SHORT, '--config.log.every_steps=7']
  first = result(run, tmp_path / 'o', *line)
  before = (run / 'results.jsonl').read_text()
  assert result(run, tmp_path / 'o', *line) == first
  assert json.loads((tmp_path / 'o' / 'result.json').read_text()) == first
  assert (run / 'results.jsonl').read_text() == before


def record(folder, top1):
  """Records an evaluation that found this accuracy; returns (record, lines)."""
  setup = setup_lib.Setup(
      eval_config(), network.Trained(
          tiny.config(), epath.Path(folder / 'run/checkpoints/1'), None
      ), labelled([0, 1], [1]), None, None, {},
  )
  for name in 'run', 'out':
    (folder / name).mkdir(exist_ok=True)
  found = setup_lib.record(
      setup, {'knn/top1': top1, 'test/images': 1}, epath.Path(folder / 'out')
  )
  assert found == json.loads((folder / 'out/result.json').read_text())
  lines = metrics.read_lines(epath.Path(folder / 'run/results.jsonl'))
  return found, lines


def test_a_repetition_is_recorded_where_it_finds_something_else(tmp_path):
  for top1, wanted in (0.0, [0.0]), (0.0, [0.0]), (1.0, [0.0, 1.0]):
    found, lines = record(tmp_path, top1)
    assert found['knn/top1'] == top1
    assert [line['knn/top1'] for line in lines] == wanted


def test_a_record_survives_a_line_that_a_kill_cut_off(tmp_path):
  record(tmp_path, 0.0)
  path = tmp_path / 'run/results.jsonl'
  path.write_text(path.read_text() + '{"knn/top1": 0.')
  _, lines = record(tmp_path, 1.0)
  assert [line['knn/top1'] for line in lines] == [0.0, 1.0]


def test_a_checkpoint_of_another_network_is_refused(run, tmp_path):
  other = tmp_path / 'run'
  shutil.copytree(run, other)
  c = json.loads((other / 'config.json').read_text())
  c['model']['dim'] = 32
  (other / 'config.json').write_text(json.dumps(c))
  code, _, err = evaluate(other, tmp_path / 'o', LINEAR)
  assert code == 2 and 'checkpoint' in err and 'Traceback' not in err, err


def labelled(train, test):
  def source(labels):
    return sources.ArraySource(
        'x', np.zeros((len(labels), 8, 8, 1), np.uint8),
        np.asarray(labels, np.int32), ('ant', 'bee', 'cat'),
    )
  return sources.Splits(source(train), source(train), source(test))


@pytest.mark.parametrize(
    'train, test, words',
    [
        ([0, 1, 0], [-1, -1], 'no labelled test images'),
        ([-1], [0], 'no labelled training images'),
        ([1, 1], [1], 'a single class'),
        ([0, 1], [2, 1], '1 classes .cat.'),
    ],
)
def test_labels_that_do_not_do_are_named(train, test, words):
  opened = Opened(None, 'x', 'auto', labelled(train, test), None, None)
  with pytest.raises(UserError, match=words):
    setup_lib.labelled_splits(eval_config(), opened)


def test_few_of_each_class_are_the_seeds_choice():
  labels = np.repeat(np.arange(4, dtype=np.int32), 20)
  images = np.arange(80, dtype=np.uint8).reshape(80, 1, 1, 1)
  source = sources.ArraySource('x', images, labels, tuple('abcd'))
  chosen = [
      setup_lib.few_of_each(source, labels, 5, seed).indices
      for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(chosen[0], chosen[1])
  assert set(chosen[0]) != set(chosen[2])
  assert np.bincount(labels[chosen[0]]).tolist() == [5] * 4


@pytest.mark.parametrize('right, count', [(0, 10), (7, 10), (355, 360)])
def test_the_interval_is_wilsons(right, count):
  wanted = stats.binomtest(right, count).proportion_ci(method='wilson')
  found = confidence.interval(right / count, count)
  np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_an_interval_stays_within_what_a_share_can_be():
  for count in range(1, 3000):
    for right in 0, 1, count - 1, count:
      low, high = confidence.interval(right / count, count)
      assert 0 <= low <= right / count <= high <= 1, (right, count)


def test_logistic_regression_chooses_its_penalty_on_training_images():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 60)
  x = np.eye(3)[labels] + 0.3 * rng.normal(size=(180, 3))
  # Of the test images all labels are wrong: no choice can depend on them.
  wrong = logistic.fit_and_score(
      x, labels, x, (labels + 1) % 3, (1e-4, 1.0), 200
  )
  right = logistic.fit_and_score(x, labels, x, labels, (1e-4, 1.0), 200)
  assert wrong['validation'] == right['validation']
  assert wrong['top1'] < 0.1 and right['top1'] > 0.9


def params(depth):
  block = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  backbone = {f'blocks_{i}': {'fc1': block} for i in range(depth)}
  backbone |= {
      'patch_embed': block, 'cls_token': jnp.ones((1, 1, 2)),
      'norm': {'scale': jnp.ones(2)},
  }
  return {'backbone': backbone, 'head': block}


def test_each_block_learns_slower_than_the_one_above():
  scales = optimizers.layer_scales(params(3), 3, 0.5)
  backbone = scales['backbone']
  assert scales['head']['kernel'] == backbone['norm']['scale'] == 1
  assert [
      backbone[f'blocks_{i}']['fc1']['bias'] for i in (2, 1, 0)
  ] == [0.5, 0.25, 0.125]
  assert backbone['patch_embed']['kernel'] == backbone['cls_token'] == 0.0625


def test_fine_tuning_decays_matrices_alone_each_at_its_rate():
  tree = params(3)
  optimizer = finetune.layerwise_adamw(lambda step: 0.1, 0.05, 3, 0.5)
  zero = jax.tree.map(jnp.zeros_like, tree)
  updates, _ = optimizer.update(zero, optimizer.init(tree), tree)
  np.testing.assert_allclose(updates['head']['kernel'], -0.1 * 0.05)
  np.testing.assert_allclose(
      updates['backbone']['blocks_1']['fc1']['kernel'], -0.1 * 0.05 * 0.25
  )
  assert not np.any(updates['head']['bias'])
  assert not np.any(updates['backbone']['cls_token'])


def test_without_layer_decay_it_is_optaxs_adamw():
  tree = params(1)
  ours = finetune.layerwise_adamw(lambda step: 0.1, 0.05, 1, 1.0)
  theirs = optax.adamw(0.1, weight_decay=0.05, mask=optimizers.is_kernel)
  grads = jax.tree.map(lambda x: 0.3 * x, tree)
  for a, b in zip(
      jax.tree.leaves(ours.update(grads, ours.init(tree), tree)[0]),
      jax.tree.leaves(theirs.update(grads, theirs.init(tree), tree)[0]),
      strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_rate_rises_from_its_start_and_ends_at_its_end():
  rate = optimizers.warmup_cosine(1e-3, 10, 100, 1e-6, 1e-5)
  np.testing.assert_allclose(
      [rate(s) for s in (0, 5, 10, 55, 100)],
      [1e-6, 5.005e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5], rtol=1e-4,
  )
  theirs = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 10, 100, 1e-5)
  for step in range(101):
    np.testing.assert_allclose(rate(step), theirs(step), rtol=1e-5)
  # A training that is all warm-up.
  rising = optimizers.warmup_cosine(1.0, 10, 10)
  assert float(rising(9)) == pytest.approx(0.9)


def test_how_blocks_were_looped_over_does_not_matter_to_fine_tuning():
  c = tiny.config(**{'model.scan': True, 'model.depth': 2})
  run = network.Trained(c, epath.Path('/run/checkpoints/1'), None)
  source = labelled([0, 1], [1])
  setup = setup_lib.Setup(
      eval_config(), run, source, None, None, {}
  )
  backbone = finetune.build_model(setup).backbone
  assert not backbone.scan and backbone.drop_path == 0.1
  assert backbone.patch_embed == 'learned'
