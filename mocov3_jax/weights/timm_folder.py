"""Folders from which timm makes a network: weights, config.json, README.md.

`timm.create_model('local-dir:FOLDER')` gives the right network without further
arguments; on the Hub such a folder is a model. Its config.json names one of
timm's functions and the arguments that differ from that function's defaults,
such as the 12 heads of MoCo v3's ViT-S, where timm's has 6.
"""

from collections.abc import Iterable
import dataclasses
import json
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mocov3_jax import models
from mocov3_jax.base import files
from mocov3_jax.base.errors import UserError
from mocov3_jax.models.vit import ViT
from mocov3_jax.runs import history
from mocov3_jax.weights import torch_checkpoints
from mocov3_jax.weights.state_dict import Weights

PREFIX = 'timm:'
WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'
# timm's functions, by our names.
ARCHITECTURES = {
    'vit_ti': 'vit_tiny_patch16_224', 'vit_s': 'vit_small_patch16_224',
    'vit_b': 'vit_base_patch16_224', 'vit_l': 'vit_large_patch16_224',
    'vit_h': 'vit_huge_patch14_224',
    **{name: name for name in models.RESNETS},
}
# Attention heads of timm's ViTs, used if config.json does not say.
HEADS = {'tiny': 3, 'small': 6, 'base': 12, 'large': 16, 'huge': 16}
# Number of points of the kNN curve that a model card shows.
POINTS = 12


def describe(
    config: ConfigDict, class_names: Iterable[str] = ()
) -> dict[str, Any]:
  """Returns the config.json of a network.

  Args:
    config: config of the run.
    class_names: class names of its classifier; empty without one.

  Raises:
    UserError: for a network that timm does not have.
  """
  model, size = config.model, config.data.image_size
  channels = len(config.data.mean)
  backbone = models.build_backbone(model, size)
  class_names = list(class_names)
  arguments: dict[str, Any] = {} if channels == 3 else {'in_chans': channels}
  if isinstance(backbone, ViT):
    _require_known(config, backbone)
    has_class = backbone.readout == 'cls'
    arguments |= {
        'img_size': size, 'patch_size': backbone.patch_size,
        'embed_dim': backbone.dim, 'depth': backbone.depth,
        'num_heads': backbone.num_heads, 'class_token': has_class,
        'global_pool': 'token' if has_class else 'avg', 'fc_norm': False,
        'pos_embed': 'none' if backbone.positions == 'none' else 'learn',
    }
    first, classifier = 'patch_embed.proj', 'head'
  elif model.small_images:
    raise UserError(
        'model.small_images=True: timm has no ResNet with that stem. Use '
        '--to=FILE.safetensors.'
    )
  else:
    first, classifier = 'conv1', 'fc'
  found = {
      'architecture': ARCHITECTURES[model.name],
      'num_classes': len(class_names),
      'num_features': backbone.dim if isinstance(backbone, ViT) else None,
      'model_args': arguments,
      'pretrained_cfg': {
          'tag': 'mocov3_jax', 'custom_load': False,
          'input_size': [channels, size, size],
          'fixed_input_size': isinstance(backbone, ViT),
          'interpolation': 'bilinear', 'crop_pct': 0.875,
          'crop_mode': 'center', 'mean': list(config.data.mean),
          'std': list(config.data.std), 'num_classes': len(class_names),
          'pool_size': None, 'first_conv': first, 'classifier': classifier,
      },
  }
  if class_names:
    found['label_names'] = class_names
  return {name: value for name, value in found.items() if value is not None}


def _require_known(config: ConfigDict, backbone: ViT) -> None:
  for field, value, allowed in (
      ('patch_embed', backbone.patch_embed, ('frozen', 'learned', 'clipped')),
      ('mlp_norm', backbone.mlp_norm, ('layer',)),
      ('readout', backbone.readout, ('cls', 'norm_pool')),
  ):
    if value not in allowed:
      raise UserError(
          f'model.{field}={value!r}: timm has no such ViT. Allowed: '
          f'{", ".join(allowed)}.'
      )


def write(
    folder: epath.Path, source: Weights, encoder: str, run: str,
    class_names: Iterable[str] = (),
) -> dict[Any, str]:
  """Writes a folder; config.json is written last and marks it as complete.

  Args:
    folder: the folder; must not exist yet.
    source: what to write.
    encoder: 'query' or 'momentum': whose backbone to write.
    run: workdir of the run, for the model card; '' = none.
    class_names: class names of its classifier.

  Returns:
    The name of each array that was written, by its path.

  Raises:
    UserError: if timm has no such network, or it cannot be written.
  """
  description = describe(source.config, class_names)
  card = _card(folder.name, source, encoder, run)
  written = torch_checkpoints.write(folder / WEIGHTS, source, encoder)
  for name, text in (
      (CARD, card), (CONFIG, json.dumps(description, indent=2) + '\n'),
  ):
    with files.open_whole(folder / name, '--to') as file:
      file.write(text.encode())
  return written


def read(
    given: str, flag: str, config: ConfigDict | None = None,
    num_heads: int = 0, ignore: tuple[str, ...] = (),
) -> tuple[Weights, dict[str, str]]:
  """Reads a folder as `torch_checkpoints.read` does a file.

  Args:
    given: 'timm:FOLDER'.
    flag: the flag or config field that names the folder, for messages.
    config: config of the run; None = as the folder specifies.
    num_heads: attention heads of a ViT; 0 = as the folder specifies.
    ignore: names of tensors to leave out; a final * matches the rest.

  Returns:
    The weights, and the names of what was left out with the reasons.

  Raises:
    UserError: if it is no such folder, or its weights cannot be read.
  """
  folder = files.absolute(given.removeprefix(PREFIX), flag)
  description = read_description(folder)
  weights, left_out = torch_checkpoints.read(
      folder / WEIGHTS, f'{flag}={given}', config, num_heads, ignore,
      heads_of(description),
  )
  return with_normalisation(weights, description), left_out


def read_description(folder: epath.Path) -> dict[str, Any]:
  """Returns the config.json of a folder.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  found = files.read_object(folder / CONFIG)
  if not found or not (folder / WEIGHTS).exists():
    raise UserError(
        f'{PREFIX}{folder} lacks {CONFIG} or {WEIGHTS}, which timm and the Hub '
        'provide. Use a folder with both.'
    )
  return found


def heads_of(description: dict[str, Any]) -> int:
  """Returns the number of attention heads in a config.json; 0 if unknown."""
  arguments = _part(description, 'model_args')
  if 'num_heads' in arguments and type(arguments['num_heads']) is int:
    return arguments['num_heads']
  match = re.match(r'(?:deit3?|vit)_([a-z]+)', str(_field(
      description, 'architecture'
  )))
  return HEADS[match[1]] if match and match[1] in HEADS else 0


def with_normalisation(
    weights: Weights, description: dict[str, Any]
) -> Weights:
  """Puts the mean and standard deviation of a folder into the weights' config.

  Raises:
    UserError: if these are not one number per channel.
  """
  told = _part(description, 'pretrained_cfg')
  if not {'mean', 'std'} <= told.keys():
    return weights
  config = weights.config.copy_and_resolve_references()
  try:
    mean, std = (tuple(map(float, told[name])) for name in ('mean', 'std'))
    if len(mean) != len(config.data.mean) or len(std) != len(mean):
      raise ValueError(f'{len(mean)} and {len(std)} values')
  except (TypeError, ValueError) as e:
    raise UserError(
        f'{CONFIG} has no mean and std of each channel: {e}.'
    ) from e
  with config.unlocked():
    config.data.mean, config.data.std = mean, std
  return dataclasses.replace(
      weights, config=config, assumed=tuple(
          text for text in weights.assumed
          if not text.startswith('normalisation')
      ),
  )


def _part(description: dict[str, Any], name: str) -> dict[str, Any]:
  found = _field(description, name)
  return found if isinstance(found, dict) else {}


def _field(description: dict[str, Any], name: str) -> Any:
  return description[name] if name in description else None


def _card(name: str, source: Weights, encoder: str, run: str) -> str:
  """Returns a model card: what it is, how to use it, its recipe and results."""
  config = source.config
  lines = [
      '---', 'library_name: timm', 'tags:', '- self-supervised-learning',
      '- moco-v3', '---', '', f'# {name}', '',
      f'The backbone `{config.model.name}` ({encoder} encoder) after '
      f'{source.step:,} steps of pre-training without labels by mocov3_jax '
      f'({config.objective.name}; Chen, Xie and He, ICCV 2021, '
      'arXiv:2104.02057).', '', '```python', 'import timm',
      f"model = timm.create_model('local-dir:{name}')", 'data = '
      'timm.data.resolve_model_data_config(model)', '```', '',
      '## Recipe', '', '| setting | value |', '|---|---|',
  ]
  for field in (
      'batch_size', 'data.source', 'data.image_size', 'model.patch_embed',
      'objective.temperature', 'objective.momentum', 'optimizer.name',
      'optimizer.lr_per_256', 'optimizer.weight_decay', 'schedule.epochs',
      'schedule.warmup_epochs', 'seed',
  ):
    value = config
    for part in field.split('.'):
      value = value[part]
    lines.append(f'| `{field}` | {_cell(value)} |')
  lines += _results(run)
  return '\n'.join(lines) + '\n'


def _results(run: str) -> list[str]:
  """Returns the run's data, kNN curve and evaluations, as Markdown lines."""
  if not run:
    return []
  try:
    found = history.read(files.run_path(run))
  except UserError:  # A converted file has no history.
    return []
  lines = []
  if found.data:
    lines += ['', '## Data', '', ', '.join(
        f'{found.data[name]:,} {name}' for name in ('images', 'classes')
        if name in found.data
    )]
  curve = [
      (row['step'], row['knn/top1']) for row in found.rows if 'knn/top1' in row
  ]
  if curve:
    chosen = curve[:: max(1, len(curve) // POINTS)]
    if chosen[-1] != curve[-1]:
      chosen.append(curve[-1])
    lines += ['', '## Online kNN', '', '| step | accuracy |', '|---|---|', *(
        f'| {step:,} | {top1:.1%} |' for step, top1 in chosen
    )]
  if found.evaluations:
    lines += ['', '## Evaluations', '', '| protocol | checkpoint | top-1 |',
              '|---|---|---|', *(
                  f'| {_cell(line["protocol"])} | {line["checkpoint_step"]:,} '
                  f'| {line[line["protocol"] + "/top1"]:.1%} |'
                  for line in found.evaluations
              )]
  return lines


def _cell(value: Any) -> str:
  text = ''.join(c for c in str(value) if c.isprintable())
  return text.replace('|', '\\|').replace('<', '&lt;')


