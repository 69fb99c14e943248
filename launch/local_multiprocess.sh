#!/usr/bin/env bash
# Trains as several processes on this machine, as a cluster would on several.
#
#   bash launch/local_multiprocess.sh [--processes=N] [--devices=N] [--port=N]
#       [--dry-run] [--config=FILE] [--workdir=DIR] [--config.FIELD=VALUE ...]
#
# 1. --processes=2   the number of processes.
# 2. --devices=N     gives each process N virtual CPU devices, on any machine:
#                    it computes what a host with N chips would. Without this
#                    flag, the GPUs of the machine are divided evenly (not yet
#                    run on GPUs); without GPUs, each process has its one CPU
#                    device.
# 3. --port=N        the port of the coordinator; by default, a free one.
# 4. --dry-run       prints the commands without running them.
# 5. All other flags go to `python -m mocov3_jax.train` in every process. By
#    default, --config is configs/digits.py and --workdir is
#    runs/local_multiprocess.
#
# Output: stdout and stderr of the first process, unchanged; stderr of the
# others, with the number of the process before each line. SIGTERM and Ctrl-C
# are forwarded to all processes, which save and end with 143; the same command
# continues the run. A second Ctrl-C ends them at once. The exit code is that of
# the lowest-numbered process whose code is not 0, or else 0.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

show() {  # The words, each quoted if a shell needs it.
  local word line=
  for word in "$@"; do
    if [[ $word == *[!A-Za-z0-9_./:=,@%+-]* ]]; then word=${word@Q}; fi
    line+=" $word"
  done
  echo "${line# }"
}

number() {  # number FLAG VALUE MIN MAX
  if ! [[ $2 =~ ^[0-9]{1,5}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
    fail "$1=$2. Allowed: a whole number from $3 to $4."
  fi
}

count_gpus() {
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then
    echo 0
  elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}

processes=2 devices='' port='' dry_run='' config='' workdir=''
flags=()
for given in "$@"; do
  case $given in
    --processes=*) processes=${given#*=} ;;
    --devices=*) devices=${given#*=} ;;
    --port=*) port=${given#*=} ;;
    --dry-run) dry_run=yes ;;
    --coordinator* | --num_processes* | --process_id*)
      fail "$given is set by this script. Allowed: --processes=N, --port=N." ;;
    --*)
      case $given in
        --config=*) config=given ;;
        --workdir=*) workdir=given ;;
      esac
      flags+=("$given") ;;
    *)
      fail "'$given'. Allowed: --processes=N, --devices=N, --port=N,\
 --dry-run, and flags of mocov3_jax.train, such as --name=value." ;;
  esac
done
number --processes "$processes" 1 256
if [ -n "$devices" ]; then number --devices "$devices" 1 256; fi
if [ -n "$port" ]; then number --port "$port" 1 65535; fi
if [ -z "$workdir" ]; then
  flags=(--workdir=runs/local_multiprocess "${flags[@]}")
fi
if [ -z "$config" ]; then flags=(--config=configs/digits.py "${flags[@]}"); fi

gpus=0
if [ -z "$devices" ]; then gpus=$(count_gpus); fi
if ((gpus % processes)); then
  fail "--processes=$processes on $gpus GPUs. Allowed: a divisor of $gpus, or\
 --devices=N for CPU devices."
fi

if [ -n "$dry_run" ]; then
  python=.venv/bin/python port=${port:-PORT}
else
  source launch/venv.sh
  use_venv .
  port=${port:-$("$python" -c "import socket
with socket.socket() as s:
  s.bind(('localhost', 0))
  print(s.getsockname()[1])")}
fi

command_of() {  # Sets $line to the command of process $1.
  line=("$python" -m mocov3_jax.train "${flags[@]}"
    --coordinator="localhost:$port" --num_processes="$processes"
    --process_id="$1")
  if [ -n "$devices" ]; then
    # The last of two such flags counts.
    line=(env JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }\
--xla_force_host_platform_device_count=$devices" "${line[@]}")
  elif ((gpus)); then
    # JAX opens only these GPUs; all remain visible, so that they can
    # communicate directly.
    local share=$((gpus / processes))
    line=(env "JAX_LOCAL_DEVICE_IDS=$(
      seq -s, $(($1 * share)) $(($1 * share + share - 1))
    )" "${line[@]}")
  fi
}

pids=()
# The first time, to save. After that, a Ctrl-C means: at once.
signal=TERM
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM HUP
trap 'kill -"$signal" "${pids[@]}" 2>/dev/null || true; signal=INT' INT

# Each process is in its own group, so that a Ctrl-C reaches it only through the
# traps above.
set -m
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  if [ -n "$dry_run" ]; then
    show "${line[@]}"
  elif ((i == 0)); then
    "${line[@]}" </dev/null &
    pids+=($!)
  else
    "${line[@]}" </dev/null >/dev/null \
      2> >(sed -u "s/^/[process $i] /" >&2) &
    pids+=($!)
  fi
done

code=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  # A signal to this script interrupts `wait`; the process is still there.
  while kill -0 "$pid" 2>/dev/null; do
    ended=0
    wait "$pid" || ended=$?
  done
  if ((code == 0)); then code=$ended; fi
done
exit "$code"
