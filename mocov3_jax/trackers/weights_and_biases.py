"""Weights & Biases (wandb.ai): log.tracker=wandb, the extra `wandb`.

WANDB_MODE=offline keeps a run on the disk, in ./wandb, for `wandb sync`;
WANDB_PROJECT names the project, and WANDB_DIR another folder.
"""

import os
from typing import Any

from mocov3_jax.base.errors import UserError

PROJECT = 'mocov3_jax'


class WeightsAndBiases:
  """A run of Weights & Biases, as a `Tracker`."""

  def __init__(self, run: Any):
    """Wraps a run, as wandb.init returns it."""
    self._run = run

  def log(self, step: int, values: dict[str, float]) -> None:
    """Adds the values of a step."""
    try:
      self._run.log(values, step=step, commit=True)
    except Exception as e:  # wandb raises many kinds.
      raise ConnectionError(e) from e

  def close(self, results: dict[str, Any] | None) -> None:
    """Sends the rest, and the results if the run is done."""
    try:
      if results is not None:
        self._run.summary.update(results)
      self._run.finish(exit_code=0 if results is not None else 1)
    except Exception as e:
      raise ConnectionError(e) from e


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


def begin(name: str, run_id: str, config: dict[str, Any]) -> WeightsAndBiases:
  """Begins a run, or continues the one with this id.

  Args:
    name: the name that is shown for the run.
    run_id: id of the run, unique in the project.
    config: config of the run, as nested dicts.

  Raises:
    UserError: if there is no login, the service refuses, or this process
      already has a run open.
  """
  import wandb

  if wandb.run is not None:
    raise UserError(
        f"log.tracker='wandb': this process has the run {wandb.run.id} open, "
        'which would get these metrics. Use wandb.finish() first.'
    )
  try:
    run = wandb.init(
        project=None if 'WANDB_PROJECT' in os.environ else PROJECT,
        id=run_id, resume='allow', name=name, config=config,
        # Neither captures the terminal's output nor adds to it.
        settings=wandb.Settings(console='off', silent=True),
    )
  except Exception as e:  # wandb raises many kinds.
    raise UserError(
        f'log.tracker=\'wandb\' cannot begin a run: {_line(e)}. Use `wandb '
        'login` first, WANDB_MODE=offline without a network, or '
        "log.tracker=''."
    ) from e
  return WeightsAndBiases(run)
