"""Fine-tuning: trains the whole network, with a new classifier on top."""

from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mocov3_jax import models, sources
from mocov3_jax.base.errors import UserError
from mocov3_jax.data.randaugment import RandAugment
from mocov3_jax.evals import features
from mocov3_jax.method import augment, optimizers
from mocov3_jax.method.optimizers import PyTree, Schedule
from mocov3_jax.models.vit import ViT
from mocov3_jax.parallel import processes
from mocov3_jax.protocols import mixup
from mocov3_jax.protocols.classifier import Classifier
from mocov3_jax.protocols.setup import Setup
from mocov3_jax.protocols.supervised import (
  after_training,
  leave_network,
  make_plan,
  make_trainer,
)
from mocov3_jax.protocols.supervised_step import (
  Supervised,
  SupervisedState,
  supervised_step,
)
from mocov3_jax.runs import metrics


def finetune(setup: Setup, path: str) -> dict[str, Any]:
  """Trains the whole network, from the checkpoint or from scratch.

  Args:
    setup: setup of the evaluation.
    path: the workdir.

  Returns:
    'finetune/top1', the accuracy on the test images after the last step, and
    'finetune/top1_best', the best accuracy of all evaluations.

  Raises:
    UserError: for bad input, before anything is written.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  config = setup.config
  model = build_model(setup)
  method = build_method(setup, model)
  init_key, step_key = jax.random.split(jax.random.key(config.seed))

  def init(variables):
    return init_state(setup, method, init_key, variables)

  def step(state, batch, variables):
    del variables  # The backbone is part of the state.
    return supervised_step(method, step_key, state, batch.images, batch.labels)

  fill = tuple(round(255 * m) for m in setup.run.config.data.mean)
  magnitude = config.finetune.rand_augment
  if magnitude and len(fill) not in (1, 3):
    raise UserError(
        f'finetune.rand_augment={magnitude} is for RGB and gray images, and '
        f'the network was trained on {len(fill)} channels. Allowed: 0.'
    )

  def finish(results, workdir, state):
    results |= processes.from_primary(lambda: _summary(results, workdir))
    trained = tested(state)
    backbone = {
        name: {'backbone': tree['backbone']}
        for name, tree in trained.items() if tree
    }
    leave_network(
        setup, workdir, results['step'], backbone, trained['params']['head']
    )

  return make_trainer(
      setup, config.finetune.lr_per_256, _tester(setup, model),
      RandAugment(magnitude, fill=fill) if magnitude else None,
      init=init, step=step, constants=(setup.variables,),
      advice='a lower finetune.lr_per_256, a longer schedule.warmup_epochs',
  ).run(path, finish)


def build_model(setup: Setup) -> Classifier:
  """Returns the checkpoint's backbone, all trainable, and a classifier."""
  training_config, c = setup.run.config, setup.config.finetune
  # `scan` only changes how the blocks are run, not the parameters.
  model = training_config.model.copy_and_resolve_references().unlock()
  model.scan = False
  backbone = models.build_backbone(
      model, training_config.data.image_size, c.drop_path
  )
  if isinstance(backbone, ViT):
    if backbone.patch_embed == 'frozen':
      backbone = backbone.clone(patch_embed='learned', frozen_blocks=0)
  elif c.layer_decay != 1:
    raise UserError(
        f'finetune.layer_decay={c.layer_decay} is for ViTs, and model.name is '
        f'{training_config.model.name!r}. Allowed: 1.0.'
    )
  return Classifier(backbone, len(setup.splits.train.classes))


def build_method(setup: Setup, model: Classifier) -> Supervised:
  """Returns the parts of a training step."""
  config, c = setup.config, setup.config.finetune
  plan = make_plan(setup, c.lr_per_256)
  schedule = optimizers.warmup_cosine(
      plan.peak_lr, plan.warmup_steps, plan.total_steps, c.warmup_lr, c.min_lr
  )
  view = augment.build(
      (config.view,), setup.run.config.data, model.backbone.dtype
  )

  def prepare(images, labels, key):
    view_key, erase_key, mix_key = jax.random.split(key, 3)
    x = view(images, view_key)[:, 0]
    x = mixup.erase(x, augment.example_keys(erase_key, len(x)), c.erase)
    targets = mixup.smooth(labels, model.num_classes, c.smoothing)
    return mixup.mix(x, targets, mix_key, c.mixup, c.cutmix)

  depth = model.backbone.depth if isinstance(model.backbone, ViT) else 0
  return Supervised(
      model=model,
      optimizer=layerwise_adamw(
          schedule, c.weight_decay, depth, c.layer_decay
      ),
      augment=prepare, loss=mixup.soft_cross_entropy, learning_rate=schedule,
      average_decay=c.ema,
  )


def layerwise_adamw(
    learning_rate: Schedule, weight_decay: float, depth: int,
    layer_decay: float,
) -> optax.GradientTransformation:
  """Returns AdamW as in DeiT (only matrices decay), with layer-wise rates.

  Args:
    learning_rate: schedule of the head's learning rate.
    weight_decay: decoupled weight decay.
    depth: number of blocks of the backbone; 0 if all layers have the same rate.
    layer_decay: see `optimizers.layer_scales`.
  """

  return optax.chain(
      optax.scale_by_adam(),
      optax.add_decayed_weights(weight_decay, optimizers.is_kernel),
      optimizers.by_layer(depth, layer_decay),
      optax.scale_by_learning_rate(learning_rate),
  )


def init_state(
    setup: Setup, method: Supervised, key: jax.Array, variables: PyTree
) -> SupervisedState:
  """Puts a new classifier on the checkpoint's backbone, or on a random one.

  Args:
    setup: setup of the evaluation.
    method: the parts of a training step.
    key: random key of the initialisation.
    variables: 'params' and 'batch_stats' of the checkpoint's backbone.
  """
  data, c = setup.run.config.data, setup.config.finetune
  shape = (2, data.image_size, data.image_size, len(data.mean))
  made = method.model.init(key, jnp.zeros(shape), train=False)
  params = made['params']
  stats = made['batch_stats'] if 'batch_stats' in made else {}
  if not c.from_scratch:
    # Copies, since the state is donated.
    params |= jax.tree.map(jnp.copy, variables['params'])
    stats |= jax.tree.map(jnp.copy, variables['batch_stats'])
  return SupervisedState(
      step=jnp.zeros((), jnp.int32), params=params, batch_stats=stats,
      opt_state=method.optimizer.init(params),
      average=jax.tree.map(
          jnp.copy, {'params': params, 'batch_stats': stats}
      ) if c.ema else {},
  )


def tested(state: SupervisedState) -> PyTree:
  """Returns the 'params' and 'batch_stats' to test: averages, if there are."""
  return state.average or {
      'params': state.params, 'batch_stats': state.batch_stats
  }


def _tester(setup: Setup, model: Classifier):
  """Returns state -> accuracy on the test images."""
  config = setup.config
  extract = features.extractor(
      model, setup.run.config.data, setup.mesh, config.batch_size,
      setup.workers, method='__call__', log=setup.log, stop_asked=setup.stop,
  )
  source, labels = sources.labelled(setup.splits.test)

  def evaluate(state):
    v = tested(state)
    logits, read = extract(v['params'], v['batch_stats'], source)
    found = np.argmax(logits, axis=1)
    return {
        'test/top1': float(np.mean(found == labels[read])),
        'test/images': len(read),
        'test/unreadable': len(source) - len(read),
    }

  return evaluate


def _summary(results: dict[str, Any], workdir: epath.Path) -> dict[str, Any]:
  rows = metrics.read_metrics(workdir / 'metrics.jsonl')
  return {
      'finetune/top1': results['test/top1'],
      'finetune/top1_best': max(after_training(rows, 'test/top1')),
  }
