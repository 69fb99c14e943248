# Sourced by the scripts beside it: makes .venv on first use, reuses it after.
#
# use_venv FILE   installs a requirements file into .venv, unless that has been
#                 done since it last changed, and sets $python.
# PYTHON=/path/to/python chooses the interpreter that .venv is made with.

in_range() {  # Python 3.11 and 3.12, on which the tests have been run.
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
    >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python; do
    if in_range "$candidate"; then
      echo "$candidate"
      return
    fi
    if [ -n "${PYTHON:-}" ]; then break; fi
  done
  echo "error: no Python 3.11 or 3.12 found (tried ${PYTHON:-python3," \
    "python3.12, python3.11, python}; python3 is" \
    "$(python3 --version 2>&1 || echo absent)). Install one, or name it:" \
    "PYTHON=/path/to/python3.12 bash $0" >&2
  exit 2
}

use_venv() {
  local requirements=$1 stamp=.venv/installed wanted base
  python=.venv/bin/python
  if ! in_range "$python"; then
    base=$(find_python) || exit 2
    echo "making .venv with $("$base" --version)" >&2
    rm -rf .venv
    if ! "$base" -m venv .venv >&2; then
      rm -rf .venv
      echo "error: '$base -m venv' failed. On Debian and Ubuntu:" \
        "apt-get install python3-venv" >&2
      exit 2
    fi
  fi
  wanted="$requirements $(cat requirements*.txt | cksum)"
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing $requirements into .venv" >&2
    "$python" -m pip install --quiet --disable-pip-version-check \
      -r "$requirements" >&2
    echo "$wanted" >> "$stamp"
  fi
}
