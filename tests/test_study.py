"""The scripts that keep the curves of the study's runs and count in them."""

import importlib.util

from etils import epath
import numpy as np
import pytest
import tiny

from mocov3_jax.runs import history


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch):
  monkeypatch.syspath_prepend(tiny.ROOT / 'docs' / 'study')


def script(name):
  spec = importlib.util.spec_from_file_location(
      name, tiny.ROOT / 'docs' / 'study' / f'{name}.py'
  )
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


def run(seed, rate, frozen=False):
  """A run of twelve blocks, whose first layers may be frozen."""
  layers = ['patch_embed', *(f'block_{i}' for i in range(11)), 'last_block']
  rows = [{'step': 0, 'knn/top1': 0.25}]
  for step in range(60):
    rows.append({'step': step, 'train/loss': 2.0 - step / 1000} | {
        f'grad_max/{layer}': 0.0 if frozen and place < 3 else 2.0**-place
        for place, layer in enumerate(layers)
    })
  return history.Run(
      epath.Path('run'), {'seed': seed, 'optimizer.lr_per_256': rate}, rows,
      'done', {'knn/top1': 0.25}, [],
  )


@pytest.mark.parametrize('twice', [False, True])
def test_a_kept_run_is_read_back_by_layers_from_the_lowest_up(tmp_path, twice):
  keep, tables = script('keep'), script('tables')
  made = run(0, 0.03, frozen=True)
  if twice:  # The last block by its number as well.
    for row in made.rows[1:]:
      row['grad_max/block_11'] = row['grad_max/last_block']
  keep.keep(made, tmp_path / 'a.csv.xz')
  found = tables.read(tmp_path / 'a.csv.xz')
  assert [row['step'] for row in found.rows] == list(range(60))
  assert found.rows[0]['knn/top1'] == 0.25
  assert found.rows[59]['train/loss'] == pytest.approx(1.94)
  assert [x for x in found.rows[0] if x.startswith('grad_max/')] == [
      'grad_max/patch_embed', *(f'grad_max/block_{i}' for i in range(11)),
      'grad_max/last_block',
  ]
  assert tables.lowest(found) == 'block_2'


def test_runs_are_grouped_by_all_but_their_seed(tmp_path, capsys):
  keep, tables = script('keep'), script('tables')
  for seed, rate in ((0, 0.03), (1, 0.03), (0, 0.1)):
    keep.keep(run(seed, rate), tmp_path / f'{seed},{rate}.csv.xz')
  tables.main(str(tmp_path))
  lines = capsys.readouterr().out.splitlines()
  assert [line.split('|')[1:3] for line in lines[2:]] == [
      [' lr_per_256 0.03 ', ' 2 '], [' lr_per_256 0.1 ', ' 1 ']
  ]


def test_ends_lows_and_highest_updates_are_of_each_run(tmp_path, capsys):
  keep, tables = script('keep'), script('tables')
  for seed, end in ((0, 0.9), (1, 0.5)):
    one = run(seed, 0.1)
    one.rows.extend([
        {'step': 50, 'knn/top1': 0.3 + seed / 10, 'update_rms/patch_embed': 1},
        {'step': 60, 'knn/top1': end, 'update_rms/patch_embed': 2.0 + seed},
    ])
    keep.keep(one, tmp_path / f'{seed}.csv.xz')
  tables.main(str(tmp_path))
  line = capsys.readouterr().out.splitlines()[-1].split('|')
  assert [cell.strip() for cell in line[3:8]] == [
      '70.0 ± 28.3', '90.0, 50.0', '30.0, 40.0', '2.0, 3.0', '50.0, 50.0'
  ]


def noisy(level, noise, count, seed):
  rng = np.random.default_rng(seed)
  return level * np.exp(noise * rng.standard_normal(count))


def test_a_rise_of_the_loss_is_told_by_the_steps_before_it():
  lead = script('lead')
  loss = noisy(2.0, 0.02, 4000, 0)
  assert lead.rises(loss) == []
  loss[1000:1015] += 0.5
  loss[1030:1032] += 0.5
  loss[2000:] += 1.0  # A new level is one rise.
  assert lead.rises(loss) == [1000, 1030, 2000]


def test_what_comes_before_a_rise_is_measured_beside_chance(tmp_path, capsys):
  keep, lead = script('keep'), script('lead')
  loss = noisy(2.0, 0.02, 2000, 0)
  values = {
      name: noisy(0.1, 0.1, 2000, seed) for seed, name in enumerate((
          'grad_max/patch_embed', 'grad_max/block_0', 'grad_max/last_block',
          'update_rms/patch_embed', 'update_rms/block_0',
      ))
  }
  for step, up in ((500, 0.4), (900, 2.0), (1300, 0.4), (1700, 2.0)):
    loss[step:step + 7] += up
    values['grad_max/patch_embed'][step - 5:step + 7] *= 9
    values['grad_max/block_0'][step:step + 7] *= 20  # After it.
    values['update_rms/patch_embed'][step - 2:step] *= 4
  values['update_rms/block_0'][910] = 9.0  # In the second rise, not after it.
  values['update_rms/block_0'][1000] = 3.0
  values['update_rms/block_0'][1500] = 8.0  # After a small rise.
  values['update_rms/patch_embed'][1950] = 5.0
  rows = [
      {'step': i, 'train/loss': x, 'knn/top1': 0.5}
      | {name: those[i] for name, those in values.items()}
      for i, x in enumerate(loss)
  ]
  keep.keep(history.Run(
      epath.Path('run'), {'seed': 0}, rows, 'done', {}, []
  ), tmp_path / 'a.csv.xz')
  lead.main(str(tmp_path))
  every, large = (
      [cell.strip() for cell in line.split('|')[1:-1]]
      for line in capsys.readouterr().out.splitlines()[2:]
  )
  (
      rises, *sizes, gradients, chance, highest, earlier, rms, by_chance,
      rms_highest, itself, _, _,
  ) = every[3:]
  height = dict(cell.split() for cell in gradients.split(', '))
  assert every[1:3] == ['1', '2000'] and rises == '4'
  assert sizes == ['2', '2', '2']
  assert float(height['patch_embed']) == pytest.approx(9, rel=0.2)
  assert float(height['block_0']) == pytest.approx(1, abs=0.2)
  assert float(earlier.split(', ')[0].split()[1]) == pytest.approx(9, rel=0.2)
  assert float(chance) < 1.5 and float(by_chance) < 1.5
  assert highest == rms_highest == 'patch_embed 4'
  assert float(rms.split(', ')[0].split()[1]) == pytest.approx(4, rel=0.2)
  assert itself.startswith('patch_embed 0.4')
  assert large[3] == '2' and large[9] == 'patch_embed 2'
  assert large[-2:] == ['0.1, 9.0', '3.0, 5.0']


def test_a_layer_that_does_not_learn_leads_nothing():
  lead = script('lead')
  assert [*lead.curves(run(0, 0.03, frozen=True))][0] == 'grad_max/block_2'


def test_what_comes_after_a_run_has_fallen_is_left_out():
  tables = script('tables')
  rows = [{'step': i, 'train/loss': 1.0} for i in range(100)]
  for step, knn in ((0, 0.8), (20, 0.9), (40, 0.5), (60, 0.85), (80, 0.3)):
    rows[step]['knn/top1'] = knn
  fallen = history.Run(epath.Path('run'), {}, rows, 'done', {}, [])
  # The rise of the loss with which it falls lies between 60 and 80.
  assert [row['step'] for row in tables.lived(fallen).rows] == [*range(81)]


def marked(tmp_path, text):
  """Two planted spikes of 9 times, in a run that is kept, and some marks."""
  gradient = noisy(0.1, 0.1, 1000, 1)
  for step in 500, 700:
    gradient[step:step + 12] *= 9
  rows = [
      {'step': i, 'train/loss': 2.0, 'grad_max/patch_embed': g,
       'grad_max/block_0': b, 'grad_max/last_block': 2 * b}
      for i, (g, b) in enumerate(zip(
          gradient, noisy(0.1, 0.1, 1000, 2), strict=True
      ))
  ]
  script('keep').keep(history.Run(
      epath.Path('a'), {'seed': 0}, rows, 'done', {}, []
  ), tmp_path / 'a.csv.xz')
  (tmp_path / 'marks.csv').write_text('run,layer,first,last\n' + text)


@pytest.mark.parametrize('text, counts', [
    ('a,patch_embed,498,515\na,patch_embed,700,711\n', [2, 2, 2, 2, 2, 2, 0]),
    ('a,patch_embed,498,515\n', [1, 1, 1, 1, 1, 2, 1]),  # One is a false alarm,
    ('a,,,\n', [0, 0, 0, 0, 0, 2, 2]),  # both are.
    # The marks of block_0 are too small to be missed.
    ('a,patch_embed,498,711\na,block_0,600,620\na,block_0,500,511\n',
     [3, 1, 1, 1, 1, 2, 0]),
    ('a,patch_embed,480,515\n', [1, 1, 1, 0, 1, 2, 1]),  # Known too late.
    ('a,?,600,1000\n', [0, 0, 0, 0, 0, 1, 1]),
])
def test_what_is_found_is_compared_with_marks(tmp_path, capsys, text, counts):
  marked(tmp_path, text)
  steps = 600 if '?' in text else 1000
  script('recall').main(str(tmp_path / 'marks.csv'), str(tmp_path))
  lines = capsys.readouterr().out.splitlines()
  expected = [*map(str, counts), f'{4000 * counts[-1] / steps:.1f}']
  for line, name in zip(lines[2:], ('a', 'all'), strict=True):
    assert [cell.strip() for cell in line.split('|')[1:-1]] == [name, *expected]


def test_a_large_mark_in_which_nothing_is_found_is_missed():
  recall = script('recall')
  gradient = noisy(0.1, 0.1, 1000, 1)
  gradient[500:600] *= 9  # A new level is no spike.
  rows = [
      {'step': i, 'grad_max/patch_embed': g} for i, g in enumerate(gradient)
  ]
  assert recall.compare(
      rows, [recall.Mark('patch_embed', 500, 600)]
  ) == [1, 1, 0, 0, 0, 0, 0]


def test_curves_are_aligned_to_steps_and_to_their_past():
  lead = script('lead')
  curve = np.zeros(400)
  curve[:250] = 1.0
  curve[299] = 3.0  # One step before 300, over a past of steps at 1 and at 0.
  found = lead.aligned(curve, [300], np.array([-2, -1, 0, 1000]))
  np.testing.assert_array_equal(found, [[-1.0, 2.0, -1.0, -1.0]])
  assert lead.heights(curve, [300]) == [2.0]


def test_the_figure_is_drawn(tmp_path):
  keep, figure = script('keep'), script('figure')
  for seed, projection in ((0, 'learned'), (1, 'learned'), (0, 'frozen')):
    one = run(seed, 0.1, projection == 'frozen')
    one.config['model.patch_embed'] = projection
    keep.keep(one, tmp_path / f'{seed},{projection}.csv.xz')
  # One run has a rise of the loss, the others have none.
  layers = {x: v for x, v in run(0, 0.1).rows[1].items() if 'grad_max' in x}
  lasting = [
      {'step': i, 'train/loss': x, 'knn/top1': 0.5} | layers
      for i, x in enumerate([2.0] * 300 + [3.0] * 100)
  ]
  keep.keep(history.Run(
      epath.Path('run'),
      {'seed': 2, 'optimizer.lr_per_256': 0.1, 'model.patch_embed': 'learned'},
      lasting, 'done', {}, [],
  ), tmp_path / '2.csv.xz')
  figure.main(str(tmp_path / 'a.png'), str(tmp_path))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_each_variant_has_a_panel_and_the_best_comes_first(tmp_path):
  keep, variants = script('keep'), script('variants')
  plain = {
      'model.patch_embed': 'learned', 'model.frozen_blocks': 0,
      'optimizer.update_clip': 0.0, 'optimizer.b2': 0.999,
  }
  changes = {
      'learned': {}, 'learned, b2 0.95': {'optimizer.b2': 0.95},
      'learned, update_clip 1': {'optimizer.update_clip': 1.0},
      'frozen, block 0 frozen': {
          'model.patch_embed': 'frozen', 'model.frozen_blocks': 1,
      },
  }
  ends = dict(zip(changes, (0.2, 0.5, 0.9, 0.7), strict=True))
  for name, change in changes.items():
    for rate in 0.03, 0.1:
      one = run(0, rate)
      one.config.update(plain | change)
      one.rows.append({'step': 60, 'knn/top1': ends[name]})
      keep.keep(one, tmp_path / f'{rate},{name}.csv.xz')
  panels = variants.panels([str(tmp_path)])
  assert [(title, len(runs)) for title, runs in panels] == [
      ('learned, update_clip 1', 1), ('frozen, block 0 frozen', 1),
      ('learned, b2 0.95', 1), ('learned', 1),
  ]
  variants.main(str(tmp_path / 'a.png'), str(tmp_path))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_the_edge_is_printed_and_drawn_for_each_method(tmp_path, capsys):
  keep, edge = script('keep'), script('edge')
  knn = {  # By rate: learned and frozen, of two seeds.
      0.01: ((0.95, 0.97), (0.96, 0.96)), 0.1: ((0.5, 0.7), (0.9, 0.94)),
  }
  for method in 'byol', 'simclr':
    for rate, pair in knn.items():
      for projection, ends in zip(('learned', 'frozen'), pair, strict=True):
        for seed, end in enumerate(ends):
          one = run(seed, rate, projection == 'frozen')
          one.rows.append({'step': 60, 'knn/top1': end})
          one.config['model.patch_embed'] = projection
          one.config['objective.name'] = method
          name = f'{method},{rate},{projection},{seed}.csv.xz'
          keep.keep(one, tmp_path / name)
  edge.main(str(tmp_path / 'a.png'), str(tmp_path))
  lines = capsys.readouterr().out.splitlines()[2:]
  assert [[x.strip() for x in line.split('|')[1:-1]] for line in lines] == [
      [method, *cells] for method in ('byol', 'simclr') for cells in (
          ['0.01', '96.0 ± 1.4', '0.0', '96.0 ± 0.0', '0.0', '+0.0'],
          ['0.1', '60.0 ± 14.1', '36.0', '92.0 ± 2.8', '4.0', '+32.0'],
      )
  ]
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_the_edge_is_the_lowest_rate_at_which_learned_has_fallen():
  edge = script('edge')
  def runs(*ends):
    return edge.methods([
        history.Run(
            epath.Path('run'), {
                'model.patch_embed': 'learned', 'objective.name': 'byol',
                'optimizer.lr_per_256': rate,
            }, [{'step': 0, 'knn/top1': end}], 'done', {}, [],
        ) for rate, end in enumerate(ends)
    ])['byol']
  assert edge.edge(runs(0.95, 0.94, 0.92, 0.5), [0, 1, 2, 3]) == 2
  assert edge.edge(runs(0.95, 0.94, 0.94), [0, 1, 2]) == 2


def test_most_of_what_a_person_marked_is_found_and_little_else(capsys):
  study = tiny.ROOT / 'docs' / 'study'
  script('recall').main(str(study / 'marks.csv'), str(study / 'rates'))
  *_, line = capsys.readouterr().out.splitlines()
  large, found, _, at_once, _, _, false = map(float, line.split('|')[3:-1])
  assert large >= 100
  assert found >= 0.85 * large  # With four standard deviations, 0.75.
  assert at_once >= 0.95 * found
  assert false <= 1  # In 4,000 steps.
