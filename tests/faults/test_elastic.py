"""A run moves over other numbers of processes, devices and reading processes, and reads and computes the same."""

import signal

import command
import pytest
import runs

STEPS = 80
CHAIN = ((2, 1, 0), (1, 2, 1), (1, 1, 2), (4, 1, 0), (2, 2, 1))  # processes, devices of each, data.workers of each
FSDP = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")


@pytest.mark.parametrize(("source", "mesh"), [
    ("mixture", ()),
    *(pytest.param(source, mesh, marks=pytest.mark.slow)
      for source, mesh in (("text", ()), ("text", FSDP), ("mixture", FSDP), ("packed", ()), ("packed", FSDP))),
])
def test_chain(source, mesh, cache, tmp_path):
    """Each link takes ten steps or more and is then told to stop; the unbroken run is one process with one device."""
    line = ("--config", runs.config(tmp_path, source), *runs.with_steps(STEPS, STEPS))
    status, _, err = command.run(cache, *line, "--workdir", tmp_path / "whole", quick=True)
    assert status == 0, err
    workdir, begins = tmp_path / "w", [0]
    for n, devices, workers in CHAIN:
        processes = command.start_all(cache, n, *line, *mesh, f"--config.data.workers={workers}", "--workdir", workdir,
                                      devices=devices)
        last = len(begins) == len(CHAIN)
        if not last:
            until = begins[-1] + 10
            command.wait(processes[0], lambda until=until: runs.newest_step(workdir) >= until)
            processes[-1].send_signal(signal.SIGTERM)
        ended = command.end_all(processes)
        assert [status for status, _, _ in ended] == [0 if last else 130] * n, ended
        begins.append(runs.newest_checkpoint(workdir))
    assert all(end - begin >= 10 for begin, end in zip(begins, begins[1:], strict=False)), begins
    assert begins[-1] == STEPS

    read = runs.examples(workdir)
    assert read == runs.examples(tmp_path / "whole")
    assert len(read) == STEPS and all(sorted(rows) == list(range(8)) for rows in read.values())
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
