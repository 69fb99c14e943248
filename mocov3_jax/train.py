"""Pre-trains: python -m mocov3_jax.train --config=FILE --workdir=DIR

Run the same line again to continue, exactly. The last line on stdout is one
JSON object with the results.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mocov3_jax.config import command_line
from mocov3_jax.parallel import processes
from mocov3_jax.training import pretrain


def main(
    config: ConfigDict, path: str, coordinator: str | None,
    num_processes: int | None, process_id: int | None,
) -> dict[str, Any] | None:
  """Trains as one of the processes of a run; the first one has the results."""
  processes.start(coordinator, num_processes, process_id)
  processes.enable_compilation_cache()
  results = pretrain.pretrain(config, path)
  return results if processes.is_primary() else None


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file(
      'config', help_string='Recipe, such as configs/digits.py.'
  )
  WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder of the run.', required=True
  )
  COORDINATOR = flags.DEFINE_string(
      'coordinator', None, 'Of several processes: host:port of the first.'
  )
  NUM_PROCESSES = flags.DEFINE_integer(
      'num_processes', None, 'How many there are.'
  )
  PROCESS_ID = flags.DEFINE_integer(
      'process_id', None, 'Which one this is, from 0.'
  )
  flags.mark_flag_as_required('config')
  command_line.run(
      lambda: main(
          CONFIG.value, WORKDIR.value, COORDINATOR.value, NUM_PROCESSES.value,
          PROCESS_ID.value,
      )
  )
