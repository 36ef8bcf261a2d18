#!/usr/bin/env bash
# One run of several processes on this machine, each with simulated CPU devices: a cluster in small.
#
#     launch/local.sh [--dry-run] N K [flags of sslx.main]      N processes with K devices each
#     launch/local.sh 2 2 --config configs/quickstart.py:debug --workdir /tmp/two
#
# A run that fails, or whose processes are told to stop, goes on from its newest checkpoint, RESTARTS times at most
# (by default 3); not after a mistake of the user's (exit status 2) or a loss that is not finite (3). Ctrl-C saves.
# PYTHON is the interpreter, by default python.
set -euo pipefail

dry=
if [[ ${1-} == --dry-run ]]; then dry='echo'; shift; fi
if (($# < 2)); then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; fi
n=$1 k=$2; shift 2
python=${PYTHON:-python}
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$k"

set -m  # a process group for each: Ctrl-C comes here, and the processes get one signal each
pids=() stopping=
trap 'stopping=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

grace_s=20  # from the end of the first process to that of the last

alive() {  # how many processes of the run there are
    local pid count=0
    for pid in "${pids[@]}"; do if kill -0 "$pid" 2>/dev/null; then ((++count)); fi; done
    echo "$count"
}

pause() { sleep 0.2 & wait $! || true; }  # in the background, where Ctrl-C does not end it in place of this script

run() {  # starts the processes and waits for all; the status is 2 or 3 if any ended so, or that of another failure
    local port status=0 ended process pid waited
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    pids=()
    for ((process = 0; process < n; process++)); do
        $dry "$python" -m sslx.main "$@" --coordinator="127.0.0.1:$port" --processes="$n" --process="$process" &
        pids+=($!)
    done
    # Those that are left end by themselves, except one that still waits for a process that never came.
    while (($(alive) == n)); do pause; done
    for ((waited = 0; waited < 5 * grace_s && $(alive) > 0; waited++)); do pause; done
    kill -KILL "${pids[@]}" 2>/dev/null || true
    for pid in "${pids[@]}"; do
        ended=0; wait "$pid" || ended=$?
        while kill -0 "$pid" 2>/dev/null; do ended=0; wait "$pid" || ended=$?; done  # a trapped signal ends a wait
        if ((ended != 0 && status != 2 && status != 3)); then status=$ended; fi
    done
    return "$status"
}

for ((restart = 0; ; restart++)); do
    status=0; run "$@" || status=$?
    case $status in 0 | 2 | 3) exit "$status" ;; esac
    if [[ $stopping ]] || ((restart >= ${RESTARTS:-3})); then exit "$status"; fi
    echo "local.sh: ended with status $status, restart $((restart + 1)) of ${RESTARTS:-3}" >&2
done
