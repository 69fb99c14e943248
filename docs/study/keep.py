"""Saves the curves of runs for the study, with three significant digits.

  python docs/study/keep.py docs/study/rates runs/rates

writes FOLDER/RUN.csv.xz for each run of a sweep that is done or has diverged: a
line with its config and versions, then one row per step. Existing files are
left unchanged.
"""

from collections.abc import Sequence
import json
import lzma
import pathlib
import sys

from mocov3_jax.runs import history

# The metrics of a step that are kept besides the gradients of all layers.
CURVES = 'knn/top1', 'train/loss'
BLOCK, LAST = 'grad_max/block_', 'grad_max/last_block'
# To save space, only of the layers in which spikes may begin.
UPDATES = 'update_rms/patch_embed', 'update_rms/block_0', 'update_rms/block_1'
VERSIONS = 'jax', 'python', 'backend', 'device', 'devices'


def columns(rows: Sequence[dict[str, float]]) -> list[str]:
  """Returns which metrics of a run are kept; layers from the lowest up."""
  logged = {name for row in rows for name in row}
  # Runs before 2026-12 log the last block by its number as well.
  blocks = sorted(
      (
          name for name in logged if name.startswith(BLOCK)
          and any(name in row and row[name] != row[LAST] for row in rows)
      ), key=lambda name: int(name.removeprefix(BLOCK)),
  )
  wanted = [
      *CURVES, 'grad_max/patch_embed',
      *blocks, LAST, 'grad_max/projector', 'grad_max/predictor',
      *UPDATES,
  ]
  return [name for name in wanted if name in logged]


def merged(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
  """Merges the rows of each step: a run logs evaluations in separate rows."""
  steps: dict[int, dict[str, float]] = {}
  for row in rows:
    steps.setdefault(row['step'], {}).update(row)
  return [steps[step] for step in sorted(steps)]


def keep(run: history.Run, path: pathlib.Path) -> None:
  """Writes the curves of a run.

  Args:
    run: a run that is done or has diverged.
    path: the file to write, NAME.csv.xz.
  """
  about = {
      'status': run.status, 'config': run.config,
      'versions': {k: v for k, v in run.environment.items() if k in VERSIONS},
      'result': {k: v for k, v in run.result.items() if k.startswith('knn/')},
  }
  names = columns(run.rows)
  lines = [f'# {json.dumps(about)}', ','.join(['step', *names])]
  for row in merged(run.rows):
    values = (f'{row[x]:.3g}' if x in row else '' for x in names)
    lines.append(','.join([str(row['step']), *values]))
  path.write_bytes(lzma.compress('\n'.join([*lines, '']).encode(), preset=9))


def main(folder: str, *sweeps: str) -> None:
  """Saves all runs of the given sweeps that are done or have diverged."""
  into = pathlib.Path(folder)
  into.mkdir(parents=True, exist_ok=True)
  for workdir in history.find(sweeps):
    path = into / f'{workdir.name}.csv.xz'
    if not path.exists() and history.status(workdir) in ('done', 'diverged'):
      keep(history.read(workdir), path)
      print(path, path.stat().st_size)


if __name__ == '__main__':
  main(*sys.argv[1:])
