"""Every recipe runs, small, and can be built, full-size."""

import jax
import numpy as np
import photos
import pytest
from test_house_rules import RECIPES, ROOT, recipe
import tiny

from mocov3_jax.config import knobs
from mocov3_jax.config import training as config_lib
from mocov3_jax.method.build import build_method
from mocov3_jax.method.train_step import init_state
from mocov3_jax.training import flops, pretrain
from mocov3_jax.weights import state_dict

# One continues a run, which it is given: see tests/test_initial.py.
TRAINING = [
    p for p in RECIPES
    if not p.stem.startswith('eval_') and p.stem != 'continue'
]


def loaded(path):
  """The recipe's config, as overrides on the command line would find it."""
  return recipe(path).get_config()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('tiles')
  photos.write_tiles(path, tile=40, each=4)
  return path


def shrunk(c, folder):
  """The same recipe at a size that a CPU trains in a second."""
  with c.unlocked():
    c.batch_size = 8
    c.schedule.steps, c.schedule.warmup_epochs = 2, 0.0
    c.head.hidden_dim, c.head.out_dim = 16, 8
    c.knn.every_steps = 0
    c.model.dim = 8 if c.model.name.startswith('resnet') else 32
    if c.model.name.startswith('vit'):
      c.model.depth, c.model.num_heads = 1, 2
    if c.data.source != 'digits':
      c.data.source = f'folder:{folder}'
      c.data.image_size = 2 * c.model.patch_size
    for view in c.augment.view1, c.augment.view2:
      view.blur_sigma = (0.1, 0.5)  # The longest kernel must fit.
  return c


# Most of the time goes into compiling much the same again; the other tests
# train with the recipe of digits.
@pytest.mark.slow
@pytest.mark.parametrize('path', TRAINING, ids=lambda p: p.stem)
def test_a_recipe_runs_two_steps(path, folder, tmp_path):
  config = shrunk(loaded(path), folder)
  result = pretrain.pretrain(config, str(tmp_path / 'run'))
  assert result['step'] == 2
  rows = tiny.metrics(tmp_path / 'run')
  assert all(np.isfinite(r['train/loss']) for r in rows if 'train/loss' in r)


@pytest.mark.parametrize('path', TRAINING, ids=lambda p: p.stem)
def test_a_recipe_can_be_built_full_size(path):
  c = loaded(path)
  method = build_method(c, config_lib.plan(c, 100_000))
  shape = (c.data.image_size, c.data.image_size, len(c.data.mean))
  state = jax.eval_shape(
      lambda: init_state(method, jax.random.key(0), shape)
  )
  # bfloat16 is for arithmetic; what is kept is float32.
  for tree in state.params, state.target_params, state.batch_stats:
    # SwAV's heads have no BatchNorm, so no statistics.
    assert {x.dtype.name for x in jax.tree.leaves(tree)} <= {'float32'}


@pytest.mark.parametrize(
    'name, millions, gmacs',
    [
        ('vit_s16', 22, 4.6), ('vit_b16', 86, 17.5),
        ('vit_l16', 304, 61.3), ('vit_h14', 632, 166.7),
    ],
)
def test_sizes_are_those_of_the_papers_table(name, millions, gmacs):
  path = next(p for p in RECIPES if p.stem == name)
  c = loaded(path)
  method = build_method(c, config_lib.plan(c, 100_000))
  # The paper counts the last block in full, the classifier and the positions.
  whole = method.model.backbone.clone(scan=True)
  found = flops.network_cost(
      method.model.clone(backbone=whole), (224, 224, 3)
  )
  width = whole.dim
  parameters = found.backbone + 1000 * (width + 1)
  parameters += state_dict.position_table(c).size
  assert parameters == pytest.approx(millions * 1e6, rel=0.01)
  assert found.macs == pytest.approx(gmacs * 1e9, rel=0.01)


def test_an_epoch_count_that_is_no_row_is_named():
  path = next(p for p in RECIPES if p.stem == 'resnet50')
  code, _, err = tiny.call(
      'train', f'--config={path}:90', '--workdir=/nonexistent'
  )
  assert code == 2
  assert '100, 300, 800, 1000' in err


@pytest.mark.parametrize('method', ['moco_v3', 'simclr', 'byol', 'swav'])
def test_the_instability_recipe_is_that_of_digits_but_for_what_it_says(method):
  flat = {
      name: knobs.flatten(
          recipe(ROOT / f'configs/{name}.py').get_config(method).to_dict()
      ) for name in ('digits', 'instability')
  }
  differ = {
      field for field, value in flat['digits'].items()
      if flat['instability'][field] != value
  }
  assert differ == {
      'model.patch_embed', 'optimizer.lr_per_256', 'optimizer.b2',
      'schedule.epochs', 'schedule.warmup_epochs', 'knn.every_steps',
      'log.blocks', 'log.updates', 'save.every_steps',
  }
