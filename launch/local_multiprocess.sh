#!/usr/bin/env bash
# Trains as several processes on this machine, as a cluster would on several.
#
#   bash launch/local_multiprocess.sh [--processes=N] [--devices=N] [--port=N]
#       [--dry-run] [--config=FILE] [--workdir=DIR] [--config.FIELD=VALUE ...]
#
# 1. --processes=2   how many there are.
# 2. --devices=N     gives each of them N forced CPU devices, on any machine:
#                    what N chips a host compute, without the chips. Left out,
#                    the GPUs of the machine are dealt out evenly (not yet run
#                    on GPUs); without GPUs, each has its one CPU device.
# 3. --port=N        where they meet; left out, a free one.
# 4. --dry-run       prints what would be run, and runs nothing.
# 5. All else goes to `python -m mocov3_jax.train`, the same to each. Left out,
#    --config is configs/digits.py and --workdir is runs/local_multiprocess.
#
# What comes out: the first process's stdout and stderr as they are, the stderr
# of the others with their number before each line. SIGTERM, or Ctrl-C, is
# passed on to all, which save and end with 143; the same line continues. A
# second Ctrl-C ends them at once. The exit code is the first, by number, that
# is not 0.
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
 --dry-run, and flags of mocov3_jax.train, as --name=value." ;;
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
    # JAX opens these alone; all stay visible, so that they can talk directly.
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

# In groups of their own, so that a Ctrl-C reaches them through pass_on alone.
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
