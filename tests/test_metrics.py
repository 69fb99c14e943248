"""metrics.jsonl over interruptions, throughput, the progress line."""

import io
import json
import time

from etils import epath
import pytest

from mocov3_jax.runs import metrics
from mocov3_jax.training import progress as progress_lib


def rows(folder):
  return metrics.read_metrics(epath.Path(folder) / 'metrics.jsonl')


def write(folder, start, stop, evaluate_at=()):
  writer = metrics.MetricWriter(epath.Path(folder), start)
  for step in range(start, stop):
    writer.write(step, {'train/loss': float(step)})
    if step + 1 in evaluate_at:
      writer.write(step + 1, {'knn/top1': 0.5})
  return writer


def test_rows_are_flat_json_with_the_step_first(tmp_path):
  write(tmp_path, 0, 2).close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert lines == [
      '{"step": 0, "train/loss": 0.0}', '{"step": 1, "train/loss": 1.0}'
  ]
  assert list((tmp_path / 'tensorboard').iterdir())


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
  writer = write(tmp_path, 0, 1)
  assert len(rows(tmp_path)) == 1
  writer.close()


def test_a_flush_writes_all_that_was_drawn_for_tensorboard(tmp_path):
  writer = metrics.MetricWriter(epath.Path(tmp_path), 0)
  values = {f'value{n:03}': 1.0 for n in range(100)}
  for step in range(5):
    writer.write(step, values)
    writer.flush()
    [path] = (tmp_path / 'tensorboard').iterdir()
    assert path.read_bytes().count(b'value') == 100 * (step + 1)
  writer.close()


def test_continuing_drops_the_rows_that_come_again(tmp_path):
  # Saved after 4 updates and evaluated there; killed during step 6.
  write(tmp_path, 0, 7, evaluate_at=(2, 4, 6)).close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 7, "trai')
  write(tmp_path, 4, 9, evaluate_at=(6, 8)).close()
  straight = tmp_path / 'straight'
  straight.mkdir()
  write(straight, 0, 9, evaluate_at=(2, 4, 6, 8)).close()
  assert rows(tmp_path) == rows(straight)


def test_starting_anew_drops_everything(tmp_path):
  writer = metrics.MetricWriter(epath.Path(tmp_path), 0)
  writer.write(0, {'knn/top1': 0.1})
  writer.close()
  metrics.MetricWriter(epath.Path(tmp_path), 0).close()
  assert rows(tmp_path) == []


def test_first_and_latest_values_survive_a_restart(tmp_path):
  writer = metrics.MetricWriter(epath.Path(tmp_path), 0)
  writer.write(0, {'knn/top1': 0.1})
  writer.write(0, {'train/loss': 3.0})
  writer.write(1, {'knn/top1': 0.2})
  writer.close()
  writer = metrics.MetricWriter(epath.Path(tmp_path), 1)
  assert writer.first['knn/top1'] == 0.1
  assert writer.latest['knn/top1'] == 0.2
  assert writer.latest['train/loss'] == 3.0
  writer.close()


def test_throughput_leaves_out_the_first_step_and_the_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
  throughput = progress_lib.Throughput(10)
  now[0] = 100.0  # Compilation.
  assert throughput.tick() == 0.0 and throughput.average == 0.0
  now[0] = 102.0
  assert throughput.tick() == 5.0
  with throughput.paused():
    now[0] = 152.0
  now[0] = 153.0
  assert throughput.tick() == 10.0
  assert throughput.average == pytest.approx(20 / 3)


VALUES = {
    'train/loss': 3.2, 'train/loss_chance': 4.4, 'knn/top1': 0.75,
    'train/images_per_second': 100.0,
}


def test_progress_prints_plain_lines_when_piped():
  stream = io.StringIO()
  progress = progress_lib.Progress(80, stream)
  progress.update(5, VALUES, 100, '  kNN 75.0%')
  progress.update(6, VALUES, 100)  # Too soon.
  progress.note('done')
  assert stream.getvalue() == (
      'step 5/80  loss 3.2000 (chance 4.4000)  kNN 75.0%  100 img/s  '
      'ETA 0:01:15\ndone\n'
  )


def test_progress_rewrites_its_line_on_a_terminal():
  stream = io.StringIO()
  stream.isatty = lambda: True
  progress_lib.Progress(80, stream).update(5, VALUES, images_per_step=100)
  assert stream.getvalue().startswith('\r') and '\n' not in stream.getvalue()


def test_a_row_is_valid_json(tmp_path):
  write(tmp_path, 0, 3).close()
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    assert next(iter(json.loads(line))) == 'step'
