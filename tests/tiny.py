"""A run so small that a step takes milliseconds."""

import contextlib
import io
import json
import os
import pathlib
import shlex
import subprocess
import sys
import warnings

from absl import logging
import jax
import numpy as np

from mocov3_jax import __main__
from mocov3_jax.config import training as config_lib
from mocov3_jax.runs import network
from mocov3_jax.weights import our_checkpoints, state_dict

ROOT = pathlib.Path(__file__).parent.parent
# What the views of most tests lack, since it takes long to compile, as the
# recipes have it.
COLOUR = {
    'augment.view1.jitter_prob': 0.8, 'augment.view2.jitter_prob': 0.8,
    'augment.view1.gray_prob': 0.2, 'augment.view2.gray_prob': 0.2,
    'augment.view2.solarize_prob': 0.2,
}


def config(**overrides):
  """The digits recipe's data with a one-block ViT; dotted names override."""
  c = config_lib.default_config()
  c.update_from_flattened_dict(flat_overrides() | overrides)
  return c


def flat_overrides():
  """What `config` changes, as flat dotted names."""
  return {
      'batch_size': 64,
      'data.image_size': 8, 'data.mean': (0.305,), 'data.std': (0.376,),
      **{name: 0.0 for name in COLOUR},
      'augment.view1.blur_prob': 0.0, 'augment.view2.blur_prob': 0.0,
      'model.name': 'vit_ti', 'model.patch_size': 4, 'model.dim': 16,
      'model.depth': 1, 'model.num_heads': 2,
      'head.hidden_dim': 32, 'head.out_dim': 8,
      'optimizer.lr_per_256': 4e-3, 'schedule.epochs': 3.0,
      'schedule.warmup_epochs': 1.0,
      'knn.every_steps': 10, 'save.every_steps': 10,
  }


def flags(**overrides):
  """The same as command-line overrides of configs/digits.py."""
  values = flat_overrides() | overrides
  return ['--config=configs/digits.py'] + [
      f'--config.{name}={value}' for name, value in values.items()
  ]


def start(command, *arguments, env_add=None):
  """Starts `python -m mocov3_jax.COMMAND` in the repository's root."""
  return subprocess.Popen(
      [sys.executable, '-m', f'mocov3_jax.{command}', *arguments],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'} | (env_add or {}),
  )


def here():
  """What makes a process compute as this one does, to the bit.

  They share compiled programs then, as well.
  """
  return {
      'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('_level=1', '_level=0'),
      'JAX_NUM_CPU_DEVICES': str(jax.device_count()),
  }


def stand_in_python(path):
  """Makes a command that is this interpreter, on the CPU."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
      f'#!/bin/sh\nJAX_PLATFORMS=cpu exec {shlex.quote(sys.executable)} "$@"\n'
  )
  path.chmod(0o755)


def stand_in_venv(folder):
  """Makes .venv in a copy of the repository, of this interpreter.

  The scripts of launch/ find all that they need installed in it.
  """
  stand_in_python(folder / '.venv' / 'bin' / 'python')
  total = subprocess.run(
      'cat pyproject.toml requirements.txt | cksum', shell=True, cwd=folder,
      text=True, capture_output=True, check=True,
  ).stdout
  (folder / '.venv' / 'installed').write_text(f'. {total}')


def finish(process, timeout=300):
  """Waits; returns (exit code, stdout, stderr)."""
  out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def run(command, *arguments):
  """Runs a command to its end; returns (exit code, stdout, stderr)."""
  return finish(start(command, *arguments))


def call(command, *arguments):
  """Does what `run` does in this process, by the entry of the command line."""
  out, err = io.StringIO(), io.StringIO()
  before = sys.unraisablehook, logging.get_verbosity()
  try:
    with (
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        contextlib.chdir(ROOT), warnings.catch_warnings(),
    ):
      warnings.simplefilter('ignore')  # As most are in a process of its own.
      code = __main__.main(['mocov3_jax', command, *arguments])
  finally:
    sys.unraisablehook = before[0]
    logging.set_verbosity(before[1])
  return code, out.getvalue(), err.getvalue()


def metrics(workdir):
  """The rows of metrics.jsonl without what depends on the clock."""
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    row.pop('train/images_per_second', None)
    row.pop('data/wait_seconds', None)
  return rows


def random_run(path, config, step=4):
  """A run with one checkpoint, of random numbers: no training is compiled."""
  rng = np.random.default_rng(0)
  flat = {}
  for (collection, *rest), x in network.network_shapes(config).items():
    fields = [collection]
    if rest[0] != 'predictor':
      fields.append(f'target_{collection}')
    if collection == 'params':
      fields += ['trace'] if config.optimizer.name == 'lars' else ['mu', 'nu']
    for field in fields:
      array = rng.normal(scale=0.2, size=x.shape).astype(np.float32)
      positive = field == 'nu' or rest[-1] == 'var'
      flat[field, *rest] = abs(array) if positive else array
  our_checkpoints.write(str(path), state_dict.Weights(config, step, flat, {}))
  return path


def init(module, key, x, *rest, **options):
  """As `module.init`, compiled as a whole instead of op by op."""
  return jax.jit(lambda key, x: module.init(key, x, *rest, **options))(key, x)


def apply(module, variables, x, *rest, **options):
  """As `module.apply`, compiled as a whole instead of op by op."""
  return jax.jit(
      lambda variables, x: module.apply(variables, x, *rest, **options)
  )(variables, x)
