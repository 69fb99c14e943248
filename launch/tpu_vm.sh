#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM slice, from creation to deletion.
#
#   bash launch/tpu_vm.sh COMMAND [--SETTING=VALUE ...] [-- TRAINING FLAG ...]
#
#   create    the slice
#   install   the storage, the code and its requirements, on every worker
#   run       starts the training on every worker, and leaves it running
#   logs      follows what it prints (Ctrl-C ends the following alone)
#   watch     until the training is complete or stopped: a preempted slice is
#             deleted, created anew, installed and run again; a run that broke
#             is run again, unless the input was bad
#   stop      has the training save and end
#   delete    the slice; its disks go with it
#   all       create, install, run and watch; delete, once it is complete
#
# Needs gcloud, logged in. For instance, ViT-B/16 on a Spot slice:
#
#   bash launch/tpu_vm.sh all --spot --name=b16 --zone=us-west4-a \
#       --accelerator=v5litepod-16 --bucket=my-bucket -- \
#       --config=configs/imagenet/vit_b16.py --workdir=/mnt/mocov3/b16 \
#       --config.micro_batch=32
#
# Not yet run on a Cloud TPU. The tests hold what --dry-run prints, and what
# `watch` does, to a stand-in for gcloud; the lines themselves are unproven.
#
# Nothing is remembered between commands: give each the same settings, as
# flags, or as environment variables of the name in capitals.
#
#  1. --name=mocov3     of the slice.
#  2. --zone=us-west4-a --project=ID (default: gcloud's own).
#  3. --accelerator=v5litepod-16, and the image that belongs to it,
#     --version=v2-alpha-tpuv5-lite. v6e-16: v2-alpha-tpuv6e. v5p-16:
#     v2-alpha-tpuv5. v4-16: tpu-ubuntu2204-base.
#  4. --spot            (SPOT=1) costs less, and can be preempted at any time.
#  5. --repo=URL --ref=NAME  what the workers check out: a branch, tag or
#     commit. A run continues exactly on the code it began with: name a tag or
#     commit for a long one.
#  6. --bucket=NAME or --nfs=HOST:/SHARE  is mounted at --mount=/mnt/mocov3 on
#     every worker. The workdir has to lie there: all workers must see one
#     folder, it must outlive the slice, and the program takes no gs:// URLs.
#     A Filestore share (--nfs) is an ordinary file system. A bucket, through
#     gcsfuse, is cheaper; a file is uploaded once it is closed, so that a
#     worker that is killed before it could save takes the newest rows of
#     metrics.jsonl with it. Checkpoints are complete or absent either way, if
#     the bucket has a hierarchical namespace (its renames are atomic).
#     --gcsfuse=3.0.0  is the version that is installed.
#  7. --data=/mnt/mocov3/tensorflow_datasets  is TFDS_DATA_DIR, where prepared
#     sets lie (docs/data.md).
#  8. --poll=60         seconds between two looks of `watch`;
#     --restarts=20     how often it starts again before it gives up.
#  9. --worker=0        whose output `logs` follows: a number, or all. The
#     first process speaks for the run; the others only of their errors.
# 10. --dry-run         (DRY_RUN=1) prints the gcloud lines, and runs none.
# 11. After --, the flags of mocov3_jax.train, the same on every worker.
#
# SIGTERM, which a worker's processes get when it is shut down, makes the
# program save and end with 143. A Spot slice is given half a minute; if that
# was too short, the newest regular checkpoint counts (config.save).
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

quote() {  # The words, each quoted if a shell needs it.
  local word line='' inner="'\\''"
  for word in "$@"; do
    if [[ $word == *[!A-Za-z0-9_./:=,@%+-]* ]]; then
      word="'${word//"'"/$inner}'"
    fi
    line+=" $word"
  done
  echo "${line# }"
}

COMMANDS='create, install, run, logs, watch, stop, delete, all'
command=${1:-}
case $command in
  create | install | run | logs | watch | stop | delete | all) shift ;;
  *) fail "'$command' is no command. Allowed: $COMMANDS." ;;
esac

NAME=${NAME:-mocov3}
ZONE=${ZONE:-us-west4-a}
PROJECT=${PROJECT:-}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-0}
REPO=${REPO:-https://github.com/mocov3-jax/mocov3_jax}
REF=${REF:-main}
BUCKET=${BUCKET:-}
NFS=${NFS:-}
MOUNT=${MOUNT:-/mnt/mocov3}
GCSFUSE=${GCSFUSE:-3.0.0}
DATA=${DATA:-}
POLL=${POLL:-60}
RESTARTS=${RESTARTS:-20}
WORKER=${WORKER:-0}
DRY_RUN=${DRY_RUN:-0}

while (($#)); do
  value=${1#*=}
  case $1 in
    --) shift; break ;;
    --name=*) NAME=$value ;;
    --zone=*) ZONE=$value ;;
    --project=*) PROJECT=$value ;;
    --accelerator=*) ACCELERATOR=$value ;;
    --version=*) VERSION=$value ;;
    --spot) SPOT=1 ;;
    --repo=*) REPO=$value ;;
    --ref=*) REF=$value ;;
    --bucket=*) BUCKET=$value ;;
    --nfs=*) NFS=$value ;;
    --mount=*) MOUNT=$value ;;
    --gcsfuse=*) GCSFUSE=$value ;;
    --data=*) DATA=$value ;;
    --poll=*) POLL=$value ;;
    --restarts=*) RESTARTS=$value ;;
    --worker=*) WORKER=$value ;;
    --dry-run) DRY_RUN=1 ;;
    *) fail "'$1'. Allowed: --name, --zone, --project, --accelerator,\
 --version, --repo, --ref, --bucket, --nfs, --mount, --gcsfuse, --data, --poll,\
 --restarts and --worker, each as --name=value; --spot, --dry-run; and, after\
 --, flags of mocov3_jax.train." ;;
  esac
  shift
done
DATA=${DATA:-$MOUNT/tensorflow_datasets}
flags=$(quote "$@")

for setting in NAME ZONE ACCELERATOR VERSION REPO REF; do
  if [ -z "${!setting}" ]; then
    fail "$setting is empty. Allowed: a value (see the head of $0)."
  fi
done
for setting in POLL RESTARTS; do
  if ! [[ ${!setting} =~ ^[0-9]{1,6}$ ]]; then
    fail "$setting=${!setting}. Allowed: a whole number."
  fi
done
for setting in SPOT DRY_RUN; do
  if ! [[ ${!setting} =~ ^[01]$ ]]; then
    fail "$setting=${!setting}. Allowed: 0, 1."
  fi
done
if ! [[ $WORKER =~ ^([0-9]{1,5}|all)$ ]]; then
  fail "WORKER=$WORKER. Allowed: a worker's number, or all."
fi
if [[ $BUCKET == *[:/]* ]]; then
  fail "BUCKET=$BUCKET. Allowed: the name alone, without gs:// and folders."
fi
if [ -n "$BUCKET" ] && [ -n "$NFS" ]; then
  fail "BUCKET=$BUCKET and NFS=$NFS. Allowed: one of them."
fi
case $command in
  run | watch | all)
    if [[ " $*" != *\ --config=* || " $*" != *\ --workdir=* ]]; then
      fail "'$command -- $flags'. Allowed: at least --config=FILE and\
 --workdir=DIR after --."
    fi ;;
esac
case $command in
  watch | all)
    if [ -z "$BUCKET$NFS" ]; then
      fail "'$command' without storage that outlives the slice. Allowed: with\
 --bucket=NAME or --nfs=HOST:/SHARE."
    fi ;;
esac

# --- What is done on the workers -------------------------------------------

mounting() {
  if [ -z "$BUCKET$NFS" ]; then return; fi
  cat <<END
sudo mkdir -p $(quote "$MOUNT")
if ! mountpoint -q $(quote "$MOUNT"); then
  apt="sudo DEBIAN_FRONTEND=noninteractive apt-get -qy"
  apt="\$apt -o DPkg::Lock::Timeout=300"
END
  if [ -n "$NFS" ]; then
    # Locks of the worker alone (nolock): a lock on the server would stay when
    # the slice that holds it is preempted, and keep the next one out.
    cat <<END
  \$apt update && \$apt install nfs-common
  sudo mount -t nfs -o nolock $(quote "$NFS" "$MOUNT")
  sudo chown "\$(id -u)" $(quote "$MOUNT")
END
  else
    # A checkpoint is a folder that is renamed once complete, and all workers
    # must see at once what one has written: no caches.
    local deb="gcsfuse_${GCSFUSE}_amd64.deb"
    local from="https://github.com/GoogleCloudPlatform/gcsfuse/releases"
    cat <<END
  curl -fsSL -o $(quote "/tmp/$deb" "$from/download/v$GCSFUSE/$deb")
  \$apt update && \$apt install $(quote "/tmp/$deb")
  sudo chown "\$(id -u)" $(quote "$MOUNT")
  gcsfuse --implicit-dirs --rename-dir-limit=200000 \\
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \\
    $(quote "$BUCKET" "$MOUNT")
END
  fi
  echo 'fi'
}

# The images bring Python 3.10; uv fetches one that the project is tested on.
installing() {
  cat <<END
set -eo pipefail
$(mounting)
[ -d mocov3_jax/.git ] || git clone -q $(quote "$REPO") mocov3_jax
cd mocov3_jax
git fetch -q origin $(quote "$REF")
git checkout -q --detach FETCH_HEAD
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
[ -x .venv/bin/python ] || python3 -m uv venv -q --seed --python=3.12 .venv
.venv/bin/python -m pip install -q -r requirements.txt "jax[tpu]"
END
}

# The same text on every worker, which asks the metadata server for its place,
# as jax.distributed does. Said by flags, since TPU_WORKER_HOSTNAMES, by which
# the program knows that there are others, is set on GKE alone. Without a TPU
# the platforms make the program fail, where it would train on the CPU.
running() {
  cat <<END
set -eo pipefail
cd mocov3_jax
if kill -0 "\$(cat train.pid 2>/dev/null)" 2>/dev/null; then
  echo "already running"
  exit
fi
about() {
  curl -fsS -H Metadata-Flavor:Google \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/\$1"
}
me=\$(about agent-worker-number)
workers=\$(about worker-network-endpoints)
IFS=, read -ra all <<<"\$workers"
together=
if [ \${#all[@]} -gt 1 ]; then
  together="--coordinator=\${all[0]##*:}:8482 --num_processes=\${#all[@]}"
  together="\$together --process_id=\$me"
fi
rm -f train.code train.pid train.stopped
export JAX_PLATFORMS=tpu,cpu TFDS_DATA_DIR=$(quote "$DATA")
nohup setsid sh -c '"\$@" & echo \$! >train.pid
wait \$!; echo \$? >train.code' sh \\
  .venv/bin/python -m mocov3_jax.train \\
  $flags \$together \\
  </dev/null >>train.log 2>&1 &
until [ -s train.pid ]; do sleep 1; done
echo "started on worker \$me of \${#all[@]}"
END
}

marking() {  # For `watch`: the user wants no more of it.
  cat <<'END'
if [ -d mocov3_jax ]; then touch mocov3_jax/train.stopped; fi
END
}

halting() {  # What does not end within two minutes is killed.
  cat <<'END'
cd mocov3_jax || exit 0
pid=$(cat train.pid 2>/dev/null) || exit 0
kill -TERM "$pid" 2>/dev/null || exit 0
for i in $(seq 120); do
  sleep 1
  kill -0 "$pid" 2>/dev/null || exit 0
done
kill -KILL "$pid"
END
}

# Prints running, stopped, an exit code, or lost (a worker was restarted, say).
asking() {
  cat <<'END'
if kill -0 "$(cat mocov3_jax/train.pid 2>/dev/null)" 2>/dev/null; then
  echo running
elif [ -e mocov3_jax/train.stopped ]; then
  echo stopped
else
  cat mocov3_jax/train.code 2>/dev/null || echo lost
fi
END
}

# --- What is done from here ------------------------------------------------

tpu() {  # tpu VERB [ARGUMENT ...]
  local line=(gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" --quiet)
  if [ -n "$PROJECT" ]; then line+=(--project="$PROJECT"); fi
  line+=("${@:2}")
  if [ "$DRY_RUN" = 1 ]; then quote "${line[@]}"; else "${line[@]}"; fi
}

say() {  # To stderr; in a dry run a comment between the lines.
  if [ "$DRY_RUN" = 1 ]; then echo "# $1"; else echo "$1" >&2; fi
}

on() {  # on WORKER TEXT
  tpu ssh --worker="$1" --command="$2"
}

create() {
  local arguments=(--accelerator-type="$ACCELERATOR" --version="$VERSION")
  if [ "$SPOT" = 1 ]; then arguments+=(--spot); fi
  tpu create "${arguments[@]}"
}

install() { on all "$(installing)"; }

run() { on all "$(running)"; }

logs() { on "$WORKER" 'tail -n 100 -F mocov3_jax/train.log'; }

stop() { on all "$(marking; halting)"; }

halt() { on all "$(halting)"; }

delete() { tpu delete; }

start_again() {  # start_again COMMAND ...; `watch` looks after what fails.
  local each
  for each in "$@"; do
    if ! "$each"; then
      say "$each failed; looking again in $POLL s"
      return
    fi
  done
}

recreate() {
  say "deleting the slice and creating it anew"
  delete || say "there was nothing to delete"
  until create; do
    say "not created; trying again in $POLL s"
    sleep "$POLL"
  done
  start_again install run
}

restart() {
  say "running again"
  # Others may still wait for the process that broke. They are not marked as
  # stopped: if this fails half-way, the next look has to try again.
  start_again halt install run
}

watch() {
  local left=$RESTARTS state code
  if [ "$DRY_RUN" = 1 ]; then
    say "every $POLL s:"
    tpu describe --format='value(state)'
    say "while READY, is it running, or what was its exit code?"
    on 0 "$(asking)"
    say "if PREEMPTED or TERMINATED:"
    recreate
    say "if it was not stopped, and its exit code is neither 0 nor 2:"
    restart
    return
  fi
  while :; do
    state=$(tpu describe --format='value(state)') || state=UNKNOWN
    code=running
    if [ "$state" = READY ]; then
      code=$(on 0 "$(asking)" | tail -n 1) || code=running
    fi
    case $state/$code in
      READY/0 | READY/2)
        say "the training ended with exit code $code"
        return "$code" ;;
      READY/stopped)
        say "the training was stopped"
        return 143 ;;
      READY/running | READY/) ;;
      READY/* | PREEMPTED/* | TERMINATED/*)
        say "$state, training: $code, restarts left: $left"
        if ((left-- == 0)); then
          echo "error: given up after $RESTARTS restarts" >&2
          return 1
        fi
        if [ "$state" = READY ]; then restart; else recreate; fi ;;
      *) say "$state" ;;
    esac
    sleep "$POLL"
  done
}

all() {
  create
  install
  run
  local code=0
  watch || code=$?
  if ((code)); then
    say "the slice is still there"
    return "$code"
  fi
  delete
}

"$command"
