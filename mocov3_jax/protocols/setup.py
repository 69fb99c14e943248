"""What all evaluations share: opening network and images, recording results."""

from collections.abc import Callable
import contextlib
import dataclasses
import itertools
import json
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mocov3_jax import sources
from mocov3_jax.base import console, exits, files
from mocov3_jax.base.errors import UserError, is_of_bucket, unknown
from mocov3_jax.config import evaluation
from mocov3_jax.data.pipeline import epoch_order
from mocov3_jax.data.workers import Workers
from mocov3_jax.evals import confidence, features
from mocov3_jax.evals.opened import (
  ENCODERS,
  RANDOM,
  Opened,
  open_checkpoint,
)
from mocov3_jax.runs import network
from mocov3_jax.runs import workdir as workdir_lib
from mocov3_jax.sources.layout import listed

PyTree = Any
# Maximum number of unreadable images that a result names; it counts all.
UNREADABLE_NAMED = 100


@dataclasses.dataclass(frozen=True)
class Setup:
  """A checkpoint and the labelled images to evaluate it on.

  Attributes:
    config: config of the evaluation.
    run: the checkpoint and its network.
    splits: `train` and `bank` are the labelled images to learn from, `test`
      those to classify.
    mesh: the mesh to compute on.
    extract: computes the features of a source.
    variables: 'params' and 'batch_stats' of the backbone, on every device.
    log: records which images `extract` could not read.
    random: () -> the same variables of the run's network with random weights.
    source, labels: where the images and labels come from, in the form of
      `config.data` of a run.
    stop: whether this process was asked to stop; `extract` checks it.
    workers: read and decode the images.
  """

  config: ConfigDict
  run: network.Trained
  splits: sources.Splits
  mesh: Mesh
  extract: features.Extract
  variables: PyTree
  log: features.ReadingLog = dataclasses.field(
      default_factory=features.ReadingLog
  )
  random: Callable[[], PyTree] | None = None
  source: str = ''
  labels: str = ''
  stop: exits.StopRequest = dataclasses.field(
      default_factory=exits.StopRequest
  )
  workers: Workers | None = None


def prepare(config: ConfigDict) -> Setup:
  """Opens the checkpoint and the images; writes nothing.

  Args:
    config: an `eval_config()`, already checked.

  Raises:
    UserError: for bad input.
  """
  if not config.checkpoint:
    raise UserError(
        'required: --config.checkpoint=..., the workdir of a training run or '
        'one of its folders checkpoints/<step> (from_scratch uses only its '
        'network architecture and its images).'
    )
  data = config.data
  opened = open_checkpoint(
      config.checkpoint, data.source,
      '' if data.labels == 'auto' else data.labels, data.threads,
      data.processes,
  )
  if config.encoder not in ENCODERS:
    raise unknown('encoder', config.encoder, ENCODERS)
  splits = labelled_splits(config, opened)
  log = features.ReadingLog(data.max_unreadable)
  stop = exits.StopRequest()
  return Setup(
      config, opened.run, splits, opened.mesh,
      opened.extractor(config.batch_size, log=log, stop_asked=stop),
      _named(opened.variables(config.encoder)), log,
      lambda: _named(opened.variables(RANDOM)), opened.spec, opened.labels,
      stop, opened.workers,
  )


def _named(variables: tuple[PyTree, PyTree]) -> PyTree:
  params, batch_stats = variables
  return {'params': params, 'batch_stats': batch_stats}


def fingerprint(setup: Setup) -> dict[str, Any]:
  """Returns what must stay the same for an evaluation to be continued."""
  splits = setup.splits
  return splits.fingerprint() | {
      'test_images': len(splits.test),
      'labels_sha256': network.digest([
          source.labels(np.arange(len(source)))
          for source in (splits.train, splits.test)
      ]),
      'checkpoint_step': setup.run.step,
      'backbone_sha256': network.digest(setup.variables),
  }


def labelled_splits(config: ConfigDict, opened: Opened) -> sources.Splits:
  """Returns the labelled images to learn from, and those to classify.

  Raises:
    UserError: if there are none, or their classes do not fit together.
  """
  splits = opened.splits
  what = f'data.source={opened.spec!r} with data.labels={opened.labels!r}'
  if splits.test is None:
    raise UserError(
        f'{what} has no labels, which protocol={config.protocol!r} needs. '
        'Use a labelled source; a folder with a subfolder per class; or '
        'data.labels=FILE.csv.'
    )
  train, labels = sources.labelled(splits.bank)
  test, test_labels = sources.labelled(splits.test)
  for name, found in ('training', labels), ('test', test_labels):
    if not (found >= 0).any():
      raise UserError(
          f'{what} has no labelled {name} images. Use a source with '
          'labels in both splits.'
      )
  labels_found, test_found = (
      np.unique(found[found >= 0]) for found in (labels, test_labels)
  )
  if len(labels_found) < 2:
    raise UserError(
        f'{what} has training images of a single class. Allowed: two or more.'
    )
  unseen = np.setdiff1d(test_found, labels_found)
  if len(unseen):
    raise UserError(
        f'{what} has test images of {len(unseen)} classes '
        f'({listed([splits.train.classes[n] for n in unseen])}) for which '
        'there are no training images. Use splits with the same classes.'
    )
  count = config.data.labels_per_class
  if count:
    train = few_of_each(train, labels, count, config.seed)
  return dataclasses.replace(splits, train=train, bank=train, test=test)


def few_of_each(
    source: sources.Source, labels: np.ndarray, count: int, seed: int
) -> sources.Source:
  """Returns `count` images of each class, chosen by the seed.

  Raises:
    UserError: if a class has fewer.
  """
  order = epoch_order(seed, 0, len(source))
  chosen = []
  classes, counts = np.unique(labels[labels >= 0], return_counts=True)
  for label in classes:
    its = order[labels[order] == label]
    if len(its) < count:
      raise UserError(
          f'data.labels_per_class={count}, but class '
          f'{source.classes[label]} has {len(its)} training images. Allowed: '
          f'up to {counts.min()}, what the smallest class has, or 0 for all.'
      )
    chosen.append(its[:count])
  return sources.Subset(source, np.sort(np.concatenate(chosen)))


def claimed(
    setup: Setup, path: str
) -> contextlib.AbstractContextManager[epath.Path]:
  """Claims the workdir of an evaluation that does not train."""
  return workdir_lib.claimed(
      path, setup.config, evaluation.schema(), fingerprint(setup)
  )


def record(
    setup: Setup, results: dict[str, Any], workdir: epath.Path
) -> dict[str, Any]:
  """Completes the results, and writes result.json and a line of results.jsonl.

  results.jsonl is in the workdir of the run, beside checkpoints/. If a repeated
  evaluation finds the same results, neither file is written again: where the
  training was already done, the repeated results lack some values, such as the
  speed.

  Args:
    setup: setup of the evaluation.
    results: flat dict with 'PROTOCOL/top1'; 'test/images', the number of images
      that could be read; and 'PROTOCOL/top1_random', if that was measured. The
      images that could not be read are added from `setup.log`.
    workdir: workdir of the evaluation.

  Returns:
    The contents of result.json.

  Raises:
    UserError: if an existing result.json is damaged.
  """
  config, splits = setup.config, setup.splits
  path = workdir / 'result.json'
  known, own = files.read_object(path), f'{config.protocol}/'
  found = {name: v for name, v in results.items() if name.startswith(own)}
  if known | found == known:
    return known
  results = {
      'test_images': results['test/images'],
      'train_images': len(splits.train),
  } | {k: v for k, v in results.items() if k != 'test/images'}
  results['unreadable_images'] = len(setup.log.unreadable)
  if setup.log.unreadable:
    results['unreadable'] = dict(
        itertools.islice(setup.log.unreadable.items(), UNREADABLE_NAMED)
    )
  top1 = results[f'{config.protocol}/top1']
  random = f'{config.protocol}/top1_random'
  if random in results and top1 <= results[random]:
    console.say(
        f'warning: {top1:.1%} is no more than the random network has, '
        f'{results[random]:.1%}'
    )
  low, high = confidence.interval(top1, results['test_images'])
  beside = f', the random network {results[random]:.1%}' if (
      random in results
  ) else ''
  console.say(
      f'{config.protocol}: {top1:.1%} of {results["test_images"]} test images '
      f'(95 %: {low:.1%} to {high:.1%}){beside}'
  )
  results |= {
      f'{config.protocol}/top1_interval': [low, high],
      'protocol': config.protocol,
      'checkpoint': str(setup.run.folder),
      'checkpoint_step': setup.run.step,
      'encoder': config.encoder,
      'classes': len(splits.train.classes),
      'workdir': str(workdir),
      'settings': workdir_lib.to_json(config),
  }
  # Written first: a kill in between then causes a second line instead of none.
  _append(setup.run.folder.parent.parent / 'results.jsonl', results)
  files.write_json(path, results)
  return results


def _append(path: epath.Path, results: dict[str, Any]) -> None:
  try:
    files.append(path, f'{json.dumps(results)}\n')
  except Exception as e:  # The run may belong to somebody else.
    if not isinstance(e, OSError) and not is_of_bucket(e):
      raise
    console.say(
        f'warning: {path} cannot be written ({e}); the result is only in the '
        'workdir'
    )
