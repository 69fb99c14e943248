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
  with workdir.claimed(str(path), c, config_lib.schema()):
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
        ('batch_size', 0), ('batch_size', 1), ('head.out_dim', 1),
        ('optimizer.trust_coefficient', 0.0), ('optimizer.momentum', 1.0),
        ('seed', -1), ('seed', 2**32),
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
        ('log.every_steps', 0), ('knn.k', 10**400),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
  with pytest.raises(UserError, match=f'{field}=.* is out of range. Allowed'):
    checks.validate(changed(**{field: value}), 1)


def test_the_batch_must_divide_over_the_devices():
  checks.validate(changed(), 8)
  with pytest.raises(UserError, match='batch_size=64.*multiple of the 3'):
    checks.validate(changed(), 3)


@pytest.mark.parametrize('prototypes', [0, 1])
def test_prototypes_are_several(prototypes):
  c = changed(**{
      'objective.name': 'swav', 'head.predictor_layers': 0,
      'head.prototypes': prototypes,
  })
  with pytest.raises(UserError, match='head.prototypes=.*2 or more'):
    checks.validate(c, 1)


def test_the_only_step_is_no_warm_up():
  c = changed(**{'schedule.steps': 1, 'schedule.warmup_epochs': 1 / 22})
  with pytest.raises(UserError, match='a single step without warm-up'):
    config_lib.plan(c, 1437)
  c.schedule.warmup_epochs = 0.0
  assert config_lib.plan(c, 1437).total_steps == 1


def test_simclr_has_no_predictor():
  c = changed(**{'objective.name': 'simclr'})
  with pytest.raises(UserError, match='predictor_layers=2.*simclr'):
    checks.validate(c, 1)
  c.head.predictor_layers = 0
  checks.validate(c, 1)


@pytest.mark.parametrize('protocol, field, value', [
    ('linear', 'schedule.warmup_epochs', 5.0),
    ('knn', 'knn.more_k', (10.5,)), ('knn', 'knn.more_k', (5, 5)),
])
def test_what_a_protocol_does_not_do_is_refused(protocol, field, value):
  c = evaluation.eval_config()
  c.protocol = protocol
  checks.validate_eval(c, 1)
  c.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=f'{field}=.* is out of range. Allowed'):
    checks.validate_eval(c, 1)


def test_statistics_of_a_probe_need_two_images():
  c = evaluation.eval_config()
  c.protocol, c.batch_size, c.linear.batch_norm = 'linear', 1, True
  with pytest.raises(UserError, match='batch_size=1.*linear.batch_norm'):
    checks.validate_eval(c, 1)
  c.linear.batch_norm = False
  checks.validate_eval(c, 1)


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


def older(**without):
  """The config of a version that lacked some fields."""
  saved = workdir.to_json(changed())
  for field in without:
    group, name = field.split('__')
    del saved[group][name]
  return saved


def test_a_field_that_is_younger_than_a_config_has_its_default():
  saved = older(model__scan=0, data__listing_cache=0)
  found, absent = knobs.completed(saved, config_lib.schema())
  assert absent == ['data.listing_cache', 'model.scan']
  assert found == workdir.to_json(changed())


def test_a_younger_field_may_say_that_its_default_changes_nothing():
  schema = {'seed': knobs.Knob(0), 'cure': knobs.Knob('none', added=True)}
  assert knobs.completed({'seed': 3}, schema) == (
      {'seed': 3, 'cure': 'none'}, ['cure']
  )
  with pytest.raises(UserError, match='lacks fields: seed'):
    knobs.completed({'cure': 'none'}, schema)


@pytest.mark.parametrize('field', ['optimizer.b2', 'knn.k', 'model.name'])
def test_a_config_without_what_steers_a_run_is_refused(field):
  group, name = field.split('.')
  with pytest.raises(UserError, match=f'lacks fields: {field}'):
    knobs.completed(older(**{f'{group}__{name}': 0}), config_lib.schema())


def test_a_field_of_a_later_version_is_refused():
  saved = workdir.to_json(changed())
  saved['model']['rotary'] = True
  with pytest.raises(UserError, match='does not know: model.rotary'):
    knobs.completed(saved, config_lib.schema())


def test_a_run_of_an_earlier_version_is_continued(tmp_path, capsys):
  path = tmp_path / 'run'
  claim(path, changed())
  (path / 'config.json').write_text(json.dumps(older(data__listing_cache=0)))
  claim(path, changed())
  assert 'the defaults for data.listing_cache' in capsys.readouterr().err
  with pytest.raises(UserError, match='knn.k: 200 in the workdir, 5 now'):
    claim(path, changed(**{'knn.k': 5}))


def test_a_run_is_not_prolonged(tmp_path):
  claim(tmp_path / 'run', changed())
  with pytest.raises(UserError, match='cannot be prolonged: the learning rate'):
    claim(tmp_path / 'run', changed(**{'schedule.epochs': 9.0}))


def test_a_run_may_not_go_on_with_other_data(tmp_path):
  data = {'images': 3, 'names_sha256': 'a' * 64, 'test_images': 2,
          'labels_sha256': 'b' * 64}
  def begin(data):
    with workdir.claimed(
        str(tmp_path), changed(), config_lib.schema(), data
    ):
      pass

  begin(data)
  begin(data)
  for field, value in (
      ('images', 4), ('names_sha256', 'c' * 64), ('test_images', 1),
      ('labels_sha256', 'd' * 64),
  ):
    with pytest.raises(UserError, match=f'{field}: .* then, .* now'):
      begin(data | {field: value})
  with pytest.raises(UserError, match='test_images: 2 then, none now'):
    begin({k: v for k, v in data.items() if not k.startswith('test')})


def test_what_an_earlier_version_did_not_note_is_noted(tmp_path, capsys):
  def begin(data):
    with workdir.claimed(
        str(tmp_path), changed(), config_lib.schema(), data
    ):
      pass

  begin({'images': 3})
  begin({'images': 3, 'test_images': 2, 'reading': 2})
  assert 'exact crops' in capsys.readouterr().err.replace('\n', ' ')
  with pytest.raises(UserError, match='test_images: 2 then, 1 now'):
    begin({'images': 3, 'test_images': 1, 'reading': 2})


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
  with workdir.claimed(str(tmp_path), changed(), config_lib.schema()):
    with pytest.raises(UserError, match='in use by another process'):
      claim(tmp_path, changed())
  claim(tmp_path, changed())


def test_only_errors_of_the_file_system_are_blamed_on_the_workdir(tmp_path):
  with pytest.raises(BrokenPipeError), workdir.claimed(
      str(tmp_path), changed(), config_lib.schema()
  ):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
  # It has a message of its own, which the commands give.
  with pytest.raises(OSError, match='No space left'):
    with workdir.claimed(str(tmp_path), changed(), config_lib.schema()):
      raise OSError(errno.ENOSPC, 'No space left')
  with pytest.raises(UserError, match='cannot be written: Read-only'):
    with workdir.claimed(str(tmp_path), changed(), config_lib.schema()):
      raise OSError(errno.EROFS, 'Read-only file system')


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{"seed"')
  with pytest.raises(UserError, match='config.json is damaged'):
    claim(tmp_path, changed())


def test_a_url_is_refused():
  with pytest.raises(UserError, match='is a URL'):
    claim('s3://bucket/run', changed())


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
