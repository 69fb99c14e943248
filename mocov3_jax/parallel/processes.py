"""Joins several processes, on one or many machines, into one run."""

from collections.abc import Callable, Iterator
import contextlib
import ipaddress
import json
import os
import re
import signal
import socket
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from mocov3_jax.base import buckets, console, exits, files
from mocov3_jax.base.errors import UserError

# A process counts as dead after this many seconds without a heartbeat.
HEARTBEAT = 60
LOST_PEER = 1
SLURM_TASKS = 'SLURM_STEP_NUM_TASKS'
# Matches the messages of communication errors.
LOST = '(?i)gloo|nccl|connection|peer|unavailable|deadline|coordination|abort'


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Joins the other processes of the run, if there are others.

  On TPU pods and under Slurm all three arguments are detected; elsewhere all
  three must be given. Must be called before any other use of JAX.

  Args:
    coordinator: address of process 0, host:port.
    num_processes: total number of processes.
    process_id: index of this process, from 0.

  Raises:
    UserError: if only some arguments are given, `process_id` is out of range,
      or the processes fail to connect.
  """
  given = coordinator, num_processes, process_id
  if all(x is None for x in given) and not in_cluster():
    return
  if any(x is None for x in given) and not all(x is None for x in given):
    raise UserError(
        f'--coordinator={coordinator} --num_processes={num_processes} '
        f'--process_id={process_id}. Use all three of them, or none on a '
        'TPU pod and under Slurm.'
    )
  if num_processes is not None and not 0 <= process_id < num_processes:
    raise UserError(
        f'--process_id={process_id}. Allowed: from 0 to --num_processes='
        f'{num_processes} minus 1.'
    )
  # For collectives between CPUs; not used on accelerators.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  where = coordinator or 'the coordinator'
  try:
    # Otherwise Python would react to Ctrl-C only after the wait, which may take
    # minutes.
    with exits.leave_at_ctrl_c():
      console.say(f'waiting for the other processes of this run at {where}')
      jax.distributed.initialize(
          coordinator, num_processes, process_id,
          coordinator_bind_address=_bind_address(coordinator),
          heartbeat_timeout_seconds=HEARTBEAT,
      )
    # From here on JAX only notes SIGTERM. As long as there is nothing to save,
    # the signal should end the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  except (RuntimeError, ValueError) as e:
    raise UserError(
        f'the {num_processes or ""} processes of this run could not connect at '
        f'{where}: {(str(e).splitlines() or [type(e).__name__])[0]}'
    ) from e


def _bind_address(coordinator: str | None) -> str | None:
  """Returns the address that the coordinator listens on: if possible, as given.

  None leaves the choice to JAX, which listens on all interfaces. It is returned
  for a host name that this machine resolves to a loopback address (as many do
  with their own name), since other machines reach it at another address. It is
  also returned for an address that does not belong to this machine.
  """
  if coordinator is None:
    return None
  host, _, port = coordinator.rpartition(':')
  host = host.strip('[]')
  try:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
  except OSError:
    return None
  for family, kind, _, _, address in found:
    number = ipaddress.ip_address(address[0].partition('%')[0])
    if number.is_loopback and host not in ('localhost', address[0]):
      continue
    with contextlib.suppress(OSError), socket.socket(family, kind) as s:
      s.bind(address)
      return f'[{number}]:{port}' if number.version == 6 else f'{number}:{port}'
  return None


def environment_alone() -> dict[str, str]:
  """Returns the environment for a child process that is a separate run."""
  return {k: v for k, v in os.environ.items() if k != SLURM_TASKS}


def in_cluster() -> bool:
  """Returns whether the environment makes this process one of several."""
  # A single task of Slurm, or a single TPU host, runs alone.
  tasks = os.getenv(SLURM_TASKS, '1')
  hosts = os.getenv('TPU_WORKER_HOSTNAMES', '')
  return int(tasks) > 1 or len(hosts.split(',')) > 1


def is_primary() -> bool:
  """Returns whether this process prints and writes for the whole run."""
  return jax.process_index() == 0


def require_same(given: dict[str, Any]) -> None:
  """Checks that all processes of the run were given the same values.

  Args:
    given: values by name, which can be written as JSON.

  Raises:
    UserError: in all processes, naming the values that differ.
  """
  if jax.process_count() == 1:
    return
  texts = [json.dumps(value, sort_keys=True) for value in given.values()]
  digests = np.asarray([zlib.crc32(t.encode()) for t in texts], np.uint32)
  found = multihost_utils.process_allgather(digests)  # [processes, names]
  differ = [n for n, d in zip(given, found.T, strict=True) if np.ptp(d)]
  if differ:
    raise UserError(
        f'the processes of this run differ in {", ".join(differ)}. Use '
        'the same command in each, and the same images on each machine.'
    )


def from_primary(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Returns, in all processes, what `make` returns in the first.

  Args:
    make: called in the first process; its result can be written as JSON.

  Raises:
    UserError: in all processes, if `make` does.
  """
  if jax.process_count() == 1:
    return make()
  told = {}
  if is_primary():
    try:
      told = {'value': make()}
    except UserError as e:  # The others wait for it.
      told = {'failure': str(e)}
  text = json.dumps(told).encode()
  length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
  padded = np.frombuffer(text.ljust(length)[:length], np.uint8)
  told = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
  if 'failure' in told:
    raise UserError(told['failure'])
  return told['value']


def any_of(why: str) -> str:
  """Returns a reason if any process of the run gives one; '' if none does."""
  if jax.process_count() == 1:
    return why
  found = multihost_utils.process_allgather(np.asarray(bool(why)))
  return (why or 'in another process of this run') if found.any() else ''


@contextlib.contextmanager
def primary_only(
    context: contextlib.AbstractContextManager[Any], otherwise: Any
) -> Iterator[Any]:
  """Enters a context in the first process, and tells the others if it fails.

  Args:
    context: a context that only one process can enter, such as a lock.
    otherwise: the value to yield in the other processes.

  Raises:
    UserError: in all processes, if the first could not enter it.
  """
  with contextlib.ExitStack() as stack:
    value, failure = otherwise, None
    if is_primary():
      try:
        value = stack.enter_context(context)
      except UserError as e:
        failure = e
    if jax.process_count() > 1:
      refused = multihost_utils.broadcast_one_to_all(
          np.asarray(failure is not None)
      )
      if refused and failure is None:
        failure = UserError('process 0 refused; see its message')
    if failure is not None:
      raise failure
    yield value


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
  """Ends this process, with a message, when another one is lost."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if jax.process_count() == 1 or not re.search(LOST, str(e)):
      raise
    lines = str(e).splitlines()
    console.say(
        f'error: process {jax.process_index()} lost another process of this '
        f'run ({lines[0][:200]}). Start all of them again with the same '
        'command: they continue from the last checkpoint.'
    )
    exits.leave(LOST_PEER)


def enable_compilation_cache() -> None:
  """Caches compiled programs on disk, for the next start of the same run.

  They are kept in the folder that JAX_COMPILATION_CACHE_DIR names, or else in
  the user's cache folder, if there is one. On CPUs nothing is cached unless the
  variable is set: CPU programs are quick to compile, and only run on the same
  model of processor. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
  """
  if buckets.is_in_bucket(jax.config.jax_compilation_cache_dir or ''):
    # XLA's own caches cannot write to a bucket, and would end the process.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  if jax.config.jax_compilation_cache_dir or jax.default_backend() == 'cpu':
    return
  folder = files.user_cache('compiled')
  if folder is not None:
    jax.config.update('jax_compilation_cache_dir', str(folder))
