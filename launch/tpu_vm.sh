#!/usr/bin/env bash
# `aromni` on every host of a TPU VM, over ssh; the hosts find each other by themselves.
#
#   bash launch/tpu_vm.sh my-v5e-256 us-west4-a -- train --config=configs/pretrain.py:7b --workdir=/mnt/shared/7b
#   bash launch/tpu_vm.sh --dry-run my-v5e-256 us-west4-a -- doctor --workdir=/mnt/shared/7b
#
# The hosts have `aromni` installed (or set BEFORE to what makes it so, such as "source ~/venv/bin/activate") and share
# the workdir. A host whose run hung, was killed or lost another one starts it again, up to TRIES times (default 20);
# an error of the user (status 1 or 2) ends it.
set -euo pipefail

usage() { echo "usage: bash launch/tpu_vm.sh [--dry-run] TPU ZONE -- aromni arguments" >&2; exit 2; }

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then dry_run=true; shift; fi
[[ $# -ge 4 && "$1" != -* && "$2" != -* && "$3" == -- ]] || usage
name=$1 zone=$2
shift 3

arguments=$(printf '%q ' "$@")
remote="${BEFORE:-true} && for try in \$(seq ${TRIES:-20}); do aromni ${arguments% }; status=\$?;"
remote+=' if [ $status -le 2 ]; then exit $status; fi;'
remote+=" echo \"aromni ended with status \$status (try \$try of ${TRIES:-20})\" >&2; sleep 15; done; exit \$status"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")
if $dry_run; then printf '%q ' "${command[@]}"; echo; exit 0; fi
exec "${command[@]}"
