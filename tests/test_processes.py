"""Several real processes make one run: it ends like that of one process, and stops, fails and goes on as one."""

import os
import signal
import subprocess

import command
import numpy as np
import pytest
from runs import assert_identical, newest_checkpoint, newest_step, points, saved_state

from sslx import distributed
from sslx.config import UserError

STEPS = 12
SHORT = (f"--config.run.steps={STEPS}", f"--config.optim.steps={STEPS}", "--config.run.log_every=1",
         "--config.run.save_every=4", "--config.run.eval_every=6", "--config.model.dtype=float32")
LAUNCH = command.ROOT / "launch"


def config(folder, name):
    """A config's debug variant without the probe, which takes longer than all the rest and runs on one device."""
    return command.variant(folder, name, "config.evals.probe = None")


def assert_close(one, other, tolerance):
    """The same points of the log with the same counters; metrics and final state agree to `tolerance`.

    Not to the bit: Gloo and a process by itself add the summands of four devices in another order.
    """
    found, expected = points(one), points(other)
    assert found.keys() == expected.keys()
    for key, point in found.items():
        metrics, others = point.pop("metrics"), expected[key].pop("metrics")
        assert point == expected[key] and metrics.keys() == others.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, others[name], rtol=tolerance, atol=tolerance, err_msg=f"{key} {name}")
    state, others = saved_state(one), saved_state(other)
    assert state.keys() == others.keys() and len(state) > 10
    for name, x in state.items():
        np.testing.assert_allclose(x, others[name], rtol=tolerance, atol=tolerance, err_msg=name)


def killed_and_resumed(line, workdir, n):
    """Kills the last process after the first checkpoint; the others end; the same command ends the run."""
    processes = command.start_all(n, *line, "--workdir", workdir)
    command.wait(processes[0], lambda: newest_checkpoint(workdir) and newest_step(workdir) >= 5)
    processes[-1].send_signal(signal.SIGKILL)
    statuses = [status for status, _, _ in command.end_all(processes)]
    assert statuses[-1] == -signal.SIGKILL and not {0, 2, 3, 130} & set(statuses[:-1])  # a launcher starts it again
    for status, out, err in command.end_all(command.start_all(n, *line, "--workdir", workdir)):
        assert status == 0, err
        assert ("resumed at step" in out) == ("finished after" in out)  # both from process 0 alone


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """(command line, workdir) of the quickstart by two processes with two devices each, one of them killed."""
    folder = tmp_path_factory.mktemp("two")
    line = ["--config", config(folder, "quickstart"), *SHORT]
    killed_and_resumed(line, folder / "w", 2)
    return line, folder / "w"


def test_two_processes_end_like_one(resumed, tmp_path):
    line, workdir = resumed
    status, _, err = command.run(*line, "--workdir", tmp_path, devices=4)
    assert status == 0, err
    assert_close(workdir, tmp_path, 1e-5)


def test_process_that_fails_ends_the_others_with_its_status(resumed):
    line, workdir = resumed
    port = command.free_port()
    processes = [command.start(*line, "--workdir", workdir, f"--coordinator=127.0.0.1:{port}", "--processes=2",
                               f"--process={i}", f"--config.optim.clip={i + 1.0}", devices=2) for i in range(2)]
    (status, _, err), (other_status, _, other_err) = command.end_all(processes)
    assert (status, other_status) == (2, 2)
    assert "process 0: ended, since process 1 failed: error: " in err and "optim.clip was 1.0, now 2.0" in err
    assert "\nprocess 1: error: " in other_err and "Traceback" not in err + other_err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n", "tolerance"), [
    ("quickstart", 4, 1e-5),
    ("dino_fashion_mnist", 2, 1e-4),  # Adam divides the differences of tiny gradients by their size
])
def test_processes_end_like_one(name, n, tolerance, tmp_path):
    line = ["--config", config(tmp_path, name), *SHORT]
    killed_and_resumed(line, tmp_path / "several", n)
    assert command.run(*line, "--workdir", tmp_path / "one", devices=2 * n)[0] == 0
    assert_close(tmp_path / "several", tmp_path / "one", tolerance)


@pytest.mark.slow
def test_two_devices_are_identical_in_one_process_and_in_two(tmp_path):
    """A sum of two does not depend on who adds; one of more does, hence the tolerances above."""
    line = ["--config", config(tmp_path, "quickstart"), *SHORT]
    ended = command.end_all(command.start_all(2, *line, "--workdir", tmp_path / "two", devices=1))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert command.run(*line, "--workdir", tmp_path / "one", devices=2)[0] == 0
    assert_identical(tmp_path / "two", tmp_path / "one")


GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$RECORD"
case "$*" in
    *" describe "*) [ -e "$RECORD.made" ] && echo ACTIVE ;;
    *" create "*) touch "$RECORD.made" ;;
    *" -m sslx.main "*) echo >> "$RECORD.runs"; exit "$(cut -d' ' -f"$(wc -l < "$RECORD.runs")" <<< "$STATUSES")" ;;
esac
"""


@pytest.mark.parametrize(("statuses", "status", "runs"), [("255 130 0", 0, 3), ("134 2", 2, 2), ("3", 3, 1)])
def test_tpu_vm_sh(statuses, status, runs, tmp_path):
    """With a recording stand-in for gcloud: asks once, installs and runs on all workers, restarts what may go on."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    record = tmp_path / "record"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "ZONE": "z",
                                "STATUSES": statuses, "TYPE": "v6e-16", "RUNTIME": "r", "TIER": "spot", "SLICES": "2"}
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "run", "name", "--workdir", "/mnt/runs/a b"], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    calls = record.read_text()
    assert calls.count(" create ") == 1
    assert "create name --zone=z --accelerator-type=v6e-16 --runtime-version=r --node-count=2 --spot" in calls
    trained = [call for call in calls.splitlines() if " -m sslx.main " in call]
    assert len(trained) == runs and all("--node=all --worker=all --batch-size=all" in call for call in trained)
    assert all(r"--workdir /mnt/runs/a\ b" in call for call in trained)


@pytest.mark.parametrize(("flags", "words"), [
    (("h:1", None, None), ("--coordinator without --processes and --process",)),
    ((None, 2, 1), ("--processes and --process without --coordinator", "HOST:PORT")),
    (("host", 2, 0), ("--coordinator is 'host'", "HOST:PORT")),
    (("h:1", 0, 0), ("--processes is 0", "at least 1")),
    (("h:1", 2, 2), ("--process is 2", "0 to 1")),
])
def test_flags_that_cannot_be(flags, words):
    with pytest.raises(UserError) as raised:
        distributed.start(*flags)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, 1),
    (dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0"), 1),  # in sbatch, not under srun
    (dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NODELIST="n[1-4]"), 4),
    (dict(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1:34911", OMPI_COMM_WORLD_SIZE="3"), 3),
])
def test_processes_that_the_environment_speaks_of(variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.detected() == expected


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.iterdir() if p.suffix != ".yaml"))
def test_script_is_bash(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
