#!/usr/bin/env bash
# `aromni` on every host of a TPU VM, over ssh; the hosts find each other by themselves.
#
#   bash launch/tpu_vm.sh my-v5e-256 us-west4-a -- train --config=configs/pretrain.py:7b,mesh=v5e-256 \
#     --workdir=/mnt/shared/7b
#   bash launch/tpu_vm.sh --dry-run my-v5e-256 us-west4-a -- doctor --workdir=/mnt/shared/7b
#
# The hosts have `aromni` installed (or set BEFORE to what makes it so, such as "source ~/venv/bin/activate") and share
# the workdir. A host whose run hung, was killed, was told to stop or lost another one starts it again, up to TRIES
# times (default 20); an error of the user (status 1 or 2) ends it.
#
# The run outlives the connection and Ctrl-C: every host writes ~/aromni.log, which is shown here. To look again, and to
# end the run (it saves first, and does not start again):
#
#   gcloud compute tpus tpu-vm ssh my-v5e-256 --zone=us-west4-a --worker=0 --command='tail -n 100 -F ~/aromni.log'
#   gcloud compute tpus tpu-vm ssh my-v5e-256 --zone=us-west4-a --worker=all --command='kill $(cat ~/aromni.pid)'
set -euo pipefail

usage() { echo "usage: bash launch/tpu_vm.sh [--dry-run] TPU ZONE -- aromni arguments" >&2; exit 2; }

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then dry_run=true; shift; fi
[[ $# -ge 4 && "$1" != -* && "$2" != -* && "$3" == -- ]] || usage
name=$1 zone=$2
shift 3

# What is stopped before its end is not done. Of flags given twice the last one counts: the user's.
if [[ "$1" == train ]]; then set -- train --exit_status_if_stopped=75 "${@:2}"; fi

# A shell hears a signal only while what it waits for runs beside it.
loop='trap "stopped=yes; kill \$child" TERM; stopped=; for try in $(seq "$1"); do aromni "${@:2}" & child=$!;'
loop+=' wait $child; status=$?; if [ "$stopped" ]; then wait $child; exit; fi;'
loop+=' if [ $status -le 2 ]; then exit $status; fi; echo "aromni ended with status $status (try $try of $1)";'
loop+=' sleep 15 & child=$!; wait $child; if [ "$stopped" ]; then exit $status; fi; done; exit $status'

remote="${BEFORE:-true}"' && { log=~/aromni.log; pid=$(cat ~/aromni.pid 2>/dev/null);'
remote+=' if grep -qs aromni "/proc/$pid/cmdline"; then'
remote+=' echo "aromni runs on $(hostname) already: see $log, and stop it with: kill $pid" >&2; exit 1; fi;'
remote+=' touch $log; seen=$(wc -c < $log);'
remote+=" nohup bash -c $(printf '%q ' "$loop" aromni "${TRIES:-20}" "$@")"
remote+='>> $log 2>&1 < /dev/null & pid=$!; echo $pid > ~/aromni.pid;'
remote+=' tail -c +$((seen + 1)) -f --pid=$pid $log; wait $pid; }'
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")
if $dry_run; then printf '%q ' "${command[@]}"; echo; exit 0; fi
exec "${command[@]}"
