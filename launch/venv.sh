# Sourced by the scripts beside it: makes .venv on first use, reuses it after.
#
# use_venv .         installs the project into .venv, unless that has been done
#                    since its requirements last changed, and sets $python.
# use_venv '.[test]' likewise, with an extra of pyproject.toml.
# PYTHON=/path/to/python chooses the interpreter that .venv is made with.

in_range() {  # Those on which the tests have been run: Python 3.11 to 3.14.
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
    >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} \
    python3 python3.14 python3.13 python3.12 python3.11 python; do
    if in_range "$candidate"; then
      echo "$candidate"
      return
    fi
    if [ -n "${PYTHON:-}" ]; then break; fi
  done
  cat >&2 <<END
error: no Python 3.11 to 3.14 was found (${PYTHON:-python3} is $(
    "${PYTHON:-python3}" --version 2>&1 || echo absent)).
Get one in any of these ways, and run the same command again:
  uv:              uv python install 3.13 && export PYTHON="\$(uv python find 3.13)"
  conda:           conda create -n mocov3 python=3.13 && conda activate mocov3
  Debian, Ubuntu:  apt-get install python3 python3-venv
  macOS:           brew install python@3.13
  any other:       PYTHON=/path/to/python3.13 bash $0
END
  exit 2
}

use_venv() {
  local project=$1 stamp=.venv/installed wanted base
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
  wanted="$project $(cat pyproject.toml requirements.txt | cksum)"
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing $project into .venv" >&2
    "$python" -m pip install --quiet --disable-pip-version-check \
      --editable "$project" >&2
    echo "$wanted" >> "$stamp"
  fi
}
