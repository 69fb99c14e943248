"""What gives no number is named: broken images, weights that are not finite.

None of them may vanish from an accuracy.
"""

import json

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
from PIL import Image
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
import tiny

from mocov3_jax import protocols
from mocov3_jax.base.errors import UserError
from mocov3_jax.config.evaluation import eval_config
from mocov3_jax.config.training import schema
from mocov3_jax.evals import extract
from mocov3_jax.evals.features import NonFiniteFeatures
from mocov3_jax.pictures import draw, showing
from mocov3_jax.runs import checkpoints, workdir
from mocov3_jax.training import pretrain
from mocov3_jax.weights import convert

PROTOCOLS = {
    'knn': {}, 'logistic': {},
    'linear': {'schedule.epochs': 1.0, 'linear.lr_per_256': (1.0,)},
    'finetune': {'schedule.epochs': 1.0, 'finetune.rand_augment': 0.0},
}

PICTURES = (
    draw.attention, lambda options: draw.neighbours(options, 2),
    lambda options: draw.embedding(options, 'pca'),
)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  root = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  for split, count in ('train', 16), ('val', 10):
    for shade, name in (60, 'cat'), (180, 'dog'):
      (root / split / name).mkdir(parents=True)
      for number in range(count):
        pixels = rng.normal(shade, 30, (8, 8, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f'{number:02}.png')
  return root


def config(folder, **overrides):
  return tiny.config(**{
      'data.source': f'folder:{folder}', 'data.mean': (0.5,) * 3,
      'data.std': (0.25,) * 3, 'batch_size': 16, 'schedule.epochs': 2.0,
      'augment.view1.blur_sigma': (0.1, 0.5),
      'augment.view2.blur_sigma': (0.1, 0.5), 'knn.every_steps': 2,
      **overrides,
  })


@pytest.fixture(scope='module')
def run(photos, tmp_path_factory):
  path = tmp_path_factory.mktemp('run') / 'run'
  return tiny.random_run(path, config(photos))


@pytest.fixture
def one_broken(photos):
  """A test image is broken, for as long as a test takes."""
  broken = photos / 'val' / 'dog' / '03.png'
  before = broken.read_bytes()
  broken.write_bytes(before[:100])
  yield 'val/dog/03.png'
  broken.write_bytes(before)


@pytest.fixture
def all_broken(photos):
  """All images are broken, for as long as a test takes."""
  before = {path: path.read_bytes() for path in photos.rglob('*.png')}
  for path in before:
    path.write_text('junk')
  yield
  for path, data in before.items():
    path.write_bytes(data)


def evaluate(protocol, checkpoint, out, **overrides):
  c = eval_config()
  c.update_from_flattened_dict({
      'protocol': protocol, 'checkpoint': str(checkpoint), 'batch_size': 16,
      **PROTOCOLS[protocol], **overrides,
  })
  return protocols.evaluate(c, str(out))


@pytest.mark.parametrize('protocol', [
    'knn', 'logistic', pytest.param('linear', marks=pytest.mark.slow),
    pytest.param('finetune', marks=pytest.mark.slow),
])
def test_a_broken_test_image_is_named_and_counted(
    protocol, run, one_broken, tmp_path
):
  found = evaluate(
      protocol, run, tmp_path / 'o', **{'data.max_unreadable': 0.05}
  )
  assert found['unreadable_images'] == 1 and found['test_images'] == 19
  assert set(found['unreadable']) == {one_broken}
  if protocol in ('linear', 'finetune'):
    assert tiny.metrics(tmp_path / 'o')[-1]['test/unreadable'] == 1
    listed = (tmp_path / 'o' / 'bad_images.txt').read_text()
    assert listed.startswith(f'{one_broken}\t')


@pytest.mark.parametrize('protocol', ['knn', 'logistic'])
def test_a_result_has_the_random_networks_beside_it(
    protocol, run, tmp_path, capsys
):
  found = evaluate(protocol, run, tmp_path / 'o')
  random = evaluate(protocol, run, tmp_path / 'r', encoder='random')
  assert found[f'{protocol}/top1_random'] == random[f'{protocol}/top1']
  assert f'{protocol}/top1_random' not in random
  told = 'no more than the random network' in capsys.readouterr().err
  assert told == (found[f'{protocol}/top1'] <= random[f'{protocol}/top1'])


def test_labels_that_are_given_are_used_with_the_runs_own_source(
    run, tmp_path
):
  lines = [
      f'{split}/{name}/{number:02}.png,{"xyz"[number % 3]}'
      for split in ('train', 'val') for name in ('cat', 'dog')
      for number in range(6)
  ]
  csv = tmp_path / 'mine.csv'
  csv.write_text('\n'.join(['path,label', *lines]), encoding='utf-8-sig')
  found = evaluate('knn', run, tmp_path / 'o', **{'data.labels': str(csv)})
  assert (found['classes'], found['test_images']) == (3, 12)
  assert evaluate('knn', run, tmp_path / 'p')['classes'] == 2
  with pytest.raises(UserError, match='nowhere.csv'):
    evaluate('knn', run, tmp_path / 'q', **{'data.labels': '/nowhere.csv'})


def test_an_encoder_that_is_none_is_named(run, tmp_path):
  with pytest.raises(UserError, match="encoder='teacher'.*query.*random"):
    evaluate('knn', run, tmp_path / 'o', encoder='teacher')


def test_random_features_are_extracted_and_drawn(run, tmp_path):
  for encoder in 'query', 'random':
    extract.extract(
        str(run), '', str(tmp_path / f'{encoder}.npz'), batch_size=16,
        encoder=encoder,
    )
  query, random = (
      np.load(tmp_path / f'{e}.npz')['features'] for e in ('query', 'random')
  )
  assert query.shape == random.shape and np.abs(query - random).max() > 1e-4


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_too_many_broken_test_images_end_an_evaluation(
    protocol, run, one_broken, tmp_path
):
  with pytest.raises(UserError, match='1 of 20 images.*max_unreadable=0.01'):
    evaluate(protocol, run, tmp_path / 'o')
  assert not (tmp_path / 'o' / 'result.json').exists()


def test_an_evaluation_says_that_all_could_be_read(run, tmp_path):
  found = evaluate('knn', run, tmp_path / 'o')
  assert found['unreadable_images'] == 0 and 'unreadable' not in found


@pytest.mark.slow
def test_the_monitor_counts_broken_test_images(
    photos, one_broken, tmp_path, capsys
):
  path = tmp_path / 'run'
  pretrain.pretrain(config(photos, **{'data.max_unreadable': 0.05}), str(path))
  rows = [row for row in tiny.metrics(path) if 'knn/top1' in row]
  assert [row['knn/unreadable'] for row in rows] == [1, 1, 1]
  assert capsys.readouterr().err.count(f'unreadable: {one_broken}: ') == 1
  assert one_broken in (path / 'bad_images.txt').read_text()
  # The random network is the run's own, before its first step.
  random = evaluate(
      'knn', path, tmp_path / 'r', encoder='random',
      **{'data.max_unreadable': 0.05},
  )
  assert random['knn/top1'] == rows[0]['knn/top1']
  with pytest.raises(UserError, match='1 of 20 images.*max_unreadable=0.01'):
    pretrain.pretrain(config(photos), str(tmp_path / 'strict'))


@pytest.mark.slow
def test_a_run_whose_test_images_break_saves_before_it_ends(
    photos, tmp_path, monkeypatch
):
  broken = photos / 'val' / 'dog' / '03.png'
  before = broken.read_bytes()
  # Between the first evaluation and the next.
  step = pretrain.train_step

  def breaking(*arguments):
    broken.write_text('junk')  # As the step is traced.
    return step(*arguments)

  monkeypatch.setattr(pretrain, 'train_step', breaking)
  try:
    with pytest.raises(UserError, match='1 of 20 images'):
      pretrain.pretrain(config(photos), str(tmp_path / 'run'))
  finally:
    broken.write_bytes(before)
  saved = [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert saved == ['2']
  monkeypatch.undo()
  result = pretrain.pretrain(config(photos), str(tmp_path / 'run'))
  assert result['step'] == 4


def refuse_to_show(checkpoint, folder, extracted, drawn):
  """Checks that nothing is written, and the messages of extract and visualize.

  Args:
    checkpoint: of a run.
    folder: empty, and so it stays.
    extracted, drawn: patterns of the messages.
  """
  with pytest.raises(UserError, match=extracted):
    extract.extract(str(checkpoint), '', str(folder / 'f.npz'), batch_size=16)
  options = showing.Options(
      str(checkpoint), str(folder / 'p.png'), images=4, batch_size=16
  )
  for picture in PICTURES:
    with pytest.raises(UserError, match=drawn):
      picture(options)
  assert not any(folder.iterdir())


def test_where_no_image_is_left_there_is_no_file(run, all_broken, tmp_path):
  refuse_to_show(
      run, tmp_path, 'none of the 32 images could be read', 'could be read'
  )


def test_extract_names_what_it_leaves_out(run, one_broken, tmp_path, capsys):
  found = extract.extract(str(run), '', str(tmp_path / 'f.npz'), batch_size=16)
  assert found['unreadable'] == 1 and found['images'] == 51
  assert f'unreadable: {one_broken}: ' in capsys.readouterr().err
  with np.load(tmp_path / 'f.npz') as file:
    assert file['classes'].tolist() == ['cat', 'dog']
    assert file['classes'][file['labels'][0]] == file['names'][0].split('/')[1]


def changed(run, path, change):
  """A copy of a run whose checkpoint has other values in one tensor."""
  saved, folder = checkpoints.find(str(run))
  tree = checkpoints.restore_whole(folder)
  flat = flatten_dict({
      name: tree[name] for name in ('params', 'target_params')
  })
  name = ('params', 'backbone', 'blocks_0', 'attn', 'qkv', 'kernel')
  flat[name] = change(np.array(flat[name]))
  c = workdir.read_training_config(saved)
  with workdir.claimed(str(path), c, schema()) as made:
    writer = checkpoints.Checkpoints(epath.Path(made), 1, 0, print)
    writer.save(4, jax.tree.map(np.asarray, unflatten_dict(flat)), {})
    writer.close()
  return path


def nan(values):
  values[0, 0] = np.nan
  return values


def huge(values):
  return np.full_like(values, 1e38)


@pytest.fixture(scope='module')
def with_nan(run, tmp_path_factory):
  return changed(run, tmp_path_factory.mktemp('n') / 'nan', nan)


@pytest.fixture(scope='module')
def overflowing(run, tmp_path_factory):
  return changed(run, tmp_path_factory.mktemp('n') / 'huge', huge)


def test_convert_refuses_weights_that_are_not_finite(run, with_nan, tmp_path):
  with pytest.raises(UserError, match='qkv/kernel holds values that are NaN'):
    convert.convert(str(with_nan), str(tmp_path / 'a.safetensors'))
  good = tmp_path / 'good.safetensors'
  convert.convert(str(run), str(good))
  tensors = load_file(good)
  with safe_open(good, 'numpy') as file:
    described = file.metadata()
  name = next(name for name in tensors if name.endswith('qkv.weight'))
  for value in np.nan, np.inf, -np.inf:
    tensors[name] = tensors[name].copy()
    tensors[name][1, 1] = value
    save_file(tensors, tmp_path / 'bad.safetensors', described)
    for target in 'bad', 'bad.pth':
      with pytest.raises(UserError, match='qkv.weight holds values'):
        convert.convert(
            str(tmp_path / 'bad.safetensors'), str(tmp_path / target)
        )
      assert not (tmp_path / target).exists()


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_no_protocol_takes_what_is_not_finite(
    protocol, with_nan, overflowing, tmp_path
):
  with pytest.raises(UserError, match='qkv/kernel .* holds values'):
    evaluate(protocol, with_nan, tmp_path / 'n')
  assert not (tmp_path / 'n').exists()
  with pytest.raises(NonFiniteFeatures, match='20 of 20 images|32 of 32'):
    evaluate(protocol, overflowing, tmp_path / 'h')
  assert not (tmp_path / 'h' / 'result.json').exists()


def test_nothing_is_drawn_or_extracted_of_what_is_not_finite(
    with_nan, overflowing, tmp_path
):
  for checkpoint in with_nan, overflowing:
    refuse_to_show(checkpoint, tmp_path, *['holds values|are not finite'] * 2)


@pytest.mark.slow
def test_a_monitor_without_labels_does_not_take_what_is_not_finite(
    photos, tmp_path
):
  c = config(photos, **{
      'data.labels': 'none', 'optimizer.lr_per_256': 1e30,
      'schedule.warmup_epochs': 0.0, 'knn.every_steps': 1,
  })
  with pytest.raises(UserError, match='no numbers|diverged'):
    pretrain.pretrain(c, str(tmp_path / 'run'))
  for row in tiny.metrics(tmp_path / 'run'):
    assert all(np.isfinite(value) for value in json.loads(
        json.dumps(row)
    ).values())
