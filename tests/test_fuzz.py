"""Random configs, damaged images and damaged runs: no traceback, no hang."""

import contextlib
import functools
import io
import json
import random
import shutil
import signal
import string
import warnings

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
import tiny

from mocov3_jax.config import knobs, training
from mocov3_jax.data.decode import Encoded, Unreadable

pytestmark = pytest.mark.slow
SECONDS = 60  # That a command may take before it counts as hanging.
CONFIGS, TRAINED_EVERY = 500, 20
MUTATIONS = 500
DAMAGES = 100


@contextlib.contextmanager
def time_limit(what):
  def late(*_):
    raise TimeoutError(f'more than {SECONDS} s: {what}')

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- Configs ---------------------------------------------------------------

INTEGERS = st.sampled_from([
    -1, 0, 1, 2, 3, 5, 8, 16, 64, 255, 1000, 10**6, 10**9, 2**31, 2**40, 2**63
])
FLOATS = st.sampled_from([
    '-1.0', '0.0', '1e-9', '0.1', '0.5', '0.999', '1.0', '2.0', '1e6', '1e300',
    'inf', 'nan',
])
WORDS = st.sampled_from([
    '', 'auto', 'none', 'digits', 'vit_b', 'resnet18', 'lars', 'lamb', 'adamw',
    'moco_v3', 'byol', 'swav', 'simclr', 'frozen', 'learned', 'conv', 'cls',
    'pool', 'batch', 'bfloat16', 'float32', 'cosine', 'constant', '../x', 'x:y',
    'tfds:cifar10', 'folder:/nowhere', '\x1b[31mred', '\u202egnp', '%s', '{x}',
])
NUMBERS = st.lists(FLOATS, max_size=4).map(lambda v: f'({",".join(v)},)')


def values_of(knob):
  if isinstance(knob.default, bool):
    return st.sampled_from(['true', 'false', 'maybe', '1', ''])
  if isinstance(knob.default, int):
    return st.one_of(INTEGERS.map(str), FLOATS, st.just(''))
  if isinstance(knob.default, float):
    return st.one_of(FLOATS, INTEGERS.map(str), st.just('x'))
  if isinstance(knob.default, str):
    return st.one_of(WORDS, st.text(string.printable, max_size=8))
  return st.one_of(NUMBERS, FLOATS)


# Names that may stand in a field; what is not here keeps its default.
NAMES = {
    'model.patch_embed': [
        'frozen', 'learned', 'clipped', 'batch_norm', 'weight_norm'
    ],
    'model.positions': ['sincos', 'learned', 'none'],
    'model.readout': ['cls', 'norm_pool', 'pool'],
    'model.dtype': ['float32', 'bfloat16'],
    'objective.name': ['moco_v3', 'byol', 'simclr'],
    'objective.momentum_schedule': ['cosine', 'constant'],
    'optimizer.name': ['adamw', 'lars', 'lamb'],
}


def mild_values_of(name, knob):
  """Values with which most configs can be trained."""
  default = tiny.config().to_dict()
  for part in name.split('.'):
    default = default[part]
  if isinstance(default, bool):
    return st.sampled_from(['true', 'false'])
  if isinstance(default, str):
    return st.sampled_from(NAMES[name] if name in NAMES else [default])
  if isinstance(default, tuple):
    return st.just(f'({",".join(map(str, default))},)')
  near = [default, 2 * default, default / 2, default + 1, 0, 1]
  near = [type(default)(x) for x in near]
  return st.sampled_from(
      [str(x) for x in near if knob.allowed is None or knob.allowed.holds(x)]
  )


FIELDS = knobs.flatten(training.schema())
NAME_LISTS = st.lists(
    st.sampled_from(sorted(FIELDS)), min_size=1, max_size=5, unique=True
)
OVERRIDES = st.one_of(
    NAME_LISTS.flatmap(lambda names: st.tuples(st.just(False),
        st.fixed_dictionaries({n: values_of(FIELDS[n]) for n in names}))),
    NAME_LISTS.flatmap(lambda names: st.tuples(st.just(True),
        st.fixed_dictionaries(
            {n: mild_values_of(n, FIELDS[n]) for n in names}))),
)


def test_no_set_of_overrides_ends_in_a_traceback(tmp_path):
  count, codes = 0, []

  @settings(
      max_examples=CONFIGS, deadline=None, database=None, derandomize=True,
      phases=[Phase.generate], suppress_health_check=list(HealthCheck),
  )
  @given(OVERRIDES)
  def check(drawn):
    nonlocal count
    mild, overrides = drawn
    count += 1
    tried = sum(trains for trains, _ in codes)
    trains = mild and tried < count // TRAINED_EVERY
    flags = [f'--config.{name}={value}' for name, value in overrides.items()]
    steps = [
        '--config.schedule.steps=2', '--config.schedule.warmup_epochs=0.0'
    ] if trains else []
    # Where nothing can be written, a run ends once all of its input is known.
    workdir = tmp_path / str(count) if trains else '/dev/null/run'
    with time_limit(flags):
      code, out, err = tiny.call(
          'train', f'--workdir={workdir}', *tiny.flags(), *flags, *steps
      )
    shutil.rmtree(workdir, ignore_errors=True)
    codes.append((trains, code))
    assert code in (0, 2) and 'Traceback' not in err, (flags, err)
    if code == 2:
      lines = err.splitlines()
      assert sum(line.startswith('error: ') for line in lines) == 1, err
      assert out == ''

  check()
  trained = [code for trains, code in codes if trains]
  print(f'{len(codes)} sets; {len(trained)} tried for two steps, of which '
        f'{trained.count(0)} trained')
  assert len(codes) >= CONFIGS and trained.count(0) > len(trained) // 4


# --- Images ----------------------------------------------------------------

FORMATS = {
    'JPEG': {}, 'PNG': {}, 'WEBP': {}, 'BMP': {}, 'GIF': {}, 'TIFF': {},
    'JPEG gray': {'format': 'JPEG', 'mode': 'L'},
    'JPEG progressive': {'format': 'JPEG', 'progressive': True},
    'PNG 16 bit': {'format': 'PNG', 'mode': 'I;16'},
    'PNG palette': {'format': 'PNG', 'mode': 'P'},
    'PNG alpha': {'format': 'PNG', 'mode': 'RGBA'},
    'TIFF deflated': {'format': 'TIFF', 'compression': 'tiff_deflate'},
}


@functools.cache
def encoded(name):
  options = dict(FORMATS[name])
  kind = options.pop('format', name)
  mode = options.pop('mode', 'RGB')
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
  image = Image.fromarray(np.repeat(np.repeat(pixels, 2, 0), 2, 1))
  image = image.convert('L').convert('I;16') if mode == 'I;16' else (
      image.convert(mode)
  )
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def mutated(rng, data):
  data = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 8, 30])):
    place = rng.randrange(len(data))
    match rng.randrange(4):
      case 0:
        data[place] = rng.randrange(256)
      case 1:
        data[place] ^= 1 << rng.randrange(8)
      case 2:
        del data[place:place + rng.randrange(1, 40)]
      case 3:
        data[place:place] = rng.randbytes(rng.randrange(1, 40))
    if len(data) < 8:
      break
  if rng.random() < 0.2:
    del data[rng.randrange(len(data)):]
  return bytes(data)


def by_pillow(data):
  """What Pillow reads, as RGB; None if it refuses."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    try:
      with Image.open(io.BytesIO(data)) as image:
        if image.size[0] * image.size[1] > 10**6:
          return None
        image.load()
        return image.mode, image.size
    except Exception:
      return None


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', FORMATS)
def test_a_damaged_image_is_read_or_unreadable_and_nothing_else(name):
  rng = random.Random(name)
  both = ours = theirs = neither = 0
  for number in range(MUTATIONS):
    data = mutated(rng, encoded(name))
    expected = by_pillow(data)
    with time_limit((name, number)):
      try:
        image = Encoded(data)
        if image.height * image.width > 10**6:
          neither += expected is None
          continue
        pixels = image.pixels(rng.choice([1, 2]))
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        found = True
      except Unreadable:
        found = False
    both += found and expected is not None
    ours += found and expected is None
    theirs += not found and expected is not None
    neither += not found and expected is None
  print(f'{name}: {both} read by both, {ours} by us alone, {theirs} by Pillow '
        f'alone, {neither} by neither')
  # What Pillow reads, we read.
  assert theirs == 0 and both > 0


# --- Runs ------------------------------------------------------------------

RUN = {
    'schedule.steps': 20, 'schedule.warmup_epochs': 0.2, 'save.keep_latest': 2,
}
JSON_FILES = 'config.json', 'data.json', 'result.json'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that is done, and what its evaluation and its repetition give."""
  path = tmp_path_factory.mktemp('whole') / 'run'
  code, out, err = tiny.call('train', f'--workdir={path}', *tiny.flags(**RUN))
  assert code == 0, err
  return path, json.loads(out.splitlines()[-1])['knn/top1']


def damage(rng, run):
  """Damages one file of a run; returns its name, and whether it can be seen."""
  newest = max((run / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  inside = [p for p in newest.rglob('*') if p.is_file()]
  file = rng.choice([
      *(run / name for name in JSON_FILES), run / 'metrics.jsonl',
      *rng.sample(inside, 4),
  ])
  data = file.read_bytes()
  if file.name == 'metrics.jsonl':  # A crash can damage its end alone.
    place = len(data) - rng.randrange(1, 60)
  else:
    place = rng.randrange(max(1, len(data)))
  kind = rng.choice(['cut', 'gone', 'flipped'])
  if kind == 'gone' and file.name != 'metrics.jsonl':
    file.unlink()
  elif kind == 'flipped' and data:
    value = data[place] ^ 1 << rng.randrange(8)
    file.write_bytes(data[:place] + bytes([value]) + data[place + 1:])
    # Another digit, letter or number is as good to a reader as the first.
    return f'{file} {kind} at {place}', False
  else:
    file.write_bytes(data[:place])
  return f'{file} {kind} at {place}', True


# What TensorStore leaves behind a checkpoint that cannot be read.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_run_is_never_read_as_another_without_a_word(
    whole, tmp_path
):
  run, top1 = whole
  rng, counts = random.Random(0), {}
  for number in range(DAMAGES):
    mine, out = tmp_path / 'run', tmp_path / 'knn'
    shutil.copytree(run, mine)
    what, visible = damage(rng, mine)
    for command, flags in (
        ('report', [str(mine), f'--out={tmp_path / "r.csv"}']),
        ('evaluate', ['--config=configs/eval_knn.py', f'--workdir={out}',
                      f'--config.checkpoint={mine}']),
        ('train', [f'--workdir={mine}', *tiny.flags(**RUN)]),
    ):
      with time_limit((number, what, command)):
        code, said, err = tiny.call(command, *flags)
      where = f'{number}: {command} after {what}\n{err}'
      assert code in (0, 2) and 'Traceback' not in err, where
      if code == 2:
        assert err.count('error: ') == 1, where
      elif command != 'report' and visible:
        found = json.loads(said.splitlines()[-1])['knn/top1']
        assert found == top1 or 'damaged' in err, where
      counts[command, code] = counts.get((command, code), 0) + 1
    for path in mine, out:
      shutil.rmtree(path, ignore_errors=True)
    (tmp_path / 'r.csv').unlink(missing_ok=True)
  print(counts)
