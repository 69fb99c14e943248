"""The benchmarks run, and count what they say they count."""

import json

import photos
import tiny

FLAGS = {
    'batch_size': 16, 'data.image_size': 32, 'data.mean': '(.5,.5,.5)',
    'data.std': '(.2,.2,.2)', 'model.patch_size': 8,
}


def test_input_is_compared_with_the_pillow_chain(tmp_path):
  photos.write_tiles(tmp_path, tile=48, each=4)
  flags = tiny.flags(**FLAGS, **{'data.source': f'folder:{tmp_path}'})
  code, out, err = tiny.run(
      'benchmark', 'input', '--images=32', '--rounds=1', *flags
  )
  assert code == 0, err
  result = json.loads(out)
  rates = result['images_per_second']
  assert {'1 threads', '2 threads', '1 Pillow processes'} <= rates.keys()
  assert min(rates.values()) > 0
  ratio = rates['1 threads'] / rates['1 Pillow processes']
  assert abs(result['ratio_by_cores']['1'] - ratio) < 1e-6
  assert 'times the Pillow chain' in err


def test_the_share_of_the_augmentation_is_measured():
  code, out, err = tiny.run(
      'benchmark', 'augment', '--rounds=1', *tiny.flags(**FLAGS)
  )
  assert code == 0, err
  result = json.loads(out)
  assert 0 < result['augment_flops'] < result['step_flops']
  assert abs(
      result['share_of_flops']
      - result['augment_flops'] / result['step_flops']
  ) < 1e-9
