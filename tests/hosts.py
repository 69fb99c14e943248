"""One of several processes that read the same run: see test_hosts.py."""

import hashlib
import json
import sys

import jax
import numpy as np
import tiny

from mocov3_jax.config import training as config_lib
from mocov3_jax.data import pipeline
from mocov3_jax.method.build import build_method, run_keys
from mocov3_jax.parallel import sharding
from mocov3_jax.training import pretrain


def main(folder, address, processes, process, first, last):
  """Prints {step: {place in the global batch: (crops, views, unreadable)}}."""
  jax.config.update('jax_num_cpu_devices', 4 // processes)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, processes, process)
  assert jax.device_count() == 4 and jax.process_count() == processes
  c = tiny.config(**{
      'batch_size': 16, 'data.source': f'folder:{folder}',
      'data.mean': (0.5,) * 3, 'data.std': (0.2,) * 3,
      'data.image_size': 32, 'model.patch_size': 8,
  })
  mesh = sharding.make_mesh()
  positions = sharding.local_positions(mesh, c.batch_size)
  reader = pretrain.make_reader(c, pretrain.load_splits(c).train, positions)
  make_views = jax.jit(
      build_method(c, config_lib.plan(c, len(reader.source)))
      .augment,
      out_shardings=sharding.batch_sharding(mesh),
  )
  _, key = run_keys(c.seed)
  seen = {}
  steps = range(first, last)
  batches = pipeline.train_batches(reader, first, last, 2)
  for step, local in zip(steps, batches, strict=True):
    batch = sharding.to_global(local, mesh)
    views = make_views(batch.images, jax.random.fold_in(key, step))
    made = {
        shard.index[0].start or 0: np.asarray(shard.data)
        for shard in views.addressable_shards
    }
    rows = np.concatenate([made[start] for start in sorted(made)])
    seen[step] = {
        int(place): (
            hashlib.sha256(local.images[i].tobytes()).hexdigest(),
            np.round(rows[i].astype(float).mean(axis=(1, 2)), 5).tolist(),
            int(local.unreadable[i]),
        )
        for i, place in enumerate(positions)
    }
  print(json.dumps(seen), flush=True)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
