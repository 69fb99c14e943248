"""Workdirs of runs that never ran, with planted dips and spikes."""

import json
import math

import numpy as np

from mocov3_jax.config import training as config_lib
from mocov3_jax.runs import workdir

PERIOD = 10  # Steps between two kNN evaluations.


def rows(
    steps=600, *, seed=0, final=0.9, dip_at=(), spike_at=(), lag=3,
    frozen=False, labels=True, diverge_at=None, layers=('block_1',),
    updates=False,
):
  """What metrics.jsonl of such a run would hold.

  Args:
    steps: of the run.
    seed: of the noise.
    final: kNN accuracy that is approached.
    dip_at: steps of dips of 0.2 in kNN.
    spike_at: steps of spikes in the patch projection; those of the last
      block come `lag` steps later.
    frozen: whether the patch projection is.
    labels: whether kNN is logged, or else what needs no labels.
    diverge_at: the step of the last row, which says so.
    layers: others whose gradients are logged.
    updates: whether the size of updates is logged.
  """
  noise = np.random.default_rng(seed)
  found = []
  for step in range(steps + 1):
    if step % PERIOD == 0:
      gain = 1 - math.exp(-4 * step / steps)
      accuracy = 0.3 + (final - 0.3) * gain + 0.003 * noise.normal()
      accuracy -= 0.2 * any(0 <= step - at <= 2 * PERIOD for at in dip_at)
      found.append(
          {'step': step, 'knn/top1': accuracy, 'knn/k': 20} if labels else
          {
              'step': step, 'features/alignment': 1 - gain / 2,
              'features/uniformity': -4 * gain,
              'features/effective_rank': 2 + 30 * gain,
          }
      )
    if step == steps:
      break
    row = _row(step, steps, noise, frozen, spike_at, lag, layers, updates)
    if step == diverge_at:
      found.append({'step': step, 'train/diverged': 1.0})
      break
    found.append(row)
  return found


def _row(step, steps, noise, frozen, spike_at, lag, layers, updates):
  jitter = lambda: math.exp(0.15 * noise.normal())
  spike = lambda delay: 12.0 if step - delay in spike_at else 1.0
  decay = 0.02 * math.exp(-step / steps)
  return {
      'step': step,
      **{f'grad_max/{name}': 0.5 * decay * jitter() for name in layers},
      'grad_max/last_block': decay * jitter() * spike(lag),
      'grad_max/patch_embed':
          0.0 if frozen else 2 * decay * jitter() * spike(0),
      **({} if not updates else {
          'update_rms/last_block': jitter() * min(4.0, spike(lag)),
          'update_rms/patch_embed': jitter() * min(9.0, spike(0)),
      }),
      'grad_norm/global': 1.0,
      'train/feature_std': 0.2 + 0.02 * noise.normal(),
      'train/loss': 3.0 + 1.4 * math.exp(-3 * step / steps) * jitter(),
      'train/loss_chance': 4.436,
      'train/lr': 1e-3 * min(1, 10 * step / steps),
      'train/images_per_second': 700 * jitter() if step else 0.0,
  }


def write(
    folder, lines, *, done=True, data=None, environment=None, evaluations=(),
    **overrides,
):
  """Makes the workdir of a run.

  Args:
    folder: to be made.
    lines: the rows.
    done: whether there is a result.
    data: of data.json; default: 1437 images of 10 classes.
    environment: of environment.json; None = not recorded.
    evaluations: (protocol, top-1 accuracy) of each.
    **overrides: fields of the config, by dotted name.
  """
  folder.mkdir(parents=True)
  config = config_lib.default_config()
  config.update_from_flattened_dict({'batch_size': 256} | overrides)
  files = {
      'config.json': workdir.to_json(config),
      'data.json': data or {'images': 1437, 'classes': 10},
  }
  if environment is not None:
    files['environment.json'] = environment
  if done:
    last = {}
    for line in lines:
      last |= line
    files['result.json'] = last | {'train/images_per_second': 700.0}
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content))
  (folder / 'metrics.jsonl').write_text(_lines(lines))
  (folder / 'results.jsonl').write_text(_lines(
      {
          'protocol': protocol, f'{protocol}/top1': top1,
          'checkpoint_step': lines[-1]['step'], 'encoder': 'query',
          'settings': {'data': {'labels_per_class': 0}},
          'workdir': str(folder / f'eval_{protocol}'),
      } for protocol, top1 in evaluations
  ))
  return folder


def _lines(values):
  return ''.join(json.dumps(value) + '\n' for value in values)


def sweep(root):
  """Two rates by learned and frozen by two seeds; and one that diverged."""
  for rate in 0.001, 0.01, 0.03:
    for patch in 'learned', 'frozen':
      for seed in range(2):
        wild = patch == 'learned' and rate > 0.001
        lines = rows(
            seed=seed, final=0.93 - 3 * abs(rate - 0.01) - 0.02 * wild,
            dip_at=(200, 310) if wild else (),
            spike_at=(190, 300) if wild else (), frozen=patch == 'frozen',
            diverge_at=420 if rate == 0.03 and wild and seed else None,
        )
        write(
            root / f'lr{rate}_{patch}_{seed}', lines,
            done=lines[-1]['step'] == 600, evaluations=[('linear', 0.95)],
            environment={'jax': '0.10.2', 'python': '3.11.7'}, seed=seed,
            **{'optimizer.lr_per_256': rate, 'model.patch_embed': patch},
        )
  return root
