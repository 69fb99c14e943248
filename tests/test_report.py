"""What a report says of runs, and that it says it in one safe page."""

import csv
import dataclasses
import html
import io
import json
import math
import re

from etils import epath
import fake_runs
from hypothesis import given
from hypothesis import strategies as st
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest
import tiny

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import training as config_lib
from mocov3_jax.reports import charts as report_charts
from mocov3_jax.reports import data, panels, report, tables, thinning, verdict
from mocov3_jax.reports import figure as report_figure
from mocov3_jax.reports import page as report_page
from mocov3_jax.runs import history, workdir

LIMIT = 5_000_000
ODD = '<b>&"\'$x$ %{y} <script><i>'


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
  return fake_runs.sweep(tmp_path_factory.mktemp('report') / 'sweep')


@pytest.fixture(scope='module')
def made(sweep):
  return data.make(map(history.read, history.find([str(sweep)])))


@pytest.fixture(scope='module')
def page(made):
  return report_page.page(made, '2026-01-01')


def load(folders):
  return data.make(map(history.read, history.find(list(map(str, folders)))))


def one(folder, **options):
  """The report of a single run of these rows."""
  lines = fake_runs.rows(**options)
  fake_runs.write(folder, lines, done='diverge_at' not in options)
  return data.make(map(history.read, history.find([str(folder)])))


def charts(page):
  found = re.search(r'type="application/json" id="charts">(.*?)</script>', page)
  return json.loads(found[1])


def plain(page):
  """The page without its script and data."""
  return re.sub(r'<(script|style).*?</\1>', '', page, flags=re.DOTALL)


def test_the_page_is_small_and_loads_nothing(page):
  assert len(page.encode()) < LIMIT
  assert not re.search(r'(src|href|action)\s*=\s*["\']?\s*(https?:)?//', page)
  assert not re.search(r'@import|url\(|<link [^>]*stylesheet', page)
  assert "default-src 'none'" in page


def test_each_run_and_its_status_are_in_the_table(made, page):
  table = plain(page)
  assert len(made.runs) == 12
  for item, row in zip(made.runs, data.table(made), strict=True):
    line = re.search(rf'<tr><th[^>]*>(?:(?!</tr>).)*{item.name}.*', table)[0]
    assert row['status'] in line
    assert verdict.percent(row['knn/top1']) in line
  assert table.count('type="checkbox"') == 12


def test_the_verdict_counts_what_was_planted(made):
  text = verdict.verdict(made).replace('\u00a0', ' ')
  assert '12 runs: 11 done, 1 diverged (lr0.03_learned_1).' in text
  assert '4 of 12 have dips' in text
  assert '16 gradient spikes; 8 of 8 events' in text
  assert 'begin in the patch projection, 3 steps before the last' in text


def test_seeds_are_averaged_setting_by_setting(page):
  assert 'knn, mean' in page and 'linear, mean' in page
  sweep = charts(page)['sweep']
  means = [t for t in sweep['data'] if t['mode'] == 'lines+markers']
  assert [t['name'] for t in means] == [
      'patch_embed frozen: mean', 'patch_embed learned: mean'
  ]
  assert all(t['x'] == [0.001, 0.01, 0.03] for t in means)
  assert sweep['layout']['xaxis']['type'] == 'log'
  assert len(sweep['data']) == 2 + 12


def test_every_kind_of_chart_is_there_with_its_marks(page):
  found = charts(page)
  assert set(found) == {
      'sweep', 'knn', 'loss', 'spread', 'gradients', 'lr', 'rate'
  }
  marks = [t for t in found['knn']['data'] if t['name'].endswith(': dips')]
  assert sum(len(t['x']) for t in marks) == 8
  assert any(t['name'] == 'chance, 10.0\u00a0%' for t in found['knn']['data'])
  marks = [t for t in found['gradients']['data'] if 'spikes' in t['name']]
  assert sorted({x for t in marks for x in t['x']}) == [190, 193, 300, 303]


def test_seeds_share_a_look_and_learned_ones_another_dash(made):
  look = {item.name: (item.color, item.dash) for item in made.runs}
  assert look['lr0.01_learned_0'] == look['lr0.01_learned_1']
  assert look['lr0.01_learned_0'][0] == look['lr0.01_frozen_0'][0]
  assert look['lr0.01_learned_0'][1] != look['lr0.01_frozen_0'][1]
  assert len(set(look.values())) == 6


def test_names_are_shown_and_not_obeyed(tmp_path):
  lines = fake_runs.rows(60)
  for name in ODD, 'plain':
    fake_runs.write(
        tmp_path / name, lines, environment={'jax': ODD},
        **{'data.source': f'folder:{name}'},
    )
  made = data.make(map(history.read, history.find([str(tmp_path)])))
  page = report_page.page(made, '2026-01-01')
  assert ODD not in page and html.escape(ODD) in page
  assert charts(page)['knn']['data'][0]['name'] == ODD
  assert page.count('</script>') == 3
  assert report_figure_size(report_figure.png(made))[0] == 1600


def test_names_that_are_no_text_are_shown_with_question_marks(tmp_path):
  folder = tmp_path / 'run\udce9\n模型'
  made = one(folder, steps=40)
  assert made.runs[0].name == 'run??模型'
  assert 'run??模型' in report_page.page(made, '')
  assert report_figure_size(report_figure.png(made))[0] == 1600


def test_json_cannot_end_its_script():
  value = {'a</script><!--': ['&', '\u2028', '<b>']}
  text = report_page.embedded(value)
  assert not set('<>&') & set(text) and json.loads(text) == value
  with pytest.raises(ValueError):
    report_page.embedded([math.nan])


@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=400),
    st.integers(4, 60),
)
def test_thinning_keeps_the_ends_and_extremes(values, limit):
  values = np.array(values)
  steps = np.arange(len(values)) * 3
  x, y = thinning.thin(steps, values, limit)
  assert len(x) == len(y) == len(values) or len(x) <= limit < len(values)
  assert x[0] == 0 and x[-1] == steps[-1]
  assert y.min() == values.min() and y.max() == values.max()
  assert (np.diff(x) > 0).all() and (values[x // 3] == y).all()


def test_a_spike_in_a_hundred_thousand_steps_is_still_drawn():
  values = np.ones(100_000)
  values[77_777] = 9.0
  x, y = thinning.thin(np.arange(100_000), values, 40)
  assert len(x) <= 40 and y[x == 77_777] == [9.0]


def test_gradients_are_relative_to_their_own_running_median():
  level = np.geomspace(1.0, 100.0, 5000)
  level[2500] *= 8
  ratio = thinning.relative(level)
  assert ratio[2500] == pytest.approx(8, rel=0.05)
  assert np.delete(ratio, 2500)[200:-200] == pytest.approx(1, rel=0.05)


def test_the_csv_has_the_facts_of_the_table(made):
  text = report.as_csv(made)
  assert '\r\n' in text
  read = list(csv.DictReader(io.StringIO(text, newline='')))
  rows = data.table(made)
  # What became of the runs comes first.
  assert list(read[0])[:3] == ['run', 'status', 'collapsed']
  assert list(read[0])[-3:] == [
      'model.patch_embed', 'optimizer.lr_per_256', 'seed'
  ]
  assert len(read) == len(rows) == 12
  for line, row in zip(read, rows, strict=True):
    for key, value in line.items():
      assert value == (str(row[key]) if key in row else '')
  # As they were planted.
  wild, = (r for r in read if r['run'] == 'lr0.01_learned_0')
  assert (wild['status'], wild['dips'], wild['spikes']) == ('done', '2', '4')
  assert (wild['leader'], wild['leader_steps']) == ('patch_embed', '3.0')
  calm, = (r for r in read if r['run'] == 'lr0.01_frozen_1')
  assert (calm['dips'], calm['spikes'], calm['leader']) == ('0', '0', '')


UNLIKE = {
    'model.name': ('vit_s', 'vit_b', 'vit_ti'), 'model.depth': (0, 4, 3),
    'head.out_dim': (256, 128, 64), 'optimizer.lr_per_256': (1e-4, 2e-4, 3e-4),
    'schedule.steps': (0, 600, 600),
}


def unlike(folder):
  """Three runs with little in common."""
  return load(
      fake_runs.write(
          folder / name, fake_runs.rows(600, seed=number),
          **{field: values[number] for field, values in UNLIKE.items()},
      ) for number, name in enumerate(('small', 'large', 'least'))
  )


def test_runs_with_little_in_common_are_called_by_their_names(tmp_path):
  made = unlike(tmp_path)
  assert list(data.settings(made)) == ['small', 'large', 'least']
  text = tables.sweep(made)
  head = re.findall(r'<th scope="col"[^>]*>([^<]*)', text)
  assert head[:6] == ['setting', 'seeds', 'done', 'diverged', 'knn, mean', 'sd']
  assert {'name', 'depth', 'lr_per_256'} < set(head[6:])
  assert '<th scope="row">large</th>' in text


def test_a_zero_that_is_no_number_is_told_as_what_it_stands_for(tmp_path):
  text = tables.configs(unlike(tmp_path))
  assert '<td>as model.name has it</td><td>4</td>' in text
  assert '<td>by epochs</td><td>600</td>' in text


@pytest.mark.parametrize('other, compared', [
    ({'images': 1437, 'classes': 10}, True),
    ({'images': 5000, 'classes': 10}, False),
    ({'images': 1437, 'classes': 10, 'names_sha256': 'ab'}, True),
])
def test_runs_on_different_images_are_not_compared(tmp_path, other, compared):
  made = load(
      fake_runs.write(
          tmp_path / str(rate), fake_runs.rows(100), data=found,
          **{'optimizer.lr_per_256': rate},
      ) for rate, found in ((0.01, None), (0.02, other))
  )
  assert (data.varied(made) is not None) == compared
  assert bool(panels.sweep(made, 100).items) == compared
  assert ('not compared' in verdict.verdict(made)) != compared


def test_accuracy_is_drawn_from_0_to_100_percent(tmp_path):
  made = load(
      fake_runs.write(
          tmp_path / f'{rate}_{seed}', fake_runs.rows(100, final=final),
          seed=seed, **{'optimizer.lr_per_256': rate},
      ) for rate in (0.01, 0.02) for seed, final in enumerate((0.35, 1.0))
  )
  panel = panels.sweep(made, 100)
  errors = [i for i in panel.items if isinstance(i, panels.Line)]
  assert any(max(np.add(i.y, i.errors)) > 1 for i in errors)  # Beyond it.
  layout = report_charts.chart(panel, made.runs)['layout']
  assert layout['yaxis']['autorangeoptions'] == {'clipmin': 0, 'clipmax': 1}
  drawn = Figure().add_subplot()
  report_figure._draw(drawn, panel)
  low, high = drawn.get_ylim()
  assert 0 <= low < high <= 1


def report_figure_size(content):
  image = Image.open(io.BytesIO(content))
  image.load()
  return image.size


def test_the_csv_has_the_last_loss_and_what_needs_no_labels(tmp_path):
  found = {}
  for labels in True, False:
    made = one(tmp_path / str(labels), steps=60, labels=labels)
    found[labels], = csv.DictReader(io.StringIO(report.as_csv(made)))
    last = {k: v for row in fake_runs.rows(60, labels=labels)
            for k, v in row.items()}
    for name in 'train/loss', 'train/loss_chance':
      assert found[labels][name] == str(last[name])
  columns = list(found[False])
  at = columns.index('features/effective_rank')
  assert columns[at:at + 5] == [
      'features/effective_rank', 'features/alignment', 'features/uniformity',
      'train/loss', 'train/loss_chance',
  ]
  assert all(found[False][name] == str(last[name]) for name in columns[at:at+3])
  assert not any(name.startswith('features/') for name in found[True])


def drawn(made):
  """The figure, laid out, and its panels by title."""
  with matplotlib.rc_context(report_figure.STYLE):
    figure = report_figure._figure(made)
    figure.draw_without_rendering()
  return figure, {axes.get_title('left'): axes for axes in figure.axes}


def titles(made):
  return [title.split(' (')[0] for title in drawn(made)[1]]


def test_the_figure_shows_what_the_page_shows_without_labels(tmp_path, made):
  without = one(tmp_path / 'a' / 'run', labels=False)
  assert titles(without)[:2] == ['effective rank of the features', 'loss']
  assert titles(made)[:2] == ['kNN accuracy', 'loss']
  both = data.Report([made.runs[0], without.runs[0]], {}, [])
  assert titles(both)[:3] == [
      'kNN accuracy', 'effective rank of the features', 'loss'
  ]


@pytest.mark.slow
@pytest.mark.parametrize('count', [12, 13])
@pytest.mark.parametrize('ending', ['', '_x' * 100], ids=['short', 'long'])
def test_a_figure_of_runs_with_little_in_common_is_laid_out(
    tmp_path, count, ending
):
  # A warning of matplotlib would be an error here.
  wide = [
      f'augment.{view}.{name}' for view in ('view1', 'view2')
      for name in ('blur_prob', 'crop_min', 'hue', 'contrast', 'gray_prob')
  ]
  for n in range(count):
    fake_runs.write(
        tmp_path / f'run_{n}{ending}',
        fake_runs.rows(40, seed=n, labels=n % 3 > 0), seed=n,
        **{'optimizer.lr_per_256': (n + 1) / 1000},
        **{field: (n + i) % 5 / 10 for i, field in enumerate(wide)},
    )
  made = data.make(map(history.read, history.find([str(tmp_path)])))
  assert report_figure_size(report_figure.png(made))[0] == 1600
  figure, axes = drawn(made)
  sweep = axes['last kNN accuracy, mean and sd']
  said = [text.get_text() for text in sweep.get_legend().get_texts()]
  assert len(said) == 5 and all(text.startswith('run_') for text in said)
  for box in [sweep.get_legend(), *figure.legends, *figure.axes[:4]]:
    box = box.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= 1600 and box.height > 20
  assert sweep.get_window_extent().height > 200
  assert not any('$' in text.get_text() for text in sweep.get_xticklabels())
  assert len(figure.legends) == (count <= report_figure.LEGEND)


def test_settings_are_called_by_their_runs_where_labels_are_too_long(made):
  frozen, learned = 'patch_embed frozen', 'patch_embed learned'
  called = report_figure._setting_names
  assert called(made, len(learned)) == {frozen: frozen, learned: learned}
  # Each is of three rates by two seeds.
  assert called(made, 18) == {
      frozen: 'lr0…n_0 and 5 more', learned: 'lr0…d_0 and 5 more'
  }


def test_a_name_that_is_too_long_keeps_its_ends():
  assert report_figure._fit('abcdefghij', 10) == 'abcdefghij'
  assert report_figure._fit('abcdefghijk', 10) == 'abcd…hijk'


def test_an_evaluation_that_another_replaced_is_counted(tmp_path):
  fake_runs.write(tmp_path / 'run', fake_runs.rows(40), evaluations=[
      ('knn', 0.5), ('linear', 0.9), ('linear', 0.8), ('linear', 0.8),
  ])
  made = data.make(map(history.read, history.find([str(tmp_path)])))
  table = tables.runs(made).replace('\u00a0', ' ')
  assert '>80.0 % (newest of 2)<' in table and '>50.0 %<' in table
  row, = data.table(made)
  assert row['eval_linear/top1'] == 0.8


def test_no_two_columns_of_the_settings_are_called_the_same(tmp_path):
  for seed in range(2):
    fake_runs.write(
        tmp_path / str(seed), fake_runs.rows(40), seed=seed,
        evaluations=[('knn', 0.5)],
    )
  made = data.make(map(history.read, history.find([str(tmp_path)])))
  heads = re.findall(
      '<th scope="col"[^>]*>(.*?)</th>', tables.sweep(made)
  )
  assert [h for h in heads if 'mean' in h] == ['knn, mean', 'eval_knn, mean']
  assert '>eval_knn<' in tables.runs(made)
  assert 'eval_knn/top1' in data.columns(made)


def test_the_figure_has_a_row_for_each_of_the_most_unstable_runs(made):
  width, height = report_figure_size(report_figure.png(made))
  assert width == 1600 and height == 100 * (4.6 + 4 * 2.5)


def test_the_same_runs_give_the_same_bytes(made, page):
  assert report_page.page(made, '2026-01-01') == page
  figure = report_figure.png
  assert figure(made) == figure(made)


@pytest.mark.parametrize('kind', report.FORMATS)
def test_the_suffix_says_the_format(sweep, tmp_path, kind):
  out = tmp_path / f'r.{kind.upper()}'
  told = []
  result = report.report([str(sweep)], str(out), note=told.append)
  assert result == {
      'out': str(out), 'runs': 12, 'diverged': 1, 'dips': 8, 'falls': 0,
      'spikes': 16,
      'bytes': out.stat().st_size,
  }
  assert told and list(tmp_path.iterdir()) == [out]


def test_a_run_without_labels_shows_its_rank_instead(tmp_path):
  page = report_page.page(one(tmp_path / 'run', labels=False), '')
  assert {'rank', 'loss'} <= set(charts(page)) and 'knn' not in charts(page)
  assert 'No kNN accuracy was logged' in page


def test_the_verdict_without_labels_says_whether_a_run_learned(tmp_path):
  rows = fake_runs.rows(steps=200, labels=False)
  for row in rows:
    if 'train/loss' in row:
      row['train/contrast_accuracy'] = 0.75
  fake_runs.write(tmp_path / 'good', rows)
  said = lambda *names: verdict.verdict(data.make(
      map(history.read, history.find([str(tmp_path / n) for n in names]))
  ))
  text = said('good')
  assert 'There are no labels. The network has learned to tell images' in text
  assert 'at chance 4.44; 75.0\u00a0% of the queries find their own key' in text
  assert 'alignment 0.509, at step 0 1 (low is good)' in text
  assert 'uniformity -3.93, at step 0 0 (low is good)' in text
  assert 'high in a random network' in text
  for row in rows:
    if 'train/loss' in row:
      row['train/loss'] = 4.44
  fake_runs.write(tmp_path / 'stuck', rows)
  assert 'has not learned to tell images apart: the loss is 4.44' in (
      said('stuck')
  )
  assert 'Without labels, 1 of 2 have learned' in said('good', 'stuck')
  assert 'not stuck.' in said('good', 'stuck')
  header = report_page.page(one(tmp_path / 'x', labels=False), '')
  assert 'loss (chance)' in header and 'uniformity' in header


def test_a_fall_without_return_is_told_as_one(tmp_path):
  rows = fake_runs.rows(steps=600)
  for row in rows:
    if 'knn/top1' in row and row['step'] > 300:
      row['knn/top1'] -= 0.3 * (row['step'] - 300) / 300
  fake_runs.write(tmp_path / 'run', rows)
  made = data.make(map(history.read, history.find([str(tmp_path / 'run')])))
  text = verdict.verdict(made)
  assert re.search(r'accuracy falls by 2\d\.\d points from step 3\d\d', text)
  assert 'does not recover' in text and 'dip' not in text
  row, = data.table(made)
  assert row['dips'] == 0 and 0.2 < row['fall'] < 0.3
  assert 'fall without recovery' in report_page.page(made, '')


def test_a_run_that_diverged_is_drawn_up_to_there(tmp_path):
  made = one(tmp_path / 'run', diverge_at=305)
  loss = charts(report_page.page(made, ''))['loss']['data'][0]
  assert loss['x'][-1] == 304 and None not in loss['y']
  assert 'The run diverged.' in verdict.verdict(made)
  assert report_figure_size(report_figure.png(made))[0] == 1600


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
  folder = fake_runs.write(tmp_path / 'run', [], done=False)
  (folder / 'data.json').unlink()
  made = data.make(map(history.read, history.find([str(folder)])))
  page = report_page.page(made, '')
  assert charts(page) == {} and 'stopped' in page
  assert report_figure_size(report_figure.png(made))[0] == 1600
  assert len(report.as_csv(made).splitlines()) == 2


def test_a_frozen_projection_has_no_curve_of_gradients(tmp_path):
  page = report_page.page(one(tmp_path / 'run', frozen=True), '')
  names = [t['name'] for t in charts(page)['gradients']['data']]
  assert names == ['block 1', 'last block']


def test_updates_are_above_the_gradients_with_spikes_and_dips(tmp_path):
  page = report_page.page(one(
      tmp_path / 'run', updates=True, spike_at=(200, 300), dip_at=(310,)
  ), '')
  found = charts(page)['updates']['data']
  assert {t['name'] for t in found} == {
      'patch projection', 'last block', 'patch projection: spikes',
      'last block: spikes', 'dips of kNN',
  }
  marks = {t['name']: t['x'] for t in found if t['mode'] == 'markers'}
  assert marks['patch projection: spikes'] == [200, 300]
  assert marks['last block: spikes'] == [203, 303]
  assert len(marks['dips of kNN']) == 1
  assert page.index('plot-updates') < page.index('plot-gradients')
  assert page.count('id="one-run"') == 1


def test_marks_outside_of_a_curve_are_left_out(tmp_path):
  lines = fake_runs.rows(updates=True, spike_at=(200, 500), dip_at=(310,))
  for line in lines:  # Was turned off when the run was continued.
    if line['step'] > 250:
      for name in 'update_rms/patch_embed', 'update_rms/last_block':
        line.pop(name, None)
  fake_runs.write(tmp_path / 'run', lines)
  page = report_page.page(load([tmp_path / 'run']), '')
  found = charts(page)
  marks = {
      t['name']: t['x'] for t in found['updates']['data']
      if t['mode'] == 'markers'
  }
  assert marks['patch projection: spikes'] == [200]
  assert 'dips of kNN' not in marks


def test_one_run_alone_needs_no_comparison(tmp_path):
  made = one(tmp_path / 'run', spike_at=(300,), dip_at=(310,))
  page = report_page.page(made, '')
  assert 'Settings' not in plain(page) and 'Fields that differ' not in page
  text = verdict.verdict(made)
  assert text.startswith('The run is done. Its last kNN accuracy is ')
  assert '1 dip in kNN accuracy' in text and '1 of 1 event' in text


def test_where_runs_ran_is_told_or_said_to_be_unknown(tmp_path, page):
  assert '<td class="wrap">0.10.2</td>' in page
  assert 'Not recorded.' in report_page.page(one(tmp_path / 'run'), '')


def test_heads_keep_the_group_where_the_name_alone_is_not_clear():
  fields = ['augment.view1.hue', 'augment.view2.hue', 'optimizer.name']
  assert data.short(fields) == [*fields[:2], 'name']


@pytest.mark.slow
def test_many_long_runs_still_make_a_small_page(tmp_path):
  layers = [f'block_{i}' for i in range(4)]
  made = one(tmp_path / 'run', steps=5000, layers=layers, spike_at=(2000,))
  item = made.runs[0]
  # 100,000 steps, of few that are made.
  long = {
      name: (np.arange(20 * len(steps)), np.tile(values, 20))
      for name, (steps, values) in item.curves.items()
  }
  assert len(long['train/loss'][0]) == 100_000
  many = data.Report(
      [
          dataclasses.replace(item, name=f'run_{n:020}', curves=long)
          for n in range(50)
      ], {'seed': list(range(50))}, [],
  )
  page = report_page.page(many, '')
  assert len(page.encode()) < LIMIT
  assert len(charts(page)['gradients']['data']) >= 50 * len(layers)


def test_an_evaluation_is_no_run(tmp_path):
  config = workdir.to_json(config_lib.default_config()) | {'protocol': 'knn'}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='evaluation'):
    report.report([str(tmp_path)], str(tmp_path / 'r.html'))
  assert not (tmp_path / 'r.html').exists()


def test_a_run_of_an_earlier_version_stands_beside_one_of_this(tmp_path):
  fake_runs.write(tmp_path / 'new', fake_runs.rows(60))
  old = fake_runs.write(tmp_path / 'old', fake_runs.rows(60)) / 'config.json'
  config = json.loads(old.read_text())
  del config['objective']['queue'], config['model']['patch_embed']
  old.write_text(json.dumps(config))
  for kind in report.FORMATS:
    out = tmp_path / f'r.{kind}'
    report.report([str(tmp_path / n) for n in ('old', 'new')], str(out))
    assert out.stat().st_size
  with (tmp_path / 'r.csv').open(newline='') as file:
    before, now = csv.DictReader(file)
  assert (before['objective.queue'], now['objective.queue']) == ('', '0')
  page = (tmp_path / 'r.html').read_text()
  assert '<th scope="row">objective.queue</th><td>None</td><td>0</td>' in page


def test_the_command_prints_one_object_and_its_progress(sweep, tmp_path):
  out = tmp_path / 'r.csv'
  code, told, progress = tiny.run('report', str(sweep), f'--out={out}')
  assert code == 0, progress
  assert json.loads(told.splitlines()[-1])['runs'] == 12
  assert '12 run(s); ' in progress and out.exists()


def test_static_files_are_part_of_the_package():
  text = epath.Path(tiny.ROOT / 'pyproject.toml').read_text()
  for kind in 'css', 'html', 'js':
    assert (report_page.HERE / f'page.{kind}').exists()
    assert f'"*.{kind}"' in text


def luminance(color):
  parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [
      x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4
      for x in parts
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
  low, high = sorted([luminance(one), luminance(other)])
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('theme', [0, 1], ids=['light', 'dark'])
def test_text_and_curves_stand_out_in_both_themes(theme):
  css = (report_page.HERE / 'page.css').read_text()
  block = css.split(':root')[1 + theme]
  known = dict(re.findall(r'--(\w+): (#\w{6})', block))
  for name in 'text', 'soft', 'good', 'bad', 'busy', 'accent':
    for behind in 'page', 'head':
      assert contrast(known[name], known[behind]) >= 4.5, name
  for color in data.COLORS:
    assert contrast(color, known['page']) >= 3, color


def test_a_table_scrolls_in_its_own_box(made):
  assert tables.runs(made).count('class="scroll" tabindex="0"') == 1


@pytest.mark.parametrize('lowest, drawn', [(0.83, False), (0.3, True)])
def test_a_level_that_would_flatten_the_curves_is_not_drawn(
    tmp_path, lowest, drawn
):
  lines = [
      {'step': 10 * i, 'knn/top1': float(value), 'knn/k': 20}
      for i, value in enumerate(np.linspace(lowest, 0.97, 30))
  ]
  fake_runs.write(tmp_path / 'run', lines)
  found = history.find([str(tmp_path / 'run')])
  made = data.make(map(history.read, found))
  assert data.chances(made) == [0.1 if drawn else None]


def test_a_run_that_ends_below_its_random_network_is_named(tmp_path):
  for name, last in ('falls', 0.7), ('rises', 0.9):
    lines = [
        {'step': 10 * i, 'knn/top1': float(value), 'knn/k': 20}
        for i, value in enumerate(np.linspace(0.72, last, 30))
    ]
    fake_runs.write(tmp_path / name, lines)
  said = lambda *names: verdict.verdict(data.make(
      map(history.read, history.find([str(tmp_path / n) for n in names]))
  ))
  assert 'Less than before training: falls.' in said('falls', 'rises')
  assert 'less than the network had before training' in said('falls')
  assert 'random network' not in said('rises')
