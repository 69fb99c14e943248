"""Features of images: python -m mocov3_jax.extract --checkpoint=DIR \\
    --source=folder:PATH --out=FILE.npz

DIR is the workdir of a run (its newest checkpoint) or one of its folders
checkpoints/<step>. FILE.npz holds, for each image that could be read,
  features   float32 [N, D], the backbone's output (before the heads)
  names      [N], paths below the folder, or split and number
  labels     int32 [N], -1 where there is none
  splits     [N], 'train' or 'test', as `train` would split the source
The last line on stdout is one JSON object.
"""

from absl import flags

from mocov3_jax.config import command_line
from mocov3_jax.evals import extract

if __name__ == '__main__':
  CHECKPOINT = flags.DEFINE_string(
      'checkpoint', None, 'Workdir of a run, or a checkpoint.', required=True
  )
  SOURCE = flags.DEFINE_string(
      'source', '', 'digits, folder:PATH, tfds:NAME; default: the run\'s own.'
  )
  OUT = flags.DEFINE_string('out', None, 'The .npz file.', required=True)
  LAYER = flags.DEFINE_string('layer', 'backbone', 'backbone or projector.')
  ENCODER = flags.DEFINE_string('encoder', 'query', 'query or momentum.')
  LABELS = flags.DEFINE_string(
      'labels', '', 'auto, none, or a CSV file; default: the run\'s, or auto '
      'of another --source.'
  )
  BATCH_SIZE = flags.DEFINE_integer('batch_size', 256, 'Images at a time.')
  THREADS = flags.DEFINE_integer('threads', 0, 'That read; 0 = one a core.')
  command_line.run(
      lambda: extract.extract(
          CHECKPOINT.value, SOURCE.value, OUT.value, layer=LAYER.value,
          encoder=ENCODER.value, labels=LABELS.value,
          batch_size=BATCH_SIZE.value, threads=THREADS.value,
      )
  )
