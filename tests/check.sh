#!/usr/bin/env bash
# Checks the whole house on a machine with nothing but Python >= 3.11 and pip: ruff, types, tests, a five-step run.
# Makes .venv-check once and uses it again. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
venv=.venv-check

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "tests/check.sh: needs Python >= 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
if [ ! -x "$venv/bin/python" ]; then "$python" -m venv "$venv"; fi
. "$venv/bin/activate"
# torch first and pinned: a resolver asked for plain torch takes gigabytes of CUDA packages. Byte code comes with the
# first import: pip would make it of every file, most of which nobody imports, and takes a minute or more for that.
pip install --quiet --disable-pip-version-check --no-compile "torch==2.13.0"
pip install --quiet --disable-pip-version-check --no-compile -e ".[dev]"
export JAX_PLATFORMS=cpu
cache="$(mktemp -d)"
trap 'rm -rf "$cache"' EXIT
# Tests compile the same small programs again and again; a cache for this run only.
export JAX_COMPILATION_CACHE_DIR="$cache/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

echo "== ruff"
ruff check .
ruff format --check .
echo "== types"
mypy
echo "== five training steps"
aromni train --config=configs/pretrain.py:debug --config.total_steps=5 --workdir="$cache/five_steps"
echo "== tests"
python -m pytest -n 2 -v --durations=15
