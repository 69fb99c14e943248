"""Saving, keeping, restoring, and what happens to damaged checkpoints."""

import gc
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocov3_jax.base.errors import UserError
from mocov3_jax.parallel import sharding
from mocov3_jax.runs import checkpoints as checkpoints_lib

# TensorStore leaves coroutines and an event loop behind when a checkpoint
# cannot be read; Python complains when it collects them.
pytestmark = [
    pytest.mark.filterwarnings('ignore::RuntimeWarning'),
    pytest.mark.filterwarnings(
        'ignore::pytest.PytestUnraisableExceptionWarning'
    ),
]


@pytest.fixture
def whole():
  return sharding.replicated(sharding.make_mesh(jax.devices()[:1]))


def state(value, whole):
  return jax.device_put(
      {'params': {'w': jnp.full((3, 4), value)}, 'step': jnp.int32(value)},
      whole,
  )


def save(folder, whole, knn_by_step, keep_latest=2, keep_best=1):
  checkpoints = checkpoints_lib.Checkpoints(
      epath.Path(folder), keep_latest, keep_best, print, 'knn/top1'
  )
  for step, knn in knn_by_step.items():
    checkpoints.save(step, state(step, whole), {'knn/top1': knn})
  checkpoints.close()


def restore(folder, whole):
  warnings = []
  checkpoints = checkpoints_lib.Checkpoints(
      epath.Path(folder), 2, 1, warnings.append, 'knn/top1'
  )
  abstract = sharding.placed(state(0, whole), whole)
  try:
    return checkpoints.restore(abstract), warnings
  finally:
    checkpoints.close()
    gc.collect()


def test_arrays_that_all_devices_hold_are_restored(tmp_path):
  whole = sharding.replicated(sharding.make_mesh(jax.devices()))
  rng = np.random.default_rng(0)
  each = 2 * checkpoints_lib.LEAST_PART // 4  # float32 values of a device.
  arrays = {
      'small': rng.normal(size=(jax.device_count(), 3)).astype(np.float32),
      'large': rng.normal(size=(jax.device_count(), each)).astype(np.float32),
  }
  checkpoints = checkpoints_lib.Checkpoints(
      epath.Path(tmp_path), 1, 0, print
  )
  held = jax.device_put(arrays, whole)
  checkpoints.save(1, held, {})
  checkpoints.wait()
  restored, step = checkpoints.restore(sharding.placed(held, whole))
  checkpoints.close()
  assert step == 1
  jax.tree.map(np.testing.assert_array_equal, restored, arrays)
  found = checkpoints_lib.restore_whole(epath.Path(tmp_path / 'checkpoints/1'))
  jax.tree.map(np.testing.assert_array_equal, found, arrays)


def steps(folder):
  return sorted(int(p.name) for p in (folder / 'checkpoints').iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path, whole):
  save(tmp_path, whole, {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: 0.65})
  assert steps(tmp_path) == [2, 4, 5]


def test_what_was_measured_after_a_save_makes_it_the_best(tmp_path, whole):
  # A stop came while it was measured; the run saved, and measured it later.
  save(tmp_path, whole, {1: 0.5})
  for metrics in {}, {'knn/top1': 0.9}:
    checkpoints = checkpoints_lib.Checkpoints(
        epath.Path(tmp_path), 1, 1, print, 'knn/top1'
    )
    checkpoints.save(2, state(2, whole), metrics)
    checkpoints.close()
  save(tmp_path, whole, {3: 0.6, 4: 0.7}, keep_latest=1)
  assert steps(tmp_path) == [2, 4]


def test_keeping_no_best(tmp_path, whole):
  save(tmp_path, whole, {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7}, keep_best=0)
  assert steps(tmp_path) == [3, 4]


def test_the_newest_is_restored_exactly(tmp_path, whole):
  save(tmp_path, whole, {1: 0.5, 7: 0.4})
  (restored, step), warnings = restore(tmp_path, whole)
  assert step == 7 and not warnings
  jax.tree.map(np.testing.assert_array_equal, restored, state(7, whole))


def test_a_checkpoint_of_one_device_restores_on_eight(tmp_path, whole):
  save(tmp_path, whole, {1: 0.5})
  eight = sharding.replicated(sharding.make_mesh())
  (restored, _), _ = restore(tmp_path, eight)
  assert len(restored['params']['w'].sharding.device_set) == 8


def test_nothing_to_restore_is_none(tmp_path, whole):
  assert restore(tmp_path, whole) == (None, [])


def truncate(folder):
  for file in (folder / 'state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(folder):
  for file in (folder / 'state').rglob('d/*'):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def break_metrics(folder):
  (folder / 'metrics' / 'metrics').write_text('{"knn')


def empty(folder):
  shutil.rmtree(folder / 'state')


@pytest.mark.parametrize(
    'damage', [truncate, flip_a_bit, break_metrics, empty]
)
def test_a_damaged_newest_is_reported_and_the_one_before_used(
    tmp_path, whole, damage
):
  save(tmp_path, whole, {3: 0.5, 4: 0.4})
  damage(tmp_path / 'checkpoints' / '4')
  (restored, step), warnings = restore(tmp_path, whole)
  assert step == 3 and int(restored['step']) == 3
  assert len(warnings) == 1 and 'checkpoints/4 is damaged' in warnings[0]
  assert (tmp_path / 'checkpoints_damaged' / '4').is_dir()
  # Its step can be saved again.
  save(tmp_path, whole, {4: 0.4})
  assert steps(tmp_path) == [3, 4]


def test_if_none_can_be_read_none_is_moved(tmp_path, whole):
  save(tmp_path, whole, {3: 0.5, 4: 0.4})
  for step in '3', '4':
    truncate(tmp_path / 'checkpoints' / step)
  with pytest.raises(UserError, match='no checkpoint in .* can be read'):
    restore(tmp_path, whole)
  assert steps(tmp_path) == [3, 4]


def test_what_was_saved_after_a_divergence_is_set_aside(tmp_path, whole):
  save(tmp_path, whole, {3: 0.5, 4: 0.4})
  warnings = []
  checkpoints = checkpoints_lib.Checkpoints(
      epath.Path(tmp_path), 2, 1, warnings.append, 'knn/top1'
  )
  assert checkpoints.newest_before(4) == 3
  checkpoints.close()
  assert steps(tmp_path) == [3] and 'diverged at step 4' in warnings[0]


def test_a_part_restores_alone(tmp_path, whole):
  save(tmp_path, whole, {3: 0.5})
  part = sharding.placed({'params': state(0, whole)['params']}, whole)
  restored = checkpoints_lib.restore_part(
      epath.Path(tmp_path) / 'checkpoints' / '3', part
  )
  assert restored.keys() == {'params'}
  np.testing.assert_array_equal(restored['params']['w'], np.full((3, 4), 3.0))


def test_a_workdir_or_a_step_names_a_checkpoint(tmp_path, whole):
  save(tmp_path, whole, {3: 0.5, 20: 0.4})
  (tmp_path / 'config.json').write_text('{}')
  assert checkpoints_lib.find(str(tmp_path))[1].name == '20'
  run, folder = checkpoints_lib.find(str(tmp_path / 'checkpoints' / '3'))
  assert (run, folder.name) == (epath.Path(tmp_path), '3')


@pytest.mark.parametrize('name', ['absent', '', 'checkpoints'])
def test_what_is_no_checkpoint_is_refused(tmp_path, name):
  with pytest.raises(UserError, match='is not a checkpoint. Use'):
    checkpoints_lib.find(str(tmp_path / name))
