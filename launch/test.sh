#!/usr/bin/env bash
# Lints and tests. Further arguments go to pytest:
#
#   bash launch/test.sh              the suite
#   bash launch/test.sh -m slow      the long tests
#   bash launch/test.sh -k resume    by name
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
use_venv requirements-test.txt
"$python" -m ruff check .
# The tests see eight devices of their own making. They compile more than they
# compute: LLVM does less for them, XLA does the same.
export XLA_FLAGS=--xla_backend_optimization_level=0
export JAX_PLATFORMS=cpu
# A process a core; a file's tests stay together, since they share fixtures.
exec "$python" -m pytest --numprocesses=auto --dist=loadfile "$@"
