"""Files that strangers made: what they must not reach, and what they may cost.

Each kind is described in docs/security.md.
"""

import csv
import io
import json
import os
import pathlib
import resource
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib

from etils import epath
import fake_runs
import numpy as np
from PIL import Image
import pytest
import tiny

from mocov3_jax.base import console, files
from mocov3_jax.base.errors import UserError
from mocov3_jax.data import decode
from mocov3_jax.evals.features import ReadingLog
from mocov3_jax.parallel import processes
from mocov3_jax.reports import charts as report_charts
from mocov3_jax.reports import data, panels, report
from mocov3_jax.runs import history, metrics, workdir
from mocov3_jax.sources import folder, listing

ESCAPE = 'x\x1b]0;title\x07'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """One that `train` with `tiny.flags` goes on with."""
  path = tmp_path_factory.mktemp('hostile') / 'run'
  config = runpy.run_path(tiny.ROOT / 'configs' / 'digits.py')['get_config']()
  config.update_from_flattened_dict(tiny.flat_overrides())
  return tiny.random_run(path, config)


# --- Links, pipes and devices ----------------------------------------------

OWN = (
    'config.json', 'results.jsonl', 'data.json', 'environment.json',
    'metrics.jsonl', 'result.json', 'bad_images.txt', '.lock', 'tensorboard',
    'checkpoints/4/state/planted', 'network', 'anything',
)
KNN = '--config=configs/eval_knn.py'


def test_a_number_of_four_hundred_digits_is_no_result(tmp_path):
  run = fake_runs.write(
      tmp_path / 'run', fake_runs.rows(), evaluations=[
          ('knn', 10**400), ('logistic', 0.9),
      ]
  )
  found = history.read(epath.Path(run)).evaluations
  assert [line['protocol'] for line in found] == ['logistic']


@pytest.mark.parametrize('kind', ['link', 'pipe'])
@pytest.mark.parametrize('name', OWN)
def test_a_run_that_leads_elsewhere_is_refused_and_nothing_is_written(
    run, tmp_path, name, kind
):
  mine, secret = tmp_path / 'run', tmp_path / 'secret'
  shutil.copytree(run, mine)
  secret.write_text('{"secret": 1}\n')
  planted = mine / name
  planted.unlink(missing_ok=True)
  if kind == 'link':
    planted.symlink_to(secret)
  else:
    os.mkfifo(planted)
  for command, flags in (
      ('evaluate', [KNN, f'--config.checkpoint={mine}',
                    f'--workdir={tmp_path / "knn"}']),
      ('extract', [f'--checkpoint={mine}', f'--out={tmp_path / "f.npz"}']),
      ('convert', [f'--from={mine}', f'--to={tmp_path / "w.safetensors"}']),
      ('report', [str(mine), f'--out={tmp_path / "r.html"}']),
      ('train', [f'--workdir={mine}', *tiny.flags()]),
  ):
    code, out, err = tiny.call(command, *flags)
    assert code == 2 and out == '' and 'Traceback' not in err, (command, err)
    assert 'secret": 1' not in err
  assert secret.read_text() == '{"secret": 1}\n'
  assert not {'f.npz', 'w.safetensors', 'r.html'} & {
      p.name for p in tmp_path.iterdir()
  }


def test_a_run_that_removes_files_meanwhile_is_read(run, tmp_path, monkeypatch):
  mine = tmp_path / 'run'
  shutil.copytree(run, mine)
  scan, gone = os.scandir, []

  def vanishing(path):
    if not gone and 'checkpoints' in str(path):
      gone.append(path)
      shutil.rmtree(path)
    return scan(path)

  monkeypatch.setattr(os, 'scandir', vanishing)
  files.require_plain(files.absolute(str(mine)))
  assert gone


def test_a_workdir_that_is_reached_by_a_link_is_fine(run, tmp_path):
  (tmp_path / 'linked').symlink_to(run)
  code, _, err = tiny.call(
      'extract', f'--checkpoint={tmp_path / "linked"}',
      f'--out={tmp_path / "f.npz"}',
  )
  assert code == 0, err


def test_a_file_is_written_under_a_name_that_nobody_knew(tmp_path):
  target, precious = tmp_path / 'r.html', tmp_path / 'precious'
  precious.write_text('mine')
  target.symlink_to(precious)
  with files.open_whole(target) as file:
    (part,) = [p for p in tmp_path.iterdir() if p.name.endswith('.part')]
    assert len(part.name) > 20 and not part.is_symlink()
    file.write(b'new')
  # What the link pointed to is not touched; the link is replaced.
  assert precious.read_text() == 'mine' and not target.is_symlink()
  assert target.read_text() == 'new'
  with pytest.raises(RuntimeError), files.open_whole(target):
    raise RuntimeError
  assert target.read_text() == 'new'
  assert {p.name for p in tmp_path.iterdir()} == {'r.html', 'precious'}


def test_a_folder_of_images_may_hold_links(tmp_path):
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / 'b.png').symlink_to(tmp_path / 'a.png')
  source = folder.load(str(tmp_path / 'set'), 'none', None).train
  assert decode.Encoded(source.read(0)).width == 9


def test_a_pipe_in_place_of_an_image_does_not_hang(tmp_path):
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  source = folder.load(str(tmp_path), 'none', None).train
  (tmp_path / 'a.png').unlink()
  os.mkfifo(tmp_path / 'a.png')
  with pytest.raises(decode.Unreadable, match='no regular file'):
    source.read(0)


# --- Work before a bound ---------------------------------------------------

def png(width, height):
  """A PNG of black pixels, 1 bit each: small, however large it is."""
  def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack(
        '>I', zlib.crc32(kind + content)
    )

  pack = zlib.compressobj(9)
  line = bytes(1 + (width + 7) // 8)
  content = b''.join(pack.compress(line) for _ in range(height)) + pack.flush()
  header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(
      b'IDAT', content
  ) + chunk(b'IEND', b'')


def progressive(scans, side=64):
  """A progressive JPEG whose last scan comes again and again."""
  file = io.BytesIO()
  Image.new('L', (side, side), 128).save(file, 'JPEG', progressive=True)
  data = file.getvalue()
  last = data.rindex(decode.SCAN)
  return data[:-2] + data[last:-2] * scans + data[-2:]


@pytest.mark.parametrize('content, words', [
    (png(13370, 13370), 'pixels'),
    (progressive(100), 'scans'),
    (progressive(50, 5000), 'scans'),
])
def test_an_image_that_asks_for_minutes_is_unreadable_at_once(content, words):
  start = time.process_time()
  with pytest.raises(decode.Unreadable, match=words):
    decode.Encoded(content)
  assert time.process_time() - start < 5  # 10 s and more before.


def test_images_below_the_limits_are_read():
  assert decode.Encoded(png(5000, 5000)).width == 5000
  assert decode.Encoded(progressive(10)).pixels().shape == (64, 64, 3)


def test_a_file_without_end_is_unreadable_and_named(tmp_path, capsys):
  Image.new('RGB', (9, 9)).save(tmp_path / 'b.png')
  (tmp_path / 'a.png').touch()
  os.truncate(tmp_path / 'a.png', 20 * 2**30)
  source = folder.load(str(tmp_path), 'none', None).train
  with pytest.raises(decode.Unreadable, match='21,474,836,480 bytes'):
    source.read(0)
  ReadingLog().readable(source, np.array([0, -1]))
  assert 'unreadable: a.png: 21,474,836,480' in capsys.readouterr().err


def test_one_long_path_does_not_make_all_long(tmp_path):
  for number in range(200):
    (tmp_path / f'{number}.png').touch()
  deep = tmp_path / '/'.join(['d' * 100] * 9)
  deep.mkdir(parents=True)
  (deep / 'x.png').touch()
  found = listing.walk(os.fsencode(tmp_path))
  assert len(found.paths) == 201 and max(map(len, found.paths)) > 900
  assert found.paths.nbytes < 201 * 20


def test_long_lines_and_many_names_in_metrics_have_a_bound(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  row = b'{"step": 1, "train/loss": 2.0}\n'
  long = b'{"x": "' + b'y' * 2**22 + b'"}\n'
  path.write_bytes(row + long + row + b'z' * 2**22)
  assert [r['step'] for r in metrics.read_metrics(path)] == [1, 1]
  path.write_text(''.join(
      json.dumps({'step': n, f'grad_max/{n}': 1.0}) + '\n'
      for n in range(metrics.MOST_NAMES + 10)
  ))
  with pytest.raises(UserError, match='metrics, which no run logs'):
    metrics.read_metrics(path)


def test_a_json_file_without_end_is_refused(run, tmp_path):
  mine = tmp_path / 'run'
  shutil.copytree(run, mine)
  os.truncate(mine / 'config.json', 2**34)
  with pytest.raises(UserError, match='has 17,179,869,184 bytes'):
    workdir.read_config(mine)


@pytest.mark.parametrize('field, value', [
    ('depth', 10**9), ('dim', 10**12), ('patch_size', 'x'), ('name', [1]),
])
def test_a_network_without_end_is_refused(run, tmp_path, field, value):
  mine = tmp_path / 'run'
  shutil.copytree(run, mine)
  c = json.loads((mine / 'config.json').read_text())
  c['model'][field] = value
  (mine / 'config.json').write_text(json.dumps(c))
  code, _, err = tiny.call(
      'extract', f'--checkpoint={mine}', f'--out={tmp_path / "f.npz"}'
  )
  assert code == 2 and f'model.{field}=' in err, err


# --- Formats ---------------------------------------------------------------

def test_only_the_documented_formats_are_tried(tmp_path, monkeypatch):
  gs = tmp_path / 'gs'
  gs.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexit 1\n')
  gs.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  eps = (
      b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n'
      b'showpage\n%%EOF\n'
  )
  with pytest.raises(decode.Unreadable, match='not an image'):
    decode.Encoded(eps)
  assert not (tmp_path / 'called').exists()


@pytest.mark.parametrize('kind', ['TGA', 'ICO', 'PCX', 'SGI'])
def test_other_formats_by_the_name_of_an_image_are_no_images(kind):
  file = io.BytesIO()
  Image.new('RGB', (32, 32)).save(file, kind)
  with pytest.raises(decode.Unreadable):
    decode.Encoded(file.getvalue())


# --- Texts that mean something ---------------------------------------------

@pytest.mark.parametrize('text, expected', [
    ('plain é 漢字 🙂', 'plain é 漢字 🙂'), ('a\nerror: b', 'a\\nerror: b'),
    ('\x1b[31m', '\\x1b[31m'), ('a\rb\x07', 'a\\rb\\x07'),
    ('\u202egnp.exe', '\\u202egnp.exe'), ('\udc80', '\\udc80'),
    ('\x9b1m', '\\x9b1m'),
])
def test_a_name_is_shown_as_one_printable_line(text, expected):
  assert console.shown(text) == expected


def test_no_name_steers_the_terminal(tmp_path, capsys):
  (tmp_path / 'i').mkdir()
  (tmp_path / 'i' / f'{ESCAPE}\nerror: forged.png').write_bytes(b'')
  Image.new('RGB', (9, 9)).save(tmp_path / 'i' / 'z.png')
  ReadingLog().readable(
      folder.load(str(tmp_path / 'i'), 'none', None).train, np.array([0, -1])
  )
  said = capsys.readouterr().err
  assert '\x1b' not in said and '\\x1b]0;title\\x07\\nerror: forged' in said
  assert not any(line.startswith('error') for line in said.splitlines())
  # Tensors of a file, and folders of runs.
  header = json.dumps({
      ESCAPE: {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}
  }).encode()
  weights = tmp_path / 'w.safetensors'
  weights.write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
  bad = tmp_path / 'runs' / ESCAPE
  bad.mkdir(parents=True)
  (bad / 'config.json').write_text('{')
  (bad / 'metrics.jsonl').touch()
  for command, flags in (
      ('convert', [f'--from={weights}', f'--to={tmp_path / "o"}']),
      ('report', [str(bad.parent), f'--out={tmp_path / "r.html"}']),
  ):
    code, out, err = tiny.call(command, *flags)
    assert code == 2 and '\x1b' not in out + err and 'x1b' in err, err


def test_cells_of_a_table_are_no_formulas(tmp_path):
  for name in '=1+1', '@x', '+y', '-z', 'plain':
    fake_runs.write(tmp_path / name, fake_runs.rows(20))
  made = data.make(map(history.read, history.find([str(tmp_path)])))
  rows = list(csv.DictReader(io.StringIO(report.as_csv(made), newline='')))
  assert sorted(row['run'] for row in rows) == [
      "'+y", "'-z", "'=1+1", "'@x", 'plain'
  ]
  # Numbers stay numbers.
  assert files.csv_text(-1.5) == -1.5


def test_charts_show_the_texts_of_others_as_text(tmp_path):
  link = '<a href="https://example">%{y}</a>'
  for number in range(2):
    lines = fake_runs.rows(60)
    for row in lines:
      row[f'grad_max/{link}'] = 1.0
    path = fake_runs.write(
        tmp_path / f'{number}', lines, **{'data.source': f'folder:/{link}'},
        seed=number,
    )
    c = json.loads((path / 'config.json').read_text())
    c[link] = number + 1
    (path / 'config.json').write_text(json.dumps(c))
  made = data.make(map(history.read, history.find([str(tmp_path)])))
  for build in panels.BUILDERS.values():
    panel = build(made, 100)
    if panel.items:
      chart = report_charts.chart(panel, made.runs)
      texts = [
          str(t[key]) for t in chart['data']
          for key in ('hovertemplate', 'text') if key in t
      ] + [chart['layout']['xaxis']['title']['text']]
      assert not any('<a ' in t or '%{y}<' in t for t in texts)


# --- A cache where others may write ----------------------------------------

def test_a_listing_that_leads_elsewhere_is_not_believed(tmp_path):
  for name in 'img/a/0.png', 'img/b/0.png', 'private/p.png':
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (9, 9)).save(tmp_path / name)
  root, cache = os.fsencode(tmp_path / 'img'), tmp_path / 'cache'
  found = listing.walk(root)
  for planted in (
      b'../private/p.png', os.fsencode(tmp_path / 'private/p.png'),
      b'a/../../private/p.png', b'a/..',
  ):
    shutil.rmtree(cache, ignore_errors=True)
    listing._store(
        files.absolute(str(cache / 'x.npz')),
        found._replace(paths=np.array([*found.paths, planted], object)),
    )
    (stored,) = cache.iterdir()
    with pytest.raises(ValueError, match='leads out'):
      listing._load(files.absolute(str(stored)))
  # What is sound is read back as it was.
  shutil.rmtree(cache)
  listing._store(files.absolute(str(cache / 'x.npz')), found)
  back = listing._load(files.absolute(str(cache / 'x.npz')))
  assert back.paths.tolist() == found.paths.tolist()
  assert back.folders.tolist() == found.folders.tolist()
  cache.chmod(0o777)
  assert listing._load(files.absolute(str(cache / 'x.npz'))) is None


# --- An open port ----------------------------------------------------------

def test_a_coordinator_listens_where_it_was_told_to():
  assert processes._bind_address('localhost:99') in (
      '127.0.0.1:99', '[::1]:99'
  )
  assert processes._bind_address('127.0.0.1:99') == '127.0.0.1:99'
  # Somebody else's address, and no address at all.
  assert processes._bind_address('192.0.2.1:99') is None
  assert processes._bind_address(None) is None


@pytest.mark.slow
def test_nobody_reaches_the_coordinator_of_a_local_run_from_outside(tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    try:
      s.connect(('192.0.2.1', 9))  # Sends nothing; tells our own address.
    except OSError:
      pytest.skip('this machine has no address but its own')
    outside = s.getsockname()[0]
  process = tiny.start(
      'train', *tiny.flags(), f'--workdir={tmp_path / "run"}',
      f'--coordinator=localhost:{port}', '--num_processes=2', '--process_id=0',
  )
  try:
    deadline = time.monotonic() + 60
    while True:
      try:
        socket.create_connection(('localhost', port), 1).close()
        break
      except OSError:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(OSError):
      socket.create_connection((outside, port), 2)
  finally:
    process.kill()
    tiny.finish(process)


# --- JSON from outside -----------------------------------------------------

def hostile_json():
  config = {'config.json': [
      '[' * 200_000, '[]', '3', 'null', '{}', '{"model": 3}', '{"a": {"b": 1}}',
      '{"batch_size": 0, "data": {"source": "digits"}, "seed": 0}',
      '{"batch_size": 64, "data": {"source": 7}, "seed": 0}',
  ]}
  rows = [
      '[1]', 'null', '{"train/loss": 1}', '{"step": 0, "train/loss": "x"}',
      '{"step": 0, "train/loss": null}', '[' * 100_000, '{"step": 1e400}',
      '{"step": 0, "x": ' + '1' * 4400 + '}', '{"step": true}',
      '{"step": -5, "knn/top1": 0.5}', '{"step": 0, "knn/top1": 1e999}', '\xff',
  ]
  others = {
      'result.json': ['[1]', 'null', '{"a": 1}', '{"step": "x"}', '[' * 10**5],
      'data.json': ['{"images": "x"}', '{"classes": [1]}', '3'],
      'environment.json': ['[1]', 'null', '{"jax": {"a": [1]}}'],
      'results.jsonl': ['{}\n', '1\n', '{"protocol": "knn"}\n', 'null\n'],
  }
  for file, texts in (config | others).items():
    for text in texts:
      yield file, text
  for text in rows:
    yield 'metrics.jsonl', text


def test_whatever_a_run_says_gets_one_message_and_spares_the_others(tmp_path):
  good = fake_runs.write(
      tmp_path / 'runs' / 'good', fake_runs.rows(40),
      evaluations=[('linear', 0.5)],
  )
  bad = tmp_path / 'runs' / 'bad'
  for number, (file, text) in enumerate(hostile_json()):
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    rest = (bad / file).read_text() if file == 'metrics.jsonl' else ''
    (bad / file).write_text(f'{text}\n{rest}', encoding='latin-1')
    what = f'{file}: {text[:40]}'
    for path, codes in ((bad, (0, 2)), (bad.parent, (0,))):
      code, _, err = tiny.call(
          'report', str(path), f'--out={tmp_path / f"{number}_{path.name}.csv"}'
      )
      assert code in codes and 'Traceback' not in err, (what, err)
      assert err.count('error: ') == (code == 2), (what, err)


def test_a_description_of_weights_that_is_nested_without_end(tmp_path):
  from safetensors.numpy import save_file

  path = tmp_path / 'w.safetensors'
  for description in (
      '[' * 200_000, '{"config": 3}', '{"config": {}, "step": -1}'
  ):
    save_file(
        {'cls_token': np.zeros((1, 1, 16), np.float32)}, path,
        {'mocov3_jax': description},
    )
    code, _, err = tiny.call(
        'convert', f'--from={path}', f'--to={tmp_path / "run"}'
    )
    assert code == 2 and 'Traceback' not in err and 'description' in err, err


@pytest.mark.parametrize('name', ['²', '٣', '1' * 5000, '-1', '4 ', '+4'])
def test_odd_names_of_checkpoints_are_passed_over(run, tmp_path, name):
  mine = tmp_path / 'run'
  shutil.copytree(run, mine)
  try:
    (mine / 'checkpoints' / name).mkdir()
  except OSError:
    pytest.skip('no such name here')
  code, out, err = tiny.call(
      'extract', f'--checkpoint={mine}', f'--out={tmp_path / "f.npz"}'
  )
  assert code == 0 and json.loads(out.splitlines()[-1])['step'] == 4, err


# --- Weights that grow as they are read ------------------------------------

def test_a_compressed_pytorch_file_is_refused_before_it_is_read(tmp_path):
  torch = pytest.importorskip('torch')
  import zipfile

  whole = io.BytesIO()
  torch.save({'model': {'a': torch.zeros(64)}}, whole)
  old = zipfile.ZipFile(whole)
  with zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as new:
    for member in old.infolist():
      new.writestr(member.filename, old.read(member) + bytes(
          2**26 if '/data/' in member.filename else 0
      ))
  # One value that claims to be 2**40 of them.
  torch.save(
      {'model': {'a': torch.zeros(1).half().expand(2**40)}}, tmp_path / 'y.pth'
  )
  for name, words in (
      ('x.pth', 'is compressed'), ('y.pth', 'more than the file')
  ):
    code, _, err = tiny.call(
        'convert', f'--from={tmp_path / name}', f'--to={tmp_path / "run"}'
    )
    assert code == 2 and words in err.replace('\n', ' '), err


def forge(run, **changes):
  """Has one array of a run's checkpoint described as another one."""
  import tensorstore

  store = tensorstore.KvStore.open({
      'driver': 'ocdbt', 'base': f'file://{run}/checkpoints/4/state/'
  }).result()
  name = 'params.backbone.blocks_0.attn.proj.kernel/.zarray'
  described = json.loads(store.read(name).result().value)
  store.write(name, json.dumps(described | changes).encode()).result()


@pytest.mark.parametrize('changes', [
    {'shape': [2**36, 16]}, {'chunks': [2**36, 16]},
    {'shape': [2**36, 16], 'chunks': [2**36, 16]},
], ids=lambda changes: '_'.join(changes))
def test_a_checkpoint_that_claims_terabytes_is_refused(run, tmp_path, changes):
  mine = tmp_path / 'run'
  shutil.copytree(run, mine)
  forge(mine, **changes)
  for command, flags in (
      ('convert', [f'--from={mine}', f'--to={tmp_path / "w.safetensors"}']),
      ('extract', [f'--checkpoint={mine}', f'--out={tmp_path / "f.npz"}']),
      ('train', [f'--workdir={mine}', *tiny.flags()]),
  ):
    code, _, err = tiny.call(command, *flags)
    assert code == 2 and 'claims arrays of 4,398,0' in err, err
    assert len(err.splitlines()) < 5


# What each command is given, in a process of its own: prints a JSON line for
# each, and the most memory that all of them took.
DRIVER = """
import json, resource, signal, sys, time
import tiny

outside, opened = sys.argv[1], []

def watch(event, arguments):
  if event == 'open' and outside in str(arguments[0]):
    opened.append(str(arguments[0]))

sys.addaudithook(watch)
for command, flags in json.load(sys.stdin):
  before = time.process_time()
  signal.alarm(100)
  code, _, err = tiny.call(command, *flags)
  signal.alarm(0)
  print(json.dumps({
      'command': [command, *flags], 'code': code, 'err': err,
      'seconds': time.process_time() - before, 'opened': opened,
      'gib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
  }), flush=True)
"""


def hostile_images(folder):
  """Good pictures, and one of each kind that is not."""
  folder.mkdir()
  for name, content in (
      ('a.png', png(13370, 13370)), ('b.jpg', progressive(1000, 4000)),
      ('c.png', b'%!PS-Adobe-3.0 EPSF-3.0\n'), ('d.png', b''),
      (f'{ESCAPE}\nerror: forged.png', b'GIF89a'), ('=1+1.png', b'BM'),
  ):
    (folder / name).write_bytes(content)
  (folder / 'e.png').touch()
  os.truncate(folder / 'e.png', 20 * 2**30)
  os.mkfifo(folder / 'pipe.png')
  for number in range(20):
    Image.new('RGB', (16, 16), (10 * number, 0, 0)).save(
        folder / f'{number}.png'
    )


def hostile_runs(run, folder, outside):
  """Yields runs that are hostile in one way each."""
  def copied(name):
    shutil.copytree(run, folder / name)
    return folder / name

  for name in 'results.jsonl', 'environment.json', 'metrics.jsonl':
    mine = copied(f'linked_{name}')
    (mine / name).unlink(missing_ok=True)
    (mine / name).symlink_to(outside)
    yield mine
  mine = copied('forged')
  forge(mine, shape=[2**36, 16])
  yield mine
  for number, change in enumerate((
      {'model.depth': 10**9}, {'model.depth': 256, 'model.dim': 65_536},
      {'data.image_size': 10**6}, {'data.mean': [0.5] * 100_000},
      {'head.hidden_dim': 10**15},
  )):
    mine = copied(f'config_{number}')
    c = json.loads((mine / 'config.json').read_text())
    for field, value in change.items():
      group, name = field.split('.')
      c[group][name] = value
    (mine / 'config.json').write_text(json.dumps(c))
    yield mine
  for file, text in (
      ('config.json', '[' * 200_000), ('metrics.jsonl', '[' * 2**22),
      ('data.json', '{"images": "x"}'), ('config.json', '{"model": 3}'),
  ):
    mine = copied(f'text_{len(text)}')
    (mine / file).write_text(text)
    yield mine
  mine = copied('holes')
  for name in 'metrics.jsonl', 'config.json':
    (mine / name).touch()
    os.truncate(mine / name, 2**34)
  yield mine


@pytest.mark.slow
def test_each_command_meets_hostile_files(run, tmp_path):
  outside, out = tmp_path / 'outside' / 'secret', tmp_path / 'out'
  outside.parent.mkdir()
  out.mkdir()
  outside.write_text('{"secret": 1}\n')
  hostile_images(tmp_path / 'i')
  numbers = iter(range(10**6))
  new = lambda suffix: out / f'{next(numbers)}{suffix}'
  images = f'folder:{tmp_path}/i'
  small = {
      'data.source': images, 'data.max_unreadable': 1.0, 'batch_size': 4,
      'data.mean': '(0.5,0.5,0.5)', 'data.std': '(0.5,0.5,0.5)',
      'augment.view1.blur_sigma': '(0.1,0.5)', 'schedule.steps': 2,
      'augment.view2.blur_sigma': '(0.1,0.5)', 'schedule.warmup_epochs': 0.0,
  }
  recipe = tiny.flags(**small)
  rgb = tiny.random_run(tmp_path / 'rgb', tiny.config(
      **{'data.mean': (0.5,) * 3, 'data.std': (0.5,) * 3}
  ))
  wild = ['--config.model.depth=1000000000', '--config.model.dim=1000000000']
  jobs = [
      ('train', [*recipe, f'--workdir={new("")}']),
      ('train', [*recipe, *wild, f'--workdir={new("")}']),
      ('sweep', [*recipe, f'--workdir={new("")}', '--grid', 'seed=0']),
      ('preview', [*recipe, f'--out={new(".png")}']),
      ('benchmark', ['input', *recipe, '--rounds=1', '--images=8']),
      ('benchmark', ['step', *recipe, *wild]),
      ('plan', [*recipe, *wild, '--topology=v5e:1x1']),
      ('extract', [f'--checkpoint={rgb}', f'--source={images}',
                   f'--out={new(".npz")}']),
      *(('visualize', [what, f'--checkpoint={rgb}', f'--source={images}',
                       f'--out={new(".png")}'])
        for what in ('attention', 'neighbours', 'embedding')),
      *(('evaluate', [f'--config=configs/eval_{protocol}.py',
                      f'--config.checkpoint={rgb}', f'--workdir={new("")}',
                      f'--config.data.source={images}'])
        for protocol in ('knn', 'linear')),
  ]
  (tmp_path / 'runs').mkdir()
  for mine in hostile_runs(run, tmp_path / 'runs', outside):
    jobs += [
        ('evaluate', [KNN, f'--config.checkpoint={mine}',
                      f'--workdir={new("")}']),
        ('extract', [f'--checkpoint={mine}', f'--out={new(".npz")}']),
        ('convert', [f'--from={mine}', f'--to={new(".safetensors")}']),
        ('visualize', ['attention', f'--checkpoint={mine}',
                       f'--out={new(".png")}']),
        ('report', [str(mine), f'--out={new(".html")}']),
        ('train', [*tiny.flags(), f'--workdir={mine}']),
    ]
  jobs.append(('report', [str(tmp_path / 'runs'), f'--out={new(".html")}']))
  tree = lambda: {
      p for p in tmp_path.rglob('*') if out not in p.parents
      and (tmp_path / 'runs') not in p.parents
  }
  before = tree()
  done = subprocess.run(
      [sys.executable, '-c', DRIVER, str(outside.parent)], cwd=tiny.ROOT,
      input=json.dumps(jobs), capture_output=True, text=True, timeout=3000,
      env=os.environ | tiny.here() | {
          'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{tiny.ROOT}:tests',
      },
  )
  found = [json.loads(line) for line in done.stdout.splitlines()]
  if len(found) < len(jobs):
    pytest.fail(f'{jobs[len(found)]} ended all with {done.returncode}')
  for job in found:
    assert job['code'] in (0, 2) and 'Traceback' not in job['err'], job
    assert '\x1b' not in job['err'] and 'secret"' not in job['err'], job
    assert job['seconds'] < 40 and job['gib'] < 2, job  # 20 s on two cores.
    assert not job['opened'], job
  assert outside.read_text() == '{"secret": 1}\n'
  assert tree() == before


@pytest.mark.slow
def test_the_hostile_files_cost_little_memory(tmp_path):
  """All images of this file, by a real process below 2 GiB."""
  (tmp_path / 'i').mkdir()
  for name, content in (
      ('a.png', png(13370, 13370)), ('b.jpg', progressive(1000, 4000)),
      ('c.png', b'%!PS-Adobe-3.0 EPSF-3.0\n'), ('d.png', b''),
  ):
    (tmp_path / 'i' / name).write_bytes(content)
  (tmp_path / 'i' / 'e.png').touch()
  os.truncate(tmp_path / 'i' / 'e.png', 20 * 2**30)
  for number in range(20):
    Image.new('L', (16, 16), 10 * number).save(tmp_path / 'i' / f'{number}.png')
  c = {'data.source': f'folder:{tmp_path}/i', 'batch_size': 4,
       'data.max_unreadable': 1.0, 'schedule.steps': 2,
       'data.mean': '(0.5,0.5,0.5)', 'data.std': '(0.5,0.5,0.5)',
       'augment.view1.blur_sigma': '(0.1,0.5)',
       'augment.view2.blur_sigma': '(0.1,0.5)', 'schedule.warmup_epochs': 0.0}
  process = subprocess.run(
      [sys.executable, '-m', 'mocov3_jax.train', *tiny.flags(**c),
       f'--workdir={tmp_path / "run"}'],
      cwd=tiny.ROOT, capture_output=True, text=True, timeout=200,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert process.returncode == 0, process.stderr
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  assert peak < 2, f'{peak} GiB'
  listed = (tmp_path / 'run' / 'bad_images.txt').read_text()
  assert pathlib.Path(tmp_path / 'run' / 'result.json').exists() and listed
