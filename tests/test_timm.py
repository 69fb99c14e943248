"""Full-size backbones against timm's, where it is installed."""

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mocov3_jax import models
from mocov3_jax.config import training as config_lib
from mocov3_jax.parallel import sharding
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


FOLDERS = {
    'vit_s': {}, 'vit_b': {}, 'vit_l': {}, 'resnet50': {},
    'norm_pool': {'model.readout': 'norm_pool', 'model.positions': 'none'},
    'gray': {
        'data.mean': (0.5,), 'data.std': (0.3,), 'data.image_size': 28,
        'model.patch_size': 7, 'model.dim': 64, 'model.depth': 2,
        'model.num_heads': 4,
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # What timm says of a folder's name.
@pytest.mark.parametrize('name', FOLDERS)
def test_a_folder_makes_timm_the_right_network_and_comes_back(tmp_path, name):
  config = config_lib.default_config()
  config.model.name = name if name in models.VITS | models.RESNETS else 'vit_ti'
  config.head.hidden_dim = config.head.out_dim = 8
  config.update_from_flattened_dict(FOLDERS[name])
  tree = random_tree(config)
  network.write(
      str(tmp_path / 'run'), config, 3,
      jax.tree.map(jnp.asarray, unflatten_dict({
          path: x for path, x in tree.items() if path[1] == 'backbone'
      })),
  )
  folder = tmp_path / 'folder'
  convert.convert(str(tmp_path / 'run'), f'timm:{folder}')
  net = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
  size, channels = config.data.image_size, len(config.data.mean)
  told = timm.data.resolve_model_data_config(net)
  assert tuple(told['mean']) == tuple(config.data.mean)
  assert tuple(told['std']) == tuple(config.data.std)
  assert tuple(told['input_size']) == (channels, size, size)
  x = np.random.default_rng(1).normal(size=(2, size, size, channels))
  x = x.astype(np.float32)
  with torch.no_grad():
    want = net(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
  model = models.build(config.model, config.head, size)
  got = jax.jit(
      lambda v, x: model.apply(v, x, train=False, method='features')
  )(unflatten_dict(tree), x)
  assert got.shape == want.shape
  assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
  # And back: with what it says of itself, and as another's folder.
  back = convert.convert(f'timm:{folder}', str(tmp_path / 'back'))
  assert back['model'] == config.model.name
  again = network.find(str(tmp_path / 'back'))
  params, _ = network.restore(again, sharding.make_mesh(jax.devices()[:1]))
  for path, leaf in flatten_dict(params).items():
    np.testing.assert_array_equal(leaf, tree['params', *path])
