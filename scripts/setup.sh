#!/usr/bin/env bash
# Makes .venv with the project in it: scripts/setup.sh [EXTRA]. Sourced by quickstart.sh and test.sh.
# On Linux it also installs OpenBLAS and g++ with apt-get where it may; MLX's CPU build is slow without the first and
# runs uncompiled without the second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
if [ "$(uname)" = Linux ]; then
  PATH=$PATH:/sbin:/usr/sbin
  extras=${extras:+$extras,}cpu
  missing=
  [[ $(ldconfig -p) == *libopenblas.so.0* ]] || missing+=" libopenblas0-pthread"
  command -v g++ >/dev/null || missing+=" g++"
  if [ -n "$missing" ] && command -v apt-get >/dev/null; then
    echo "installing$missing"
    root=
    [ "$(id -u)" = 0 ] || root="sudo -n"
    # shellcheck disable=SC2086
    { $root apt-get -qq update && $root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $missing; } >/dev/null ||
      echo "could not install$missing: training runs without, more slowly"
  fi
fi

python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ] && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Python 3.11 or later is needed: install it and set PYTHON to it, as in PYTHON=python3.12 $0"
  exit 2
fi
echo "setting up .venv"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
