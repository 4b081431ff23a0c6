#!/usr/bin/env bash
# `aromni` on TPU slices of a GKE cluster: fills in launch/gke_jobset.yaml and applies it. The cluster has JobSet.
#
#   IMAGE=REGISTRY/aromni CLAIM=shared ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=16x16 HOSTS=64 CHIPS=4 \
#     bash launch/gke.sh my-run -- train --config=configs/pretrain.py:7b,mesh=v5e-256 --workdir=/shared/7b
#   bash launch/gke.sh --dry-run my-run -- train ...      # prints the manifest, applies nothing
#
# HOSTS is the number of machines of a slice, CHIPS that of chips of a machine, SLICES (default 1) that of slices;
# CLAIM, a ReadWriteMany volume claim, is mounted at /shared. On several slices `train` is given SLICES as
# mesh.num_slices and mesh.data; what you give yourself counts (a layout whose `data` is 4 wants --config.mesh.data=8
# on two). A run that is stopped before its end, because machines are drained, starts again like one that failed.
set -euo pipefail

usage() { echo "usage: bash launch/gke.sh [--dry-run] NAME -- aromni arguments" >&2; exit 2; }

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

# A JSON list is a YAML list.
arguments=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
fill() { manifest=${manifest//"{{$1}}"/"$2"}; }
fill NAME "$name"
fill IMAGE "${IMAGE:-aromni-jax:latest}"
fill CLAIM "${CLAIM:-aromni-shared}"
fill ACCELERATOR "${ACCELERATOR:-tpu-v5-lite-podslice}"
fill TOPOLOGY "${TOPOLOGY:-16x16}"
fill HOSTS "${HOSTS:-64}"
fill CHIPS "${CHIPS:-4}"
fill SLICES "${SLICES:-1}"
fill ARGUMENTS "$arguments"
if $dry_run; then printf '%s\n' "$manifest"; exit 0; fi
printf '%s\n' "$manifest" | kubectl apply -f -
