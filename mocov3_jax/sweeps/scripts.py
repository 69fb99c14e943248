"""A sweep for a scheduler: its runs as a Slurm array, or as a JobSet."""

from collections.abc import Sequence
import json
import shlex

# Runs at a time.
PARALLEL = 4
# Where the JobSet mounts what outlives its pods.
MOUNT = '/mnt/mocov3/'

_SLURM = """\
#!/usr/bin/env bash
# A sweep under Slurm: each task of the array is a run, on one GPU.
#
#   sbatch THIS_FILE
#
# from the repository's folder, after step 1 of launch/slurm.sbatch, which says
# why each line is as it is. Submitted again, it continues what was stopped; a
# run that is done ends at once. `python -m mocov3_jax.sweep`, with the flags
# that this was made with, less --print, shows the table once all have ended.
#SBATCH --job-name=mocov3-sweep
# So many runs, and how many of them at a time.
#SBATCH --array=0-{last}%{parallel}
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail

runs=(
{runs}
)

cd "${{SLURM_SUBMIT_DIR:-.}}"
# A run that finds no GPU fails, where it would train on the CPU.
export JAX_PLATFORMS="${{JAX_PLATFORMS:-cuda,cpu}}"
code=0
# The signal reaches the shell as well, which must wait for the save.
srun --cpus-per-task="${{SLURM_CPUS_PER_TASK:-8}}" \\
  bash -c "trap : TERM; ${{runs[SLURM_ARRAY_TASK_ID]}}" || code=$?
if ((code == 143)); then
  echo "stopped after saving; back into the queue" >&2
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""

_JOBSET = """\
# A sweep on GKE: each index of the job is a run, on a node of one TPU chip.
#
#   kubectl apply -f THIS_FILE
#
# after REGISTRY and BUCKET have been replaced; launch/gke_jobset.yaml says
# what has to be there. Applied again, it continues what was stopped; a run that
# is done ends at once. `python -m mocov3_jax.sweep`, with the flags that this
# was made with, less --print, shows the table where the bucket is mounted.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: mocov3-sweep
spec:
  # Runs do not wait for each other: each starts again alone, see below.
  failurePolicy:
    maxRestarts: 0
  replicatedJobs:
    - name: runs
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {count}
          # Runs at a time.
          parallelism: {parallel}
          # After a preemption (143: saved) or a lost node a run continues. Bad
          # input and divergence (2) would come again; they end that run.
          backoffLimitPerIndex: 100
          podFailurePolicy:
            rules:
              - action: FailIndex
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
                cloud.google.com/gke-tpu-topology: 1x1
              terminationGracePeriodSeconds: 120
              serviceAccountName: mocov3
              containers:
                - name: train
                  image: REGISTRY/mocov3_jax:tpu
                  resources:
                    limits:
                      google.com/tpu: 1
                  securityContext:
                    privileged: true
                    runAsUser: 0
                  # SIGTERM reaches this shell alone, which hands it on and
                  # waits for the save.
                  command:
                    - bash
                    - -c
                    - |
                      set -m
                      line="${{@:JOB_COMPLETION_INDEX+1:1}}"
                      bash -c "trap : TERM; $line" & run=$!
                      trap 'kill -TERM -- "-$run"' TERM
                      code=0
                      wait "$run" || code=$?
                      while kill -0 "$run" 2>/dev/null; do
                        code=0
                        wait "$run" || code=$?
                      done
                      exit "$code"
                    - sweep
{runs}
                  env:
                    - name: JAX_PLATFORMS
                      value: tpu,cpu
                    - name: TFDS_DATA_DIR
                      value: /mnt/mocov3/tensorflow_datasets
                  volumeMounts:
                    - name: storage
                      mountPath: /mnt/mocov3
              volumes:
                - name: storage
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: BUCKET
                      mountOptions: "implicit-dirs,\\
                        file-system:rename-dir-limit:200000,\\
                        metadata-cache:ttl-secs:0,\\
                        metadata-cache:negative-ttl-secs:0"
"""


def line(commands: Sequence[Sequence[str]]) -> str:
  """Commands as one line of shell, each after the success of the one before."""
  return ' && '.join(shlex.join(command) for command in commands)


def slurm(lines: Sequence[str]) -> str:
  """The sbatch script of an array job.

  Args:
    lines: of shell, one a run.
  """
  return _SLURM.format(
      last=len(lines) - 1, parallel=min(PARALLEL, len(lines)),
      runs='\n'.join(f'  {shlex.quote(text)}' for text in lines),
  )


def jobset(lines: Sequence[str]) -> str:
  """The YAML of a JobSet; a JSON string is one of YAML as well.

  Args:
    lines: of shell, one a run.
  """
  # Kubernetes itself would look for variables named $(...).
  quoted = [json.dumps(text.replace('$(', '$$(')) for text in lines]
  return _JOBSET.format(
      count=len(lines), parallel=min(PARALLEL, len(lines)),
      runs='\n'.join(f'{" " * 20}- {text}' for text in quoted),
  )
