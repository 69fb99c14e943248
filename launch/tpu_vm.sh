#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM slice, from creation to deletion.
#
#   bash launch/tpu_vm.sh COMMAND [--SETTING=VALUE ...] [-- FLAG ...]
#
#   create    the slice; waits while the zone has no capacity
#   install   the storage, the code and its requirements, on every worker
#   run       starts the training on every worker, and leaves it running
#   logs      follows its output (Ctrl-C stops only the following)
#   watch     until the training is complete or stopped: a preempted slice is
#             deleted, created anew, installed and run again; a run that broke
#             is run again, unless the input was bad
#   stop      has the training save and end
#   delete    the slice; its disks go with it
#   all       create, install, run and watch; then delete, however it ended
#
# Needs gcloud, logged in, and git. For instance, ViT-B/16 on a Spot slice:
#
#   bash launch/tpu_vm.sh all --spot --name=b16 --zone=us-west4-a \
#       --accelerator=v5litepod-16 --data-bucket=my-images -- \
#       --config=configs/imagenet/vit_b16.py --workdir=gs://my-bucket/b16 \
#       --config.micro_batch=32
#
# Not yet run on a Cloud TPU. The tests run what --dry-run prints, `watch` and
# `all` against a stand-in for gcloud; the gcloud commands themselves are
# unproven.
#
# The workers get the files that git tracks, in their current state on this
# disk, including uncommitted changes. A run continues exactly only with the
# code that it began with, so start a long one from a checkout that you will not
# change.
#
# Nothing is remembered between commands: give each of them the same settings,
# as flags or as environment variables with the name in capitals
# (SERVICE_ACCOUNT).
#
#  1. --name=mocov3     of the slice.
#  2. --zone=us-west4-a --project=ID (default: gcloud's own).
#  3. --accelerator=v5litepod-16, and the image that belongs to it,
#     --version=v2-alpha-tpuv5-lite. v6e-16: v2-alpha-tpuv6e. v5p-16:
#     v2-alpha-tpuv5. v4-16: tpu-ubuntu2204-base.
#  4. --spot            (SPOT=1) costs less, and can be preempted at any time.
#     --reserved        (RESERVED=1) takes the chips of your reservation.
#     --queued          (QUEUED=1) asks for the slice as a queued resource, and
#     waits for its turn.
#  5. --network=NAME --subnetwork=NAME --service-account=ADDRESS  of the slice.
#     --create=FLAG     any other flag of gcloud's create command; repeat
#     --create for each of them: --create=--reservation=projects/...
#  6. The workdir must be visible to all workers and outlive the slice:
#     --workdir=gs://BUCKET/FOLDER  needs nothing else; the service account of
#     the slice must be allowed to write there. Or else
#     --bucket=NAME or --nfs=HOST:/SHARE  is mounted at --mount=/mnt/mocov3 on
#     every worker. A Filestore share (--nfs) is an ordinary file system. In a
#     bucket mounted by gcsfuse, a file is uploaded when it is closed, that is,
#     at each save.
#     --gcsfuse=3.0.0  is the version that is installed.
#  7. Images are read from --disk-mount=/mnt/data, where one of these is mounted
#     for reading:
#     --disk=projects/P/zones/Z/disks/NAME  is attached to every worker; it is
#     faster than a bucket.
#     --data-bucket=NAME   metadata of its files is cached without expiry: the
#     bucket must not change while it is mounted.
#  8. --data=FOLDER     sets TFDS_DATA_DIR, the folder of prepared data sets
#     (docs/data.md); by default tensorflow_datasets in the mount of 7, or else
#     in that of 6. It may be gs://BUCKET/FOLDER.
#  9. --poll=60         seconds between two checks by `create` and `watch`;
#     --restarts=20     number of restarts before `watch` gives up.
# 10. --keep            (KEEP=1) does not delete the slice after `all`; it keeps
#     costing money. Ctrl-C during `all` does not delete it either, since the
#     training goes on.
# 11. --worker=0        the worker whose output `logs` follows: a number, or
#     all. The first process reports for the run; the others report only errors.
# 12. --dry-run         (DRY_RUN=1) prints the gcloud commands without running
#     them.
# 13. --compiled=FOLDER  keeps compiled programs, for the next slice; by default
#     beside the workdir, in `compiled`.
# 14. --program=train   or evaluate, which runs on all workers in the same way.
# 15. --extras=hf,wandb  further extras of the package to install (README.md).
# 16. --env=NAME=VALUE  a variable for the program, and --env again for each
#     further one, such as WANDB_API_KEY. Whoever may log in to a worker can
#     read it.
# 17. After --, the flags of mocov3_jax.train (or evaluate), the same on every
#     worker.
#
# When a worker is shut down, its processes get SIGTERM; the program then saves
# and ends with 143. A Spot slice is given half a minute. If that is too short,
# the run continues from its newest regular checkpoint (config.save).
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
RESERVED=${RESERVED:-0}
QUEUED=${QUEUED:-0}
NETWORK=${NETWORK:-}
SUBNETWORK=${SUBNETWORK:-}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
BUCKET=${BUCKET:-}
NFS=${NFS:-}
MOUNT=${MOUNT:-/mnt/mocov3}
GCSFUSE=${GCSFUSE:-3.0.0}
DISK=${DISK:-}
DATA_BUCKET=${DATA_BUCKET:-}
COMPILED=${COMPILED:-}
PROGRAM=${PROGRAM:-train}
EXTRAS=${EXTRAS:-}
DISK_MOUNT=${DISK_MOUNT:-/mnt/data}
DATA=${DATA:-}
POLL=${POLL:-60}
RESTARTS=${RESTARTS:-20}
WORKER=${WORKER:-0}
KEEP=${KEEP:-0}
DRY_RUN=${DRY_RUN:-0}
more=()
variables=()

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
    --reserved) RESERVED=1 ;;
    --queued) QUEUED=1 ;;
    --network=*) NETWORK=$value ;;
    --subnetwork=*) SUBNETWORK=$value ;;
    --service-account=*) SERVICE_ACCOUNT=$value ;;
    --create=*) more+=("$value") ;;
    --bucket=*) BUCKET=$value ;;
    --nfs=*) NFS=$value ;;
    --mount=*) MOUNT=$value ;;
    --gcsfuse=*) GCSFUSE=$value ;;
    --disk=*) DISK=$value ;;
    --disk-mount=*) DISK_MOUNT=$value ;;
    --data-bucket=*) DATA_BUCKET=$value ;;
    --compiled=*) COMPILED=$value ;;
    --program=*) PROGRAM=$value ;;
    --extras=*) EXTRAS=$value ;;
    --env=*) variables+=("$value") ;;
    --data=*) DATA=$value ;;
    --poll=*) POLL=$value ;;
    --restarts=*) RESTARTS=$value ;;
    --worker=*) WORKER=$value ;;
    --keep) KEEP=1 ;;
    --dry-run) DRY_RUN=1 ;;
    *) fail "'$1'. Allowed: --name, --zone, --project, --accelerator,\
 --version, --network, --subnetwork, --service-account, --create, --bucket,\
 --nfs, --mount, --gcsfuse, --disk, --disk-mount, --data-bucket, --data,\
 --compiled, --program, --extras, --env, --poll, --restarts and --worker, each\
 as --name=value;\
 --spot, --reserved, --queued, --keep, --dry-run; and, after --, flags of\
 mocov3_jax.train." ;;
  esac
  shift
done
if [ -n "$DISK$DATA_BUCKET" ]; then
  DATA=${DATA:-$DISK_MOUNT/tensorflow_datasets}
fi
DATA=${DATA:-$MOUNT/tensorflow_datasets}
flags=$(quote "$@")
workdir=
for flag in "$@"; do
  if [[ $flag == --workdir=* ]]; then
    workdir=${flag#--workdir=}
    workdir=${workdir%/}
  fi
done
if [[ $workdir == */* ]]; then
  COMPILED=${COMPILED:-${workdir%/*}/compiled}
fi
COMPILED=${COMPILED:-compiled}

for setting in NAME ZONE ACCELERATOR VERSION; do
  if [ -z "${!setting}" ]; then
    fail "$setting is empty. Allowed: a value (see the head of $0)."
  fi
done
if ! [[ $EXTRAS =~ ^[a-z0-9,-]*$ ]]; then
  fail "EXTRAS=$EXTRAS. Allowed: names of extras, such as hf,wandb."
fi
for variable in ${variables[@]+"${variables[@]}"}; do
  if ! [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
    fail "--env=$variable. Allowed: NAME=VALUE."
  fi
done
for setting in POLL RESTARTS; do
  if ! [[ ${!setting} =~ ^[0-9]{1,6}$ ]]; then
    fail "$setting=${!setting}. Allowed: a whole number."
  fi
done
for setting in SPOT RESERVED QUEUED KEEP DRY_RUN; do
  if ! [[ ${!setting} =~ ^[01]$ ]]; then
    fail "$setting=${!setting}. Allowed: 0, 1."
  fi
done
if ! [[ $WORKER =~ ^([0-9]{1,5}|all)$ ]]; then
  fail "WORKER=$WORKER. Allowed: a worker's number, or all."
fi
# No setting may be taken for an option of gcloud, gcsfuse or mount.
if ! [[ $NAME =~ ^[a-z][a-z0-9-]*$ ]]; then
  fail "NAME=$NAME. Allowed: small letters, digits and -, a letter first."
fi
if ! [[ $BUCKET =~ ^([a-z0-9][a-z0-9._-]*)?$ ]]; then
  fail "BUCKET=$BUCKET. Allowed: the name alone, without gs:// and folders."
fi
if ! [[ $DATA_BUCKET =~ ^([a-z0-9][a-z0-9._-]*)?$ ]]; then
  fail "DATA_BUCKET=$DATA_BUCKET. Allowed: the name alone, without gs:// and\
 folders."
fi
if ! [[ $PROGRAM =~ ^(train|evaluate)$ ]]; then
  fail "PROGRAM=$PROGRAM. Allowed: train, evaluate."
fi
if [ -n "$DISK" ] && [ -n "$DATA_BUCKET" ]; then
  fail "--disk and --data-bucket. Allowed: one of them."
fi
if ! [[ $NFS =~ ^([A-Za-z0-9][A-Za-z0-9.-]*:/.*)?$ ]]; then
  fail "NFS=$NFS. Allowed: HOST:/SHARE."
fi
if ! [[ $GCSFUSE =~ ^[0-9][0-9.]*$ ]]; then
  fail "GCSFUSE=$GCSFUSE. Allowed: a version, such as 3.0.0."
fi
if [ -n "$BUCKET" ] && [ -n "$NFS" ]; then
  fail "BUCKET=$BUCKET and NFS=$NFS. Allowed: one of them."
fi
if ((SPOT && RESERVED)); then
  fail "--spot and --reserved. Allowed: one of them."
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
    if [ -z "$BUCKET$NFS" ] && [[ $workdir != gs://* ]]; then
      fail "'$command' without storage that outlives the slice. Allowed: with\
 --workdir=gs://BUCKET/FOLDER, --bucket=NAME or --nfs=HOST:/SHARE."
    fi ;;
esac

# --- The code, which goes to the workers ------------------------------------

cd "$(dirname "$0")/.."
archive=mocov3_jax.tar.gz
case $command in
  install | watch | all)
    git rev-parse --is-inside-work-tree >/dev/null 2>&1 || fail "$PWD is no\
 checkout of git, whose files the workers get. Allowed: a clone."
    for flag in "$@"; do
      config=${flag#--config=}
      config=${config%%:*}
      if [[ $flag == --config=* && -e $config ]] &&
        ! git ls-files --error-unmatch "$config" >/dev/null 2>&1; then
        fail "$flag: git does not track $config, so the workers do not get it.\
 Allowed: after 'git add $config'."
      fi
    done
    # Packed once: what is installed again later is the same.
    if [ "$DRY_RUN" = 0 ]; then
      scratch=$(mktemp -d)
      trap 'rm -rf "$scratch"' EXIT
      archive=$scratch/$archive
      git ls-files -z | while IFS= read -r -d '' file; do
        if [ -e "$file" ]; then printf '%s\0' "$file"; fi
      done | tar --null -czf "$archive" -T -
    fi ;;
esac

# --- What is done on the workers -------------------------------------------

mounting() {
  if [ -n "$DISK" ]; then
    # The attached disk is the one without partitions.
    cat <<END
sudo mkdir -p $(quote "$DISK_MOUNT")
if ! mountpoint -q $(quote "$DISK_MOUNT"); then
  for device in \$(lsblk -dnpo NAME --include 8,259); do
    if [ "\$(lsblk -no NAME "\$device" | wc -l)" = 1 ]; then
      sudo mount -o ro,noload "\$device" $(quote "$DISK_MOUNT")
      break
    fi
  done
  mountpoint -q $(quote "$DISK_MOUNT")
fi
END
  fi
  if [ -n "$BUCKET$DATA_BUCKET" ]; then gcsfuse_installing; fi
  if [ -n "$DATA_BUCKET" ]; then
    # Nobody writes there: everything that is known of a file stays true.
    cat <<END
sudo mkdir -p $(quote "$DISK_MOUNT")
if ! mountpoint -q $(quote "$DISK_MOUNT"); then
  sudo chown "\$(id -u)" $(quote "$DISK_MOUNT")
  gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 \\
    --stat-cache-max-size-mb=-1 --type-cache-max-size-mb=-1 \\
    $(quote "$DATA_BUCKET" "$DISK_MOUNT")
fi
END
  fi
  if [ -z "$BUCKET$NFS" ]; then return; fi
  cat <<END
sudo mkdir -p $(quote "$MOUNT")
if ! mountpoint -q $(quote "$MOUNT"); then
END
  if [ -n "$NFS" ]; then
    # Locks are local to the worker (nolock): a lock on the server would outlive
    # a slice that is preempted, and keep the next slice out.
    cat <<END
  $APT update && $APT install nfs-common
  sudo mount -t nfs -o nolock $(quote "$NFS" "$MOUNT")
  sudo chown "\$(id -u)" $(quote "$MOUNT")
END
  else
    # All workers must see at once what one has written: no caches.
    cat <<END
  sudo chown "\$(id -u)" $(quote "$MOUNT")
  gcsfuse --implicit-dirs \\
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \\
    $(quote "$BUCKET" "$MOUNT")
END
  fi
  echo 'fi'
}

# As root, from Google's package repository, which is signed.
APT='sudo DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=300'
gcsfuse_installing() {
  cat <<END
if ! command -v gcsfuse >/dev/null; then
  keys=/usr/share/keyrings/cloud.google.asc
  from=https://packages.cloud.google.com/apt
  curl -fsSL \$from/doc/apt-key.gpg | sudo tee \$keys >/dev/null
  echo "deb [signed-by=\$keys] \$from gcsfuse-\$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  $APT update && $APT install $(quote "gcsfuse=$GCSFUSE")
fi
END
}

# The images bring Python 3.10; uv fetches one that the project is tested on.
installing() {
  cat <<END
set -eo pipefail
$(mounting)
mkdir -p mocov3_jax && cd mocov3_jax
rm -rf code && mkdir code
tar -xzf ../mocov3_jax.tar.gz -C code
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user "uv>=0.5,<1"
[ -x .venv/bin/python ] || python3 -m uv venv -q --seed --python=3.12 .venv
.venv/bin/python -m pip install -q -e "./code[tpu,gcs${EXTRAS:+,$EXTRAS}]"
END
}

# The same script on every worker. Like jax.distributed, it asks the metadata
# server for the worker's number and its peers. They are passed as flags, since
# TPU_WORKER_HOSTNAMES, by which the program would find its peers, is set only
# on GKE. JAX_PLATFORMS makes the program fail without a TPU, instead of
# training on the CPU.
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
export JAX_COMPILATION_CACHE_DIR=$(quote "$COMPILED")
${variables:+export $(quote "${variables[@]}")}
cd code
nohup setsid sh -c '"\$@" & echo \$! >../train.pid
wait \$!; echo \$? >../train.code' sh \\
  ../.venv/bin/python -m mocov3_jax.$PROGRAM \\
  $flags \$together \\
  </dev/null >>../train.log 2>&1 &
until [ -s ../train.pid ]; do sleep 1; done
echo "started on worker \$me of \${#all[@]}"
END
}

marking() {  # Lets `watch` know that the user stopped the training.
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

cloud() {  # cloud KIND VERB NAME [ARGUMENT ...]
  local line=(gcloud compute tpus "$1" "$2" "$3" --zone="$ZONE" --quiet)
  if [ -n "$PROJECT" ]; then line+=(--project="$PROJECT"); fi
  line+=("${@:4}")
  if [ "$DRY_RUN" = 1 ]; then quote "${line[@]}"; else "${line[@]}"; fi
}

say() {  # To stderr; in a dry run a comment between the lines.
  if [ "$DRY_RUN" = 1 ]; then echo "# $1"; else echo "$1" >&2; fi
}

tpu() { cloud tpu-vm "$1" "$NAME" "${@:2}"; }

queue() { cloud queued-resources "$1" "$NAME" "${@:2}"; }

on() {  # on WORKER TEXT
  tpu ssh --worker="$1" --command="$2"
}

request() {
  local arguments=(--accelerator-type="$ACCELERATOR")
  if ((SPOT)); then arguments+=(--spot); fi
  if ((RESERVED)); then arguments+=(--reserved); fi
  if [ -n "$NETWORK" ]; then arguments+=(--network="$NETWORK"); fi
  if [ -n "$SUBNETWORK" ]; then arguments+=(--subnetwork="$SUBNETWORK"); fi
  if [ -n "$SERVICE_ACCOUNT" ]; then
    arguments+=(--service-account="$SERVICE_ACCOUNT")
  fi
  if [ -n "$DISK" ]; then
    arguments+=(--data-disk="source=$DISK,mode=read-only")
  fi
  arguments+=(${more[@]+"${more[@]}"})
  if ((QUEUED)); then
    queue create --node-id="$NAME" --runtime-version="$VERSION" \
      "${arguments[@]}"
  else
    tpu create --version="$VERSION" "${arguments[@]}"
  fi
}

create() {
  local said
  until said=$(request 2>&1); do
    echo "$said" >&2
    # Anything else, such as a quota, does not change by waiting.
    if ! grep -qi capacity <<<"$said"; then return 1; fi
    say "no capacity; trying again in $POLL s"
    sleep "$POLL"
  done
  echo "$said"
  if ((QUEUED)); then in_turn; fi
}

in_turn() {  # Waits until a queued slice is there.
  local state
  if [ "$DRY_RUN" = 1 ]; then
    queue describe --format='value(state.state)'
    say "until that is ACTIVE"
    return
  fi
  while :; do
    state=$(queue describe --format='value(state.state)') || state=UNKNOWN
    say "queued: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep "$POLL"
  done
}

install() {
  # Not "$NAME" alone: the second word of scp is where the file goes.
  cloud tpu-vm scp "$archive" "$NAME:mocov3_jax.tar.gz" --worker=all
  on all "$(installing)"
}

run() { on all "$(running)"; }

logs() { on "$WORKER" 'tail -n 100 -F mocov3_jax/train.log'; }

stop() { on all "$(marking; halting)"; }

halt() { on all "$(halting)"; }

delete() {
  if ((QUEUED)); then queue delete --force; else tpu delete; fi
}

slice_state() {
  local state=ACTIVE
  if ((QUEUED)); then
    state=$(queue describe --format='value(state.state)') || state=UNKNOWN
  fi
  case $state in
    ACTIVE) tpu describe --format='value(state)' ;;
    FAILED | SUSPENDING | SUSPENDED) echo PREEMPTED ;;
    *) echo "$state" ;;
  esac
}

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
  while :; do
    # A request that failed has to go before the next one, too.
    delete || say "there was nothing to delete"
    if create; then break; fi
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
    slice_state
    say "while READY, is it running, or what was its exit code?"
    on 0 "$(asking)"
    say "if PREEMPTED or TERMINATED:"
    recreate
    say "if it was not stopped, and its exit code is neither 0 nor 2:"
    restart
    return
  fi
  while :; do
    state=$(slice_state) || state=UNKNOWN
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
  # Whatever ends it, the slice is not left to cost money without a word.
  trap 'exit 130' INT TERM HUP
  trap 'finish $?' EXIT
  create
  install
  run
  watch
}

finish() {  # finish CODE
  trap '' INT TERM HUP
  trap - EXIT
  if (($1 == 130 || KEEP)); then
    say "the slice $NAME is still there, and costs money until it is deleted:\
 bash launch/tpu_vm.sh delete $(again)"
  else
    if (($1 && !DRY_RUN)); then
      say "exit code $1; the end of the log of worker 0:"
      on 0 'tail -n 50 mocov3_jax/train.log' >&2 || true
    fi
    delete || say "the slice $NAME could not be deleted; if it is there, it\
 costs money"
  fi
  rm -rf "${scratch:-}"
  exit "$1"
}

again() {  # The settings that name the slice.
  local words=(--name="$NAME" --zone="$ZONE")
  if [ -n "$PROJECT" ]; then words+=(--project="$PROJECT"); fi
  if ((QUEUED)); then words+=(--queued); fi
  quote "${words[@]}"
}

"$command"
