"""Several processes as one run: how they find each other, stop at one step, and end together.

A process that runs alone has no coordinator, and nothing here does anything in it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from sslx.config import UserError

# Machines of a pod start, and come back after a preemption, minutes apart.
START_S = 600
# A thread of C++ sends a heartbeat twice in this time, and neither compiling nor reading data holds it up: such a
# silence is a dead machine or network, and the others have ended within 20 s. (Processes that fail in any other way
# say so at once, see `fail`. A broken connection also tells of a dead coordinator and, in collectives on CPU, of any
# dead process; but not in a collective of accelerators, nor in the barriers of a save.)
HEARTBEAT_S = 15
# At the end all wait for process 0, which writes the report.
END_S = 600
# How long a process that failed stays, and the coordinator once more, so that the others hear why and not just that a
# connection broke.
HEARD_S = 1.0
FOREVER_MS = 10**12

Number = TypeVar("Number", int, float)

FAILED = "sslx/failed"  # "process status reason" of the first that failed

# What this process does, given the exit status, before the failure of another ends it.
last_acts: list[Callable[[int], None]] = []


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> int:
    """Joins the processes of this run and returns this one's number; before JAX starts its backend.

    With all three arguments they say who takes part; with none, the environment does, as far as JAX knows it: Open
    MPI, SLURM, TPU pods, indexed Kubernetes jobs. Raises UserError for arguments that cannot be.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in flags.items() if value is None]
    if missing and len(missing) < len(flags):
        given = " and ".join(name for name in flags if name not in missing)
        raise UserError(f"{given} without {' and '.join(missing)}: give all three, the same --coordinator=HOST:PORT"
                        " and --processes=N to each process and --process=0 ... N-1; or none of them on SLURM, Open MPI"
                        " and TPU pods")
    explicit: dict[str, Any] = {}
    if coordinator is not None and processes is not None and process is not None:
        check(coordinator, processes, process)
        # "deactivate": otherwise JAX would still take the number of the GPU from SLURM.
        explicit = dict(coordinator_address=coordinator, num_processes=processes, process_id=process,
                        cluster_detection_method="deactivate")
    if (processes or detected()) == 1:
        return 0
    jax.config.update("jax_enable_preemption_service", False)  # until `share_notices`
    jax.distributed.initialize(**explicit, initialization_timeout=START_S, heartbeat_timeout_seconds=HEARTBEAT_S,
                               shutdown_timeout_seconds=END_S)
    threading.Thread(target=end_with_the_first, daemon=True).start()
    return coordination().process_id


def check(coordinator: str, processes: int, process: int) -> None:
    """Raises UserError for an address without a port, and for a number that no process has."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator is {coordinator!r}; it takes HOST:PORT, the machine of process 0 and a free"
                        " port there, such as 10.0.0.1:8476")
    if processes < 1:
        raise UserError(f"--processes is {processes}; it takes the number of processes of the run, at least 1")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}; with --processes={processes} it takes 0 to {processes - 1}, another"
                        " one in each process")


def detected() -> int:
    """How many processes the environment speaks of; 1 where it does not."""
    # What jax.distributed.initialize() asks too; but it raises where nothing is found.
    from jax._src.clusters import ClusterEnv

    environments = (e for e in ClusterEnv._cluster_types if not e.opt_in_only_method and e.is_env_present())
    found = next(environments, None)
    return 1 if found is None else found.get_process_count()


def coordination():
    """JAX's state of the processes: `process_id`, and the `client` of the coordinator, None where there is none."""
    from jax._src.distributed import global_state

    return global_state


def settle(x: Any) -> Any:
    """`x`, waited for where programs in flight at once hang: on CPU their collectives wait for each other.

    Seen with JAX 0.10.2 after three steps of two processes with two devices each. Accelerators run one after the other.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(x)
    return x


def barrier(name: str) -> None:
    """Returns when every process is here."""
    multihost_utils.sync_global_devices(name)


def agreed(answer: bool) -> bool:
    """The answer of process 0; all must ask at the same step."""
    return bool(answer) if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(answer))


def total(n: Number) -> Number:
    """The sum of a number, of 32 bits, over the processes, which must all ask at the same step."""
    return n if jax.process_count() == 1 else multihost_utils.process_allgather(n).sum().item()


# To stop at one step the processes must agree on it. JAX's preemption service does so on the side: SIGTERM to one
# process becomes a notice to all, threads of C++ exchange how far each has come, and the step after the furthest is
# the last. The question at each step is a look at a number of this process: no collective, no waiting device.

def share_notices(step: int) -> None:
    """From here on SIGTERM asks all processes to stop; before, it ends the process that gets it.

    The service counts from `step`: a notice before it is known would choose a step that a resumed run never sees.
    """
    jax.config.update("jax_enable_preemption_service", True)
    coordination().initialize_preemption_sync_manager()
    stops_after(step)


def stops_after(step: int) -> bool:
    """Whether this is the step that all have agreed to stop after; to be asked at every step, by every process."""
    return multihost_utils.reached_preemption_sync_point(step)


def fail(status: int, reason: str) -> None:
    """Ends all processes with the status and the reason of this one; returns if it is alone.

    Otherwise they would wait for it in their next collective, and it for them in JAX's shutdown.
    """
    client, process = coordination().client, coordination().process_id
    if client is None:
        return
    try:
        client.key_value_set(FAILED, f"{process} {status} {reason}")
    except jax.errors.JaxRuntimeError:
        time.sleep(3 * HEARD_S)  # another one failed before, and `end_with_the_first` ends this one; or nobody hears
    print(f"\nprocess {process}: {reason}", file=sys.stderr, flush=True)
    leave(process, status)


def abort(status: int, reason: str) -> NoReturn:
    """`fail` from any thread, alone or not."""
    sys.stdout.flush()
    fail(status, reason)
    print(f"\n{reason}", file=sys.stderr, flush=True)
    os._exit(status)


def end_with_the_first() -> None:
    """In a thread: waits for a process to fail, and ends this one too."""
    process = coordination().process_id
    try:
        first, status, reason = coordination().client.blocking_key_value_get(FAILED, FOREVER_MS).split(" ", 2)
    except jax.errors.JaxRuntimeError:
        return  # all ended well; or the coordinator is gone, of which the heartbeats tell
    if int(first) != process:
        for act in last_acts:
            act(int(status))
        sys.stdout.flush()
        print(f"\nprocess {process}: ended, since process {first} failed: {reason}", file=sys.stderr, flush=True)
        leave(process, int(status))


def leave(process: int, status: int) -> NoReturn:
    """Ends this process without waiting for others; process 0, the coordinator, last."""
    time.sleep(HEARD_S * (2 if process == 0 else 1))
    os._exit(status)


def finish() -> None:
    """Waits until every process has come to its end."""
    jax.distributed.shutdown()
