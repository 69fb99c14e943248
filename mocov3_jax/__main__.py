"""MoCo v3 in JAX: mocov3-jax COMMAND [FLAGS]

train      pre-trains
evaluate   runs a protocol on a checkpoint: kNN, linear, logistic, fine-tuning
extract    writes features of images
convert    converts weights to and from the formats of the release and of timm
preview    draws the views that training sees
visualize  draws attention, neighbours and embeddings
sweep      trains a grid of runs
report     shows runs side by side
plan       shows what a run would cost on TPUs or GPUs that this machine lacks
benchmark  measures the input pipeline and the training step

`python -m mocov3_jax COMMAND` and `python -m mocov3_jax.COMMAND` are the same.
`--help` after a command lists its flags. `--config` takes a file, or the name
of a recipe that comes with the package, such as digits.
"""

from mocov3_jax.base import console, exits
from mocov3_jax.base.errors import unknown
from mocov3_jax.config import command_line

COMMANDS = (
    'train', 'evaluate', 'extract', 'convert', 'preview', 'visualize', 'sweep',
    'report', 'plan', 'benchmark',
)


def main(argv: list[str]) -> int:
  """Runs the command that the first word names; returns its exit code."""
  word = argv[1] if len(argv) > 1 else '--help'
  # Each one imports what no other command needs.
  match word:
    case 'train':
      from mocov3_jax import train as command
    case 'evaluate':
      from mocov3_jax import evaluate as command
    case 'extract':
      from mocov3_jax import extract as command
    case 'convert':
      from mocov3_jax import convert as command
    case 'preview':
      from mocov3_jax import preview as command
    case 'visualize':
      from mocov3_jax import visualize as command
    case 'sweep':
      from mocov3_jax import sweep as command
    case 'report':
      from mocov3_jax import report as command
    case 'plan':
      from mocov3_jax import plan as command
    case 'benchmark':
      from mocov3_jax import benchmark as command
    case '--help' | '-h' | '--helpfull':
      print(__doc__)
      return 0
    case _:
      console.say(f'error: {unknown("the command", word, COMMANDS)}')
      return exits.BAD_INPUT
  return command.main([f'{argv[0]} {word}', *argv[2:]])


def execute() -> None:
  """Runs the command line of this process; entry point of `mocov3-jax`."""
  command_line.execute(main)


if __name__ == '__main__':
  execute()
