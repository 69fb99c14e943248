"""The scripts that keep the curves of the study's runs and count in them."""

import importlib.util

from etils import epath
import pytest
import tiny

from mocov3_jax.runs import history


def script(name):
  spec = importlib.util.spec_from_file_location(
      name, tiny.ROOT / 'docs' / 'study' / f'{name}.py'
  )
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


def run(seed, rate, frozen=False):
  """A run of twelve blocks, whose first layers may be frozen."""
  layers = ['patch_embed', *(f'block_{i}' for i in range(12)), 'last_block']
  rows = [{'step': 0, 'knn/top1': 0.25}]
  for step in range(60):
    rows.append({'step': step, 'train/loss': 2.0 - step / 1000} | {
        f'grad_max/{layer}': 0.0 if frozen and place < 3 else 0.125
        for place, layer in enumerate(layers)
    })
  return history.Run(
      epath.Path('run'), {'seed': seed, 'optimizer.lr_per_256': rate}, rows,
      'done', {'knn/top1': 0.25}, [],
  )


def test_a_kept_run_is_read_back_by_layers_from_the_lowest_up(tmp_path):
  keep, tables = script('keep'), script('tables')
  keep.keep(run(0, 0.03, frozen=True), tmp_path / 'a.csv.xz')
  found = tables.read(tmp_path / 'a.csv.xz')
  assert [row['step'] for row in found.rows] == list(range(60))
  assert found.rows[0]['knn/top1'] == 0.25
  assert found.rows[59]['train/loss'] == pytest.approx(1.94)
  # Without the last block's number, which is its name as well.
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
