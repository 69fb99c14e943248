"""The evaluation protocols."""

from typing import Any

import jax
from ml_collections import ConfigDict

from mocov3_jax.base import files
from mocov3_jax.config import checks
from mocov3_jax.parallel import processes
from mocov3_jax.protocols import finetune, frozen, linear
from mocov3_jax.protocols import setup as setup_lib

PROTOCOLS = {
    'knn': frozen.evaluate_knn,
    'linear': linear.probe,
    'logistic': frozen.evaluate_logistic,
    'finetune': finetune.finetune,
}


@processes.exit_on_lost_peer()
def evaluate(config: ConfigDict, path: str) -> dict[str, Any]:
  """Runs one protocol on a checkpoint, in all processes of a run together.

  Args:
    config: an `eval_config()`, with all overrides.
    path: the workdir of the evaluation.

  Returns:
    The results; see `setup.record` and the protocol.

  Raises:
    UserError: for bad input, before anything is written.
    Preempted: after SIGTERM or Ctrl-C, once the state is saved.
  """
  processes.enable_compilation_cache()
  checks.validate_eval(config, jax.device_count())
  setup = setup_lib.prepare(config)
  results = PROTOCOLS[config.protocol](setup, path)
  return processes.from_primary(
      lambda: setup_lib.record(setup, results, files.run_path(path))
  )
