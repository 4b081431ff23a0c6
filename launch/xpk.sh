#!/usr/bin/env bash
# `aromni` on TPU slices of a GKE cluster that XPK made: one workload, which XPK turns into a JobSet.
#
#   IMAGE=REGISTRY/aromni CLUSTER=my-cluster TPU_TYPE=v5litepod-256 \
#     bash launch/xpk.sh my-run -- train --config=configs/pretrain.py:7b,mesh=v5e-256 --workdir=/shared/7b
#   bash launch/xpk.sh --dry-run my-run -- train ...      # prints the command, submits nothing
#
# SLICES (default 1) is the number of slices. On several, `train` is given SLICES as mesh.num_slices and mesh.data;
# what you give yourself counts (a layout whose `data` is 4 wants --config.mesh.data=8 on two). PROJECT and ZONE
# default to those of gcloud. The workdir lies on storage that all pods share: attach it to the cluster once (`xpk
# storage attach NAME --auto-mount=true ...`). A run that was killed, was stopped before its end, hung or lost a
# process starts again, up to TRIES times (default 100), and goes on from its last checkpoint; an error of the user
# (status 1 or 2) ends it. XPK itself restarts after statuses 42 and 127 to 255, so ours are named.
set -euo pipefail

usage() { echo "usage: bash launch/xpk.sh [--dry-run] NAME -- aromni arguments" >&2; exit 2; }

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then dry_run=true; shift; fi
[[ $# -ge 3 && "$1" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && "$2" == -- ]] || usage
name=$1
shift 2

# What is stopped before its end is not done. Of flags given twice the last one counts: the user's.
if [[ "$1" == train ]]; then
  if ((${SLICES:-1} > 1)); then
    set -- train --config.mesh.num_slices="$SLICES" --config.mesh.data="$SLICES" "${@:2}"
  fi
  set -- train --exit_status_if_stopped=75 "${@:2}"
fi

arguments=$(printf '%q ' "$@")
command=(xpk workload create --workload="$name" --cluster="${CLUSTER:-aromni}" --tpu-type="${TPU_TYPE:-v5litepod-256}"
  --num-slices="${SLICES:-1}" --docker-image="${IMAGE:-aromni-jax:latest}" --max-restarts="${TRIES:-100}"
  --restart-on-exit-codes=14,70,75 --termination-grace-period-seconds=300 --command="aromni ${arguments% }")
if [[ -n "${PROJECT:-}" ]]; then command+=(--project="$PROJECT"); fi
if [[ -n "${ZONE:-}" ]]; then command+=(--zone="$ZONE"); fi
if $dry_run; then printf '%q ' "${command[@]}"; echo; exit 0; fi
exec "${command[@]}"
