#!/usr/bin/env bash
# The main job on a fresh machine: makes .venv, installs the package, runs `aromni quickstart`. Run again: it goes on.
#   bash launch/quickstart.sh [--workdir=DIR] [more arguments of aromni quickstart]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "launch/quickstart.sh: needs Python >= 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
if [ ! -x .venv/bin/python ]; then
  echo "making .venv"
  "$python" -m venv .venv
fi
. .venv/bin/activate
echo "installing the package"
pip install --quiet --disable-pip-version-check -e .
arguments=("$@")
case " $* " in *" --workdir"*) ;; *) arguments+=(--workdir=runs/quickstart) ;; esac
exec aromni quickstart "${arguments[@]}"
