"""Full-size backbones against timm's, where it is installed."""

from flax.traverse_util import unflatten_dict
import jax
import numpy as np
import pytest
import tiny

from mocov3_jax import models
from mocov3_jax.config import training as config_lib
from mocov3_jax.runs import network
from mocov3_jax.weights import convert, state_dict

torch = pytest.importorskip('torch')
timm = pytest.importorskip('timm')


def random_tree(config, seed=0):
  """Random weights near an initialisation, and plausible statistics."""
  rng = np.random.default_rng(seed)
  flat = {}
  for path, x in network.network_shapes(config).items():
    leaf = path[-1]
    values = rng.normal(size=x.shape).astype(np.float32)
    if leaf == 'kernel':
      values *= np.sqrt(2 / np.prod(x.shape[:-1]))
    elif leaf in ('scale', 'var'):
      values = 1 + 0.1 * np.abs(values)
    else:
      values *= 0.1
    flat[path] = values
  return flat


@pytest.mark.parametrize(
    'ours, theirs, arguments',
    [
        ('vit_s', 'vit_small_patch16_224', {'num_heads': 12}),
        ('vit_b', 'vit_base_patch16_224', {}),
        ('resnet50', 'resnet50', {}),
        ('resnet18', 'resnet18', {}),
    ],
)
def test_full_size_backbones_agree(tmp_path, ours, theirs, arguments):
  config = config_lib.default_config()
  config.model.name = ours
  config.head.hidden_dim = config.head.out_dim = 8
  source = state_dict.Weights(config, 1, random_tree(config), {})
  places = state_dict.backbone_places(config, 'query')
  state = {
      n: torch.tensor(x) for n, x in state_dict.to_torch(source, places).items()
  }
  net = timm.create_model(theirs, num_classes=0, **arguments)
  net.load_state_dict(state, strict=True)
  net.eval()
  x = np.random.default_rng(1).normal(size=(2, 224, 224, 3))
  x = x.astype(np.float32)
  with torch.no_grad():
    want = net(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
  model = models.build(config.model, config.head, 224)
  variables = unflatten_dict(source.flat)
  got = jax.jit(
      lambda v, x: model.apply(v, x, train=False, method='features')
  )(variables, x)
  assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_every_full_checkpoint_fills_timms_model(tmp_path):
  # The export of a whole run: names, shapes, metadata.
  config = tiny.config()
  tiny.random_run(tmp_path / 'run', config)
  for encoder in 'query', 'momentum':
    for suffix in '.safetensors', '.pth':
      file = tmp_path / f'{encoder}{suffix}'
      convert.convert(str(tmp_path / 'run'), str(file), encoder)
    net = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=0, embed_dim=16,
        depth=1, num_heads=2,
    )
    state = timm.models.load_state_dict(
        str(tmp_path / f'{encoder}.safetensors')
    )
    net.load_state_dict(state, strict=True)
    pth = torch.load(tmp_path / f'{encoder}.pth', weights_only=True)['model']
    assert {n: tuple(x.shape) for n, x in pth.items()} == {
        n: tuple(x.shape) for n, x in state.items()
    }
