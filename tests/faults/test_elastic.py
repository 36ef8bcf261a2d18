"""A run moves over other numbers of processes, devices and reading processes, and reads and computes the same."""

import signal

import command
import pytest
import runs

# Links of (processes, devices of each, data.workers of each); the quick one has fewer.
CHAIN = ((2, 1, 0), (1, 2, 1), (1, 1, 2), (4, 1, 0), (2, 2, 1))
QUICK = ((2, 1, 1), (1, 2, 2), (4, 1, 0))
STEPS = 20  # of a link
FSDP = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")


@pytest.mark.parametrize(("source", "mesh", "chain"), [
    ("mixture", (), QUICK),
    *(pytest.param(source, mesh, CHAIN, marks=pytest.mark.slow)
      for source in runs.SOURCES for mesh in ((), FSDP)),
])
def test_chain(source, mesh, chain, tmp_path):
    """Each link takes ten steps or more and is then told to stop; the unbroken run is one process with one device."""
    steps = STEPS * len(chain)
    line = ("--config", runs.config(tmp_path, source, runs.UNHURRIED), *runs.with_steps(steps, steps))
    status, _, err = command.run(*line, "--workdir", tmp_path / "whole")
    assert status == 0, err
    workdir, begins = tmp_path / "w", [0]
    for n, devices, workers in chain:
        processes = command.start_all(n, *line, *mesh, f"--config.data.workers={workers}", "--workdir", workdir,
                                      devices=devices)
        last = len(begins) == len(chain)
        if not last:
            until = begins[-1] + 10
            command.wait(processes[0], lambda until=until: runs.newest_step(workdir) >= until)
            processes[-1].send_signal(signal.SIGTERM)
        ended = command.end_all(processes)
        assert [status for status, _, _ in ended] == [0 if last else 130] * n, ended
        begins.append(runs.newest_checkpoint(workdir))
    assert all(end - begin >= 10 for begin, end in zip(begins, begins[1:], strict=False)), begins
    assert begins[-1] == steps

    read = runs.examples(workdir)
    assert read == runs.examples(tmp_path / "whole")
    assert len(read) == steps and all(sorted(rows) == list(range(8)) for rows in read.values())
    found, expected = runs.points(workdir), runs.points(tmp_path / "whole")
    assert found.keys() == expected.keys()
    apart = {}
    for key, point in found.items():
        metrics, others = point.pop("metrics"), expected[key].pop("metrics")
        assert point == expected[key] and metrics.keys() == others.keys()
        for name in (name for name in metrics if name.split("@")[0].endswith("loss")):
            apart[*key, name] = abs(metrics[name] / others[name] - 1)
    step, split, name = max(apart, key=apart.__getitem__)
    print(f"losses lie {max(apart.values()):.1e} apart, {split} {name} at step {step}")
    assert max(apart.values()) <= 1e-5
