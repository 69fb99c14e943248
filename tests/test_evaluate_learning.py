"""What evaluations of the smoke run have to reach; minutes long."""

import json

import pytest
import tiny

pytestmark = pytest.mark.slow
FINETUNE = '--config=configs/eval_finetune.py:small'


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('smoke') / 'run'
  code, _, err = tiny.run(
      'train', '--config=configs/digits.py', f'--workdir={workdir}'
  )
  assert code == 0, err
  return workdir


def evaluate(smoke, out, config, *arguments):
  code, text, err = tiny.run(
      'evaluate', config, f'--config.checkpoint={smoke}', f'--workdir={out}',
      *arguments,
  )
  assert code == 0, err
  return json.loads(text.splitlines()[-1])


def test_digits_are_told_apart_by_every_protocol(smoke, tmp_path):
  for protocol, config, least in (
      ('knn', '--config=configs/eval_knn.py', 0.95),
      ('linear', '--config=configs/eval_linear.py:small', 0.95),
      ('logistic', '--config=configs/eval_logistic.py', 0.94),
      ('finetune', FINETUNE, 0.97),
  ):
    found = evaluate(smoke, tmp_path / protocol, config)
    assert found[f'{protocol}/top1'] >= least, protocol


def test_with_few_labels_pretraining_helps(smoke, tmp_path):
  top1 = {True: [], False: []}
  for scratch, found in top1.items():
    for seed in range(3):
      result = evaluate(
          smoke, tmp_path / f'{scratch}{seed}', FINETUNE,
          f'--config.finetune.from_scratch={scratch}',
          f'--config.seed={seed}', '--config.data.labels_per_class=10',
          '--config.schedule.epochs=200', '--config.schedule.warmup_epochs=20',
          '--config.test_every_steps=200',
      )
      assert result['train_images'] == 100
      found.append(result['finetune/top1'])
  # By how much depends on the pre-trained network, of which this is one: 6.6
  # points in docs/evaluation.md, 4.5 with another rounding of its training.
  assert min(top1[False]) > max(top1[True])
