"""Code shared by the protocols that train: linear probe and fine-tuning."""

from collections.abc import Callable
from typing import Any

from etils import epath

from mocov3_jax.base.errors import UserError
from mocov3_jax.config import checks, evaluation
from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.evals.evaluator import Evaluator, State, Values
from mocov3_jax.parallel import sharding
from mocov3_jax.protocols.setup import PyTree, Setup, fingerprint
from mocov3_jax.runs import network
from mocov3_jax.training.trainer import Trainer


def make_trainer(
    setup: Setup, lr_per_256: float, test: Callable[[State], Values],
    recolour: Any = None, **parts: Any,
) -> Trainer:
  """Returns the trainer of a classifier.

  Args:
    setup: setup of the evaluation.
    lr_per_256: peak learning rate per 256 images.
    test: state -> 'test/top1', the accuracy on the test images, and more.
    recolour: see `BatchReader`.
    **parts: the other arguments of `Trainer`.

  Raises:
    UserError: for a batch or a schedule that does not fit the images.
  """
  config, mesh = setup.config, setup.mesh
  checks.require_colour('view', config.view, setup.splits.train.channels)
  plan = make_plan(setup, lr_per_256)
  reader = pipeline.BatchReader(
      setup.splits.train,
      sharding.local_positions(mesh, config.batch_size), config.batch_size,
      config.seed, (config.view,), setup.run.config.data.image_size,
      setup.workers, labelled=True, recolour=recolour,
  )
  evaluator = Evaluator(
      test, every=config.test_every_steps or plan.steps_per_epoch,
      main='test/top1', best=True,
      words=lambda values: f'test {values["test/top1"]:.1%}',
      unreadable=setup.log.unreadable,
  )
  return Trainer(
      config=config, schema=evaluation.schema(), plan=plan, mesh=mesh,
      reader=reader, fingerprint=fingerprint(setup), evaluators=[evaluator],
      notes=(setup.splits.note,) if setup.splits.note else (),
      stop=setup.stop, **parts,
  )


def make_plan(setup: Setup, lr_per_256: float) -> config_lib.Plan:
  """Returns the schedule of a training run on the images of `setup`.

  Raises:
    UserError: if the images do not fill a batch, or as `config_lib.plan` does.
  """
  count, config = len(setup.splits.train), setup.config
  if count < config.batch_size:
    raise UserError(
        f'batch_size={config.batch_size} is larger than the {count} labelled '
        f'training images (data.source={config.data.source!r}, '
        f'data.labels_per_class={config.data.labels_per_class}). Allowed: at '
        f'most {count}.'
    )
  return config_lib.plan(config, count, lr_per_256)


def leave_network(
    setup: Setup, workdir: epath.Path, step: int, backbone: PyTree,
    classifier: dict[str, Any],
) -> None:
  """Writes the backbone and its classifier as a checkpoint, for later use.

  The checkpoint lies in the workdir of the evaluation; see `network.locate`.

  Args:
    setup: setup of the evaluation.
    workdir: workdir of the evaluation.
    step: number of updates done.
    backbone: 'params' and 'batch_stats', each {'backbone': ...}.
    classifier: 'kernel' [D, C] and 'bias' [C], applied to the features.
  """
  config = setup.run.config.copy_and_resolve_references().unlock()
  config.data.source, config.data.labels = setup.source, setup.labels
  tree = {name: part for name, part in backbone.items() if part}
  tree['params'] = tree['params'] | {'classifier': classifier}
  network.write(
      str(workdir / network.NETWORK), config, step, tree,
      setup.splits.train.classes,
  )


def after_training(rows: list[dict[str, Any]], name: str) -> list[float]:
  """Returns the values of a metric in metrics.jsonl from step 1 on."""
  return [row[name] for row in rows if name in row and row['step']]
