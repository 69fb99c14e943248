#!/usr/bin/env bash
# Lints and tests. Further arguments go to pytest:
#
#   bash launch/test.sh              the suite
#   bash launch/test.sh -m slow      the long tests
#   bash launch/test.sh -k resume    by name
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh
use_venv '.[test]'
"$python" -m ruff check .
export JAX_PLATFORMS=cpu
# A process per core; a file's tests stay together, since they share fixtures, and
# files come in the order of tests/conftest.py.
exec "$python" -m pytest --numprocesses=auto --dist=loadfile \
  --no-loadscope-reorder "$@"
