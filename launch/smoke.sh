#!/usr/bin/env bash
# Pre-trains a small ViT on handwritten digits: minutes on two CPU cores.
#
#   bash launch/smoke.sh [--workdir=DIR] [--config.FIELD=VALUE ...]
#
# The first run makes .venv and installs the project into it. Results go
# to runs/smoke; the last line on stdout is one JSON object. The same command
# again continues, or, when the run is complete, shows its results.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
use_venv .
exec "$python" -m mocov3_jax.train \
  --config=configs/digits.py --workdir=runs/smoke "$@"
