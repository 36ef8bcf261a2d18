"""A run that hangs ends, in time, and its stacks name the line that does not return."""

import signal
import time

import command
import pytest
from runs import newest_step

LIMIT_S = 6
SHORT = ("--config.run.log_every=1", f"--config.run.hang_s={LIMIT_S}", "--config.model.dtype=float32")

SLEEPY = """
    import time, jax
    from sslx.data import pipeline
    read = pipeline.read

    def sleepy(dataset, batch_size, rows, step):
        if step == 6 and jax.process_index() == 1:
            time.sleep(600)  # the host that sleeps
        return read(dataset, batch_size, rows, step)

    pipeline.read = sleepy
    config.evals = {}
"""


def test_the_host_that_sleeps_is_named_and_all_end(tmp_path):
    config = command.variant(tmp_path, "quickstart", SLEEPY.strip())
    asleep = 1 + config.read_text().splitlines().index(
        next(line for line in config.read_text().splitlines() if "the host that sleeps" in line))
    processes = command.start_all(2, "--config", config, *SHORT, "--workdir", tmp_path / "w", devices=1)
    command.wait(processes[0], lambda: newest_step(tmp_path / "w") >= 5)
    began = time.monotonic()
    ended = [command.end(process) for process in processes]
    assert time.monotonic() - began < LIMIT_S + 10
    assert [status for status, _, _ in ended] == [4, 4], ended
    waiting, sleeping = ((tmp_path / "w" / "stacks" / f"{i}.txt").read_text() for i in range(2))
    assert f'"{config}", line {asleep} in sleepy' in sleeping and "sleepy" not in waiting
    assert "train.py" in waiting and "in loop" in waiting
    assert "took longer than 6 s (run.hang_s)" in ended[0][2] + ended[1][2]
    assert f"line {asleep} in sleepy" in ended[1][2]  # also on the terminal


def test_a_host_that_stands_still_does_not_hold_up_the_other(tmp_path):
    """SIGSTOP: nothing of the process runs, not even the threads that would write its stacks."""
    config = command.variant(tmp_path, "quickstart", "config.evals = {}; config.run.steps = config.optim.steps = 500")
    processes = command.start_all(2, "--config", config, *SHORT, "--workdir", tmp_path / "w", devices=1)
    try:
        command.wait(processes[0], lambda: newest_step(tmp_path / "w") >= 5)
        processes[1].send_signal(signal.SIGSTOP)
        status, _, err = command.end(processes[0])
        assert status == 4, err
        assert "in loop" in (tmp_path / "w" / "stacks" / "0.txt").read_text()
    finally:
        processes[1].kill()


@pytest.mark.parametrize("hang_s", [LIMIT_S, 0])
def test_a_slow_evaluation_is_no_hang(hang_s, tmp_path):
    edit = f"""from sslx.evals import heldout
    import functools, time
    make = heldout.make

    @functools.wraps(make)
    def slow(**options):
        found = make(**options)
        return found._replace(measure=lambda subject: (time.sleep({hang_s + 1}), found(subject))[1])

    heldout.make = slow"""
    config = command.variant(tmp_path, "quickstart", edit)
    line = ("--config", config, f"--config.run.hang_s={hang_s}", "--workdir", tmp_path / "w")
    status, _, err = command.run(*line)
    assert status == 0, err
    assert not (tmp_path / "w" / "stacks").exists()
