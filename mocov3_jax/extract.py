"""Features of images: python -m mocov3_jax.extract --checkpoint=DIR \\
    --source=folder:PATH --out=FILE.npz

DIR is the workdir of a run (its newest checkpoint), one of its folders
checkpoints/<step>, or the workdir of a linear probe or a fine-tuning. FILE.npz
holds, for each image that could be read,
  features   float32 [N, D], the backbone's output (before the heads)
  names      [N], paths below the folder, or split and number
  labels     int32 [N], places in `classes`; -1 where there is none
  classes    [C], their names
  splits     [N], 'train' or 'test', as `train` would split the source
With --predict=FILE.csv, a network with a classifier classifies the images: one
row per image, with its label if there is one, and the five likeliest classes
with their probabilities. The last line on stdout is one JSON object.
"""

from mocov3_jax.config import command_line
from mocov3_jax.evals.extract import extract


def define(flags: command_line.Flags) -> command_line.Action:
  """Defines the flags; returns the command's action."""
  checkpoint = flags.string(
      'checkpoint', None, 'Workdir of a run, or a checkpoint.', required=True
  )
  source = flags.string(
      'source', '', 'Like data.source in a recipe; default: that of the run.'
  )
  out = flags.string('out', '', 'The .npz file of features.')
  predict = flags.string(
      'predict', '', 'The .csv file of classes, of a network with a classifier.'
  )
  layer = flags.string('layer', 'backbone', 'backbone or projector.')
  encoder = flags.string('encoder', 'query', 'query, momentum or random.')
  labels = flags.string(
      'labels', '', 'auto, none, or a CSV file; default: that of the run, or '
      'auto if --source is given.',
  )
  batch_size = flags.integer('batch_size', 256, 'Images at a time.')
  threads = flags.integer(
      'threads', 0, 'Threads that read images; 0 = one per core.'
  )
  return lambda: extract(
      checkpoint.value, source.value, out.value, predict=predict.value,
      layer=layer.value, encoder=encoder.value, labels=labels.value,
      batch_size=batch_size.value, threads=threads.value,
  )


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
