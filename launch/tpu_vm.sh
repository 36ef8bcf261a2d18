#!/usr/bin/env bash
# One run on Cloud TPU VMs: queues for them, installs, trains on all workers, starts again after a preemption.
#
#     export ZONE=us-east5-a TYPE=v6e-64 RUNTIME=v2-alpha-tpuv6e TIER=reserved NFS=10.0.0.2:/runs
#     launch/tpu_vm.sh [--dry-run] run NAME --config configs/X.py --workdir /mnt/runs/W
#     launch/tpu_vm.sh stop NAME       every process saves and ends (as Ctrl-C in `run` does)
#     launch/tpu_vm.sh delete NAME     gives the TPUs back
#
# `run` may be repeated at any time: what is there is used, and the run goes on from its newest checkpoint. It restarts
# a run that ends early, RESTARTS times at most (by default 50), with new TPUs where they were taken away; not after a
# mistake of the user's (exit status 2) or a loss that is not finite (3).
#
#     TIER     reserved, spot, or empty for on demand
#     SLICES   slices of TYPE (by default 1); they are joined over the data-centre network
#     NFS      HOST:/SHARE of the folder that all workers have as /mnt/runs (Filestore)
#     PROJECT  by default gcloud's own
set -euo pipefail

dry=
if [[ ${1-} == --dry-run ]]; then dry=yes; shift; fi
if (($# < 2)); then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; fi
action=$1 name=$2; shift 2
where=(--zone="${ZONE:?the zone of the TPUs}"); [[ ${PROJECT-} ]] && where+=(--project="$PROJECT")
queue=(gcloud compute tpus queued-resources)
all=(--node=all --worker=all --batch-size=all)  # the default, batches of 64 workers in turn, would wait for ever
# Brackets: or the shell that does this would find itself.
leave='pkill -TERM -f [s]slx.main; while pgrep -f [s]slx.main >/dev/null; do sleep 1; done'

run() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_all() { run "${queue[@]}" ssh "$name" "${where[@]}" "${all[@]}" --command="$1"; }
delete() { run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }

state() {  # of the request for the TPUs; NONE if there is none
    if [[ $dry ]]; then echo "${had:+ACTIVE}"; return; fi
    "${queue[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo NONE
}

create() {
    local wanted=(--accelerator-type="${TYPE:?such as v6e-64}" --runtime-version="${RUNTIME:?such as v2-alpha-tpuv6e}")
    if ((${SLICES:-1} > 1)); then wanted+=(--node-count="$SLICES"); else wanted+=(--node-id="$name"); fi
    [[ ${TIER-} ]] && wanted+=("--$TIER")
    run "${queue[@]}" create "$name" "${where[@]}" "${wanted[@]}"
    had=yes
}

wait_for_tpus() {
    while :; do
        case $(state) in
            ACTIVE) return ;;
            NONE | "") create ;;
            SUSPENDED) delete ;;  # preempted: a new request
            FAILED)
                echo "tpu_vm.sh: the request failed; '${queue[*]} describe $name ${where[*]}' says why" >&2
                exit 2 ;;
            *) sleep "${POLL_S:-30}" ;;
        esac
    done
}

install() {  # the files of this checkout, committed or not; Python comes with uv, the image's own is older than 3.11
    local archive mount=
    archive=$(mktemp --suffix=.tgz)
    (cd "$(dirname "$0")/.." && git ls-files -co --exclude-standard -z | tar --null -T - -czf "$archive")
    if [[ ${NFS-} ]]; then
        mount="mountpoint -q /mnt/runs || { sudo apt-get install -qq nfs-common && sudo mkdir -p /mnt/runs &&
            sudo mount $NFS /mnt/runs && sudo chmod 777 /mnt/runs; }"
    fi
    run "${queue[@]}" scp "$archive" "$name:sslx.tgz" "${where[@]}" "${all[@]}" && rm "$archive" && on_all "set -e
        mkdir -p sslx && tar xzf sslx.tgz -C sslx && cd sslx
        python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.12 .venv
        python3 -m uv pip install -q -c constraints.txt -e '.[tpu]'
        $mount"
}

case $action in
    delete) delete ;;
    stop) on_all "$leave" ;;
    run)
        trap 'on_all "$leave"; exit 130' INT TERM
        for ((restart = 0; ; restart++)); do
            wait_for_tpus
            status=0
            # Only one process can hold a TPU: what a connection that broke left running ends first.
            { on_all "$leave" && install && on_all "cd sslx && .venv/bin/python -m sslx.main$(printf ' %q' "$@")"; } ||
                status=$?
            case $status in 0 | 2 | 3) exit "$status" ;; esac
            if ((restart >= ${RESTARTS:-50})); then exit "$status"; fi
            echo "tpu_vm.sh: ended with status $status, restart $((restart + 1)) of ${RESTARTS:-50}" >&2
        done ;;
    *) echo "tpu_vm.sh: $action is none of run, stop, delete" >&2; exit 2 ;;
esac
