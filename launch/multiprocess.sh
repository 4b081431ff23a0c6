#!/usr/bin/env bash
# N processes of one training run on this machine, on CPU devices, joined over loopback: to try what several hosts do.
#
#   bash launch/multiprocess.sh 2 -- train --config=configs/pretrain.py:debug --workdir=runs/two
#   bash launch/multiprocess.sh --dry-run 2 -- train ...     # prints the commands, runs nothing
#
# DEVICES sets the CPU devices of each process (default 1), PORT the coordinator's port (default: a free one).
# SIGTERM and SIGINT are passed on to every process; the exit status is the first one that is not 0.
set -euo pipefail

usage() { echo "usage: bash launch/multiprocess.sh [--dry-run] N -- aromni arguments" >&2; exit 2; }

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then dry_run=true; shift; fi
[[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" == -- && $# -ge 3 ]] || usage
num_processes=$1
shift 2

python=${PYTHON:-python}
if [[ -n "${PORT:-}" ]]; then
  port=$PORT
elif $dry_run; then
  port=PORT
else
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-1}
pids=()
for ((id = 0; id < num_processes; id++)); do
  command=("$python" -m launch.cli "$@"
    --coordinator_address="127.0.0.1:$port" --num_processes="$num_processes" --process_id="$id")
  if $dry_run; then
    printf '%q ' JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$JAX_NUM_CPU_DEVICES" "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
if $dry_run; then exit 0; fi

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  # A trapped signal ends `wait` early: wait again for the process itself.
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  if ((code != 0 && status == 0)); then
    status=$code
    # The others would wait for a process that is gone.
    kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$status"
