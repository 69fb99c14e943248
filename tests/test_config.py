"""Config arithmetic and checks."""

import copy
import errno
import json

import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks, evaluation, knobs
from mocov3_jax.config import training as config_lib
from mocov3_jax.runs import workdir


def changed(**overrides):
  return tiny.config(**overrides)


def claim(path, c):
  with workdir.claimed(str(path), c, config_lib.FREE_ON_RESUME):
    pass


def test_defaults_are_valid_and_locked():
  c = config_lib.default_config()
  checks.validate(c, 1)
  with pytest.raises(AttributeError):
    c.optimizer.learning_rate = 1.0


def test_devices_that_are_not_here_are_taken_to_suit():
  c = changed(fsdp_devices=8)
  with pytest.raises(UserError, match='fsdp_devices=8'):
    checks.validate(c, 1)
  checks.validate(c)


def test_the_papers_plan():
  plan = config_lib.plan(config_lib.default_config(), 1_281_167)
  assert plan.steps_per_epoch == 312
  assert plan.total_steps == 300 * 312
  assert plan.warmup_steps == 40 * 312
  assert plan.peak_lr == pytest.approx(2.4e-3)


def test_steps_override_epochs():
  plan = config_lib.plan(changed(**{'schedule.steps': 50}), 1437)
  assert (plan.total_steps, plan.steps_per_epoch) == (50, 22)
  assert plan.warmup_steps == 22


def test_a_batch_larger_than_the_data_is_refused():
  with pytest.raises(UserError, match='batch_size=64 .* 63 training images'):
    config_lib.plan(changed(), 63)


def test_a_warmup_longer_than_the_training_is_refused():
  with pytest.raises(UserError, match='warmup_epochs=5.0 is 110 steps'):
    config_lib.plan(changed(**{'schedule.warmup_epochs': 5.0}), 1437)


@pytest.mark.parametrize(
    'field, value',
    [
        ('batch_size', 0), ('seed', -1), ('seed', 2**32),
        ('augment.view1.crop_min', 0.0), ('augment.view2.crop_min', 1.5),
        ('augment.view1.crop_ratio', (2.0, 1.0)),
        ('augment.view1.crop_ratio', (1.0,)),
        ('augment.view2.flip_prob', -0.1), ('data.std', (0.0,)),
        ('data.std', (0.1, 0.2)), ('data.mean', ('a',)), ('data.mean', ()),
        ('augment.view1.hue', 0.6), ('augment.view1.blur_sigma', (0.1, 3.0)),
        ('optimizer.b1', 1.0), ('objective.temperature', 0.0),
        ('objective.momentum', 1.1), ('optimizer.lr_per_256', -1e-4),
        ('optimizer.lr_per_256', float('nan')),
        ('optimizer.weight_decay', -0.1), ('optimizer.b2', 2.0),
        ('schedule.epochs', -1.0), ('schedule.steps', -5),
        ('knn.k', 0), ('knn.temperature', 0.0), ('save.keep_latest', 0),
        ('log.every_steps', 0),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
  with pytest.raises(UserError, match=f'{field}=.* is out of range. Allowed'):
    checks.validate(changed(**{field: value}), 1)


def test_the_batch_must_divide_over_the_devices():
  checks.validate(changed(), 8)
  with pytest.raises(UserError, match='batch_size=64.*multiple of the 3'):
    checks.validate(changed(), 3)


def test_differences_list_what_changes_the_computation():
  saved = workdir.to_json(changed())
  now = copy.deepcopy(saved)
  free = config_lib.FREE_ON_RESUME
  assert knobs.differences(saved, now, frozenset()) == []
  now['knn']['every_steps'] = 7
  now['save']['keep_latest'] = 9
  now['log']['every_steps'] = 3
  assert knobs.differences(saved, now, free) == []
  assert len(knobs.differences(saved, now, frozenset())) == 3
  now['knn']['k'] = 5
  now['seed'] = 1
  now['model']['dim'] = 32
  now['new'] = 1
  assert knobs.differences(saved, now, free) == [
      'knn.k: 200 in the workdir, 5 now',
      'model.dim: 16 in the workdir, 32 now',
      "new: 'absent' in the workdir, 1 now",
      'seed: 0 in the workdir, 1 now',
  ]


def test_a_workdir_is_claimed_once_and_recognised(tmp_path):
  path = tmp_path / 'a' / 'run'
  claim(path, changed())
  text = (path / 'config.json').read_text()
  claim(path, changed(**{'knn.every_steps': 3}))
  assert (path / 'config.json').read_text() == text
  assert workdir.read_config(path).to_dict() == json.loads(text)
  with pytest.raises(UserError, match='seed: 0 in the workdir, 5 now'):
    claim(path, changed(seed=5))
  assert (path / 'config.json').read_text() == text


def test_a_workdir_in_use_is_refused(tmp_path):
  with workdir.claimed(str(tmp_path), changed()):
    with pytest.raises(UserError, match='in use by another process'):
      claim(tmp_path, changed())
  claim(tmp_path, changed())


def test_only_errors_of_the_file_system_are_blamed_on_the_workdir(tmp_path):
  with pytest.raises(BrokenPipeError), workdir.claimed(
      str(tmp_path), changed()
  ):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
  with pytest.raises(UserError, match='cannot be written: No space left'):
    with workdir.claimed(str(tmp_path), changed()):
      raise OSError(errno.ENOSPC, 'No space left')


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{"seed"')
  with pytest.raises(UserError, match='config.json is damaged'):
    claim(tmp_path, changed())


def test_a_url_is_refused():
  with pytest.raises(UserError, match='is a URL'):
    claim('gs://bucket/run', changed())


def test_a_config_of_another_command_is_refused():
  with pytest.raises(UserError, match='unknown fields: checkpoint'):
    checks.validate(evaluation.eval_config(), 1)
  with pytest.raises(UserError, match='unknown fields: augment.view1'):
    checks.validate_eval(config_lib.default_config(), 1)


def test_a_folder_with_someone_elses_outputs_is_refused(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('precious\n')
  with pytest.raises(UserError, match=r'has metrics.jsonl but no config.json'):
    claim(tmp_path, changed())
  assert (tmp_path / 'metrics.jsonl').read_text() == 'precious\n'
  assert not (tmp_path / 'config.json').exists()


def test_other_files_in_a_workdir_do_no_harm(tmp_path):
  (tmp_path / 'log.txt').write_text('from the launcher\n')
  claim(tmp_path, changed())
