"""Draws what a network learned: python -m mocov3_jax.visualize attention \\
    --checkpoint=DIR --out=FILE.png [--source=folder:PATH]

attention   where the class token looks: the attention of a ViT's last block
            to the patches, one map per head, and the mean of these maps
neighbours  images and their nearest neighbours by backbone features: of test
            images, those in kNN's bank, with a green frame if the labels are
            the same; without labels, of any images, those among all others
embedding   the features of many images, as points in the plane

DIR is the workdir of a run (its newest checkpoint) or one of its folders
checkpoints/<step>. The last line on stdout is one JSON object.
"""

from mocov3_jax.config import command_line
from mocov3_jax.pictures import draw
from mocov3_jax.pictures.showing import Options


def define(flags: command_line.Flags) -> dict[str, command_line.Action]:
  """Defines the flags; returns what they ask for, by the word given."""
  checkpoint = flags.string(
      'checkpoint', None, 'Workdir of a run, or a checkpoint.', required=True
  )
  out = flags.string('out', None, 'The PNG file.', required=True)
  source = flags.string(
      'source', '', 'Like data.source in a recipe; default: that of the run.'
  )
  labels = flags.string(
      'labels', '', 'auto, none, or a CSV file; default: that of the run, or '
      'auto if --source is given.',
  )
  encoder = flags.string('encoder', 'query', 'query, momentum or random.')
  images = flags.integer(
      'images', None,
      'To draw; default: attention 6, neighbours 8, embedding 2000.',
  )
  k = flags.integer('k', 5, 'neighbours: of each image.')
  method = flags.string('method', 'pca', 'embedding: pca, tsne, umap.')
  batch_size = flags.integer('batch_size', 256, 'Images at a time.')
  threads = flags.integer(
      'threads', 0, 'Threads that read images; 0 = one per core.'
  )

  def options() -> Options:
    return Options(
        checkpoint.value, out.value, source.value, labels.value,
        encoder.value, images.value, batch_size.value, threads.value,
    )

  return {
      'attention': lambda: draw.attention(options()),
      'neighbours': lambda: draw.neighbours(options(), k.value),
      'embedding': lambda: draw.embedding(options(), method.value),
  }


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  return command_line.run(__doc__, define, argv)


if __name__ == '__main__':
  command_line.execute(main)
