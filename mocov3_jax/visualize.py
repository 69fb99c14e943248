"""Draws what a network learned: python -m mocov3_jax.visualize attention \\
    --checkpoint=DIR --out=FILE.png [--source=folder:PATH]

attention   where the class token looks: the attention of a ViT's last block
            to the patches, a map a head, and the mean of these maps
neighbours  images, and those nearest to them by backbone features: of test
            images in kNN's bank, with a green frame where the label is the
            same; without labels, of any images among all others
embedding   the features of many images, as points of the plane

DIR is the workdir of a run (its newest checkpoint) or one of its folders
checkpoints/<step>. The last line on stdout is one JSON object.
"""

from absl import flags

from mocov3_jax.config import command_line
from mocov3_jax.pictures import draw, showing

if __name__ == '__main__':
  CHECKPOINT = flags.DEFINE_string(
      'checkpoint', None, 'Workdir of a run, or a checkpoint.', required=True
  )
  OUT = flags.DEFINE_string('out', None, 'The PNG file.', required=True)
  SOURCE = flags.DEFINE_string(
      'source', '', 'digits, folder:PATH, tfds:NAME; default: the run\'s own.'
  )
  LABELS = flags.DEFINE_string(
      'labels', '', 'auto, none, or a CSV file; default: the run\'s, or auto '
      'of another --source.'
  )
  ENCODER = flags.DEFINE_string('encoder', 'query', 'query or momentum.')
  IMAGES = flags.DEFINE_integer(
      'images', None,
      'To draw; default: attention 6, neighbours 8, embedding 2000.',
  )
  K = flags.DEFINE_integer('k', 5, 'neighbours: of each image.')
  METHOD = flags.DEFINE_string('method', 'pca', 'embedding: pca, tsne, umap.')
  BATCH_SIZE = flags.DEFINE_integer('batch_size', 256, 'Images at a time.')
  THREADS = flags.DEFINE_integer('threads', 0, 'That read; 0 = one a core.')

  def options() -> showing.Options:
    """The flags that all commands share."""
    return showing.Options(
        CHECKPOINT.value, OUT.value, SOURCE.value, LABELS.value,
        ENCODER.value, IMAGES.value, BATCH_SIZE.value, THREADS.value,
    )

  command_line.run({
      'attention': lambda: draw.attention(options()),
      'neighbours': lambda: draw.neighbours(options(), K.value),
      'embedding': lambda: draw.embedding(options(), METHOD.value),
  })
