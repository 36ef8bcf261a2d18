"""A process of several that is told to stop, or dies, ends the others in time, and the job goes on to the same end."""

import os
import re
import signal
import subprocess
import sys
import time

import campaign
import command
import pytest
import runs

STOPPED_S = 10.0
LAUNCHER = command.ROOT / "launch" / "local.sh"


def start_under_slurm(n, *flags):
    """Starts n processes with what srun sets for each, and no flag that tells them of each other."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(n),
           "JAX_COORDINATOR_PORT": str(command.free_port())}
    return [command.start(*flags, variables=job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
            for i in range(n)]


def test_sigterm_to_one_process_stops_all_at_one_step(untouched, tmp_path):
    """Under SLURM. All end in time with the state saved, and the same command ends as if nothing had happened."""
    whole = untouched("mixture")
    processes = start_under_slurm(2, *whole.line, "--workdir", tmp_path)
    command.wait(processes[0], lambda: runs.newest_step(tmp_path) >= 1)
    processes[1].send_signal(signal.SIGTERM)
    told = time.monotonic()
    for process in processes:
        process.wait(STOPPED_S)
    print(f"all ended {time.monotonic() - told:.1f} s after SIGTERM")
    (status, out, _), (other_status, other_out, err) = command.end_all(processes)
    assert (status, other_status) == (130, 130), err
    stopped = runs.newest_checkpoint(tmp_path)
    assert 1 < stopped < whole.steps and f"stopped at step {stopped} of {whole.steps}" in out
    assert "stopped" not in other_out and "Traceback" not in err
    ended = command.end_all(start_under_slurm(2, *whole.line, "--workdir", tmp_path))
    assert [status for status, _, _ in ended] == [0, 0], ended
    campaign.assert_same_end(tmp_path, whole)


def test_local_sh_goes_on_after_kills(untouched, tmp_path):
    """kill -9 of the worker, then of the coordinator: the other ends in time, and the script starts both again."""
    whole, log = untouched("mixture"), tmp_path / "log"
    with log.open("w") as file:
        script = subprocess.Popen([LAUNCHER, "2", "1", *map(str, whole.line), "--workdir", tmp_path / "w"],
                                  env=command.environment(PYTHON=sys.executable), cwd=command.ROOT,
                                  stdout=file, stderr=subprocess.STDOUT)
    for life, victim in enumerate((1, 0)):
        done = campaign.begun(tmp_path / "w")
        command.wait(script, lambda done=done: campaign.begun(tmp_path / "w") > done + 4)
        pids = processes_of(script)
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        command.wait(script, lambda pids=pids: not set(pids) & set(processes_of(script)))
        print(f"process {1 - victim} ended {time.monotonic() - killed:.1f} s after process {victim} was killed")
        assert time.monotonic() - killed < campaign.ENDED_S
        command.wait(script, lambda life=life: f"restart {life + 1} of 3" in log.read_text())
    assert script.wait(300) == 0, log.read_text()
    restarts = re.findall(r"ended with status (\d+), restart (\d) of 3", log.read_text())
    assert [number for _, number in restarts] == ["1", "2"] and not {status for status, _ in restarts} & {"0", "2", "3"}
    campaign.assert_same_end(tmp_path / "w", whole)


def processes_of(script: subprocess.Popen) -> list[int]:
    """The processes that local.sh has started, in order."""
    found = subprocess.run(["pgrep", "-f", "sslx.main", "-P", str(script.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_frozen_process_is_missed(victim, untouched, tmp_path):
    """SIGSTOP: to the other a machine that is gone, whose connections stay open. Only heartbeats tell."""
    processes = command.start_all(2, *untouched("mixture").line, "--workdir", tmp_path, devices=1)
    try:
        command.wait(processes[0], lambda: runs.newest_step(tmp_path) >= 2)
        processes[victim].send_signal(signal.SIGSTOP)
        assert processes[1 - victim].wait(campaign.ENDED_S) not in (0, 2, 3)
    finally:
        processes[victim].kill()
        command.end_all(processes)
