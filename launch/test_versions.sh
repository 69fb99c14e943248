#!/usr/bin/env bash
# Runs the smoke run and the tests on other versions than those of .venv, each
# in a fresh clone of the last commit.
#
#   bash launch/test_versions.sh NAME ... [-- FURTHER ARGUMENTS OF launch/test.sh]
#
#   oldest    Python 3.11 and the lower bounds of requirements.txt and the extras
#   PYTHON    the newest versions allowed, on an interpreter: python3.12, or a
#             path such as /opt/python3.13/bin/python3
#   trixie    Debian 13 with nothing but Python 3.13, git and a C compiler
#   forky     Debian 14 likewise, with Python 3.14
#
# The last two need debootstrap and root. Everything is created in the folder
# that MOCOV3_VERSIONS names, by default /tmp/mocov3_versions, and reused later,
# except for the clones. A table comes last; the exit code is 1 if any version
# failed.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${MOCOV3_VERSIONS:-/tmp/mocov3_versions}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
packages=python3,python3-venv,git,gcc,libc6-dev,ca-certificates

fail() {
  echo "error: $1" >&2
  exit 2
}

make_root() {  # make_root SUITE: a Debian system in $folder/SUITE.
  local root=$folder/$1
  if ! [ -e "$root/usr/bin/python3" ]; then
    command -v debootstrap >/dev/null || fail "$1 needs debootstrap. Use:\
 apt-get install debootstrap."
    [ "$(id -u)" = 0 ] || fail "$1 needs root, as debootstrap does."
    rm -rf "$root"
    # A suite newer than debootstrap is made by the script for sid.
    local script=/usr/share/debootstrap/scripts/$1
    [ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid
    debootstrap --variant=minbase --include="$packages" "$1" "$root" \
      "$mirror" "$script" >&2
  fi
  # Certificates that this machine trusts, such as those of a mirror.
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  cp /etc/resolv.conf "$root/etc/"
  mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
  mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
}

check() {  # check NAME: both scripts, in a clone; sets $result.
  local name=$1 clone python='' enter=() extras
  case $name in
    trixie | forky)
      make_root "$name"
      clone=$folder/$name/mocov3_jax
      enter=(chroot "$folder/$name" env HOME=/root) ;;
    *)
      clone=$folder/clones/${name//\//_}
      python=$name
      if [ "$name" = oldest ]; then python=python3.11; fi
      command -v "$python" >/dev/null || fail "there is no $python." ;;
  esac
  rm -rf "$clone"
  git clone -q . "$clone"
  if [ "$name" = oldest ]; then
    sed -i -E 's/>=([^,]+).*/==\1.*/' "$clone/requirements.txt"
    # Likewise the extras, of which `test` takes those that it needs.
    extras='/^\[project.optional/,/^\[project.scripts/'
    sed -i -E "$extras s/>=([0-9.]+)[^\";]*/==\\1.*/" "$clone/pyproject.toml"
  fi
  local inside=$clone
  if ((${#enter[@]})); then inside=/mocov3_jax; fi
  # shellcheck disable=SC2016  # The inner shell is to expand it.
  "${enter[@]}" env PYTHON="$python" JAX_PLATFORMS=cpu bash -o pipefail -c '
    cd "$0" && bash launch/smoke.sh | tail -n 1 >smoke.json &&
      bash launch/test.sh "$@" 2>&1 | tee test.log | tail -n 3 >&2
    ' "$inside" "${arguments[@]}" &&
    result=passed || result=FAILED
  result+=$(printf '  %s  jax %s  smoke %s  %s' \
    "$("${enter[@]}" "$inside/.venv/bin/python" --version)" \
    "$("${enter[@]}" "$inside/.venv/bin/python" -c 'import jax; print(jax.__version__)')" \
    "$(grep -o '"knn/top1": [0-9.]*' "$clone/smoke.json" || echo none)" \
    "$(tail -n 1 "$clone/test.log" 2>/dev/null || true)")
}

names=() arguments=()
while (($#)); do
  if [ "$1" = -- ]; then
    shift
    arguments=("$@")
    break
  fi
  names+=("$1")
  shift
done
((${#names[@]})) || fail "no version was named. Use: oldest, trixie, forky, or\
 an interpreter such as python3.12."

mkdir -p "$folder"
table='' code=0
for name in "${names[@]}"; do
  echo "== $name" >&2
  check "$name"
  table+="$name: $result"$'\n'
  [[ $result == passed* ]] || code=1
done
printf '%s' "$table"
exit "$code"
