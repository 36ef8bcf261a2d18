"""Runs that are really killed, interrupted and moved to other devices end as if nothing had happened."""

import random
import signal

import command
import jax
import numpy as np
import pytest
from runs import assert_identical, newest_checkpoint, newest_step, points

from sslx import log
from sslx.data import Info, Source, pipeline
from sslx.data.arrays import Arrays
from sslx.sharding import batch_sharding, make_mesh

STEPS = 24  # of every config's debug variant
FLAGS = ("--config.run.log_every=1", "--config.run.save_every=5")
# A scanned decoder; a teacher and a queue that is partly full; a schedule; clusters in the middle of a pass.
AMONG_THE_QUICK = ("quickstart", "moco_fashion_mnist", "byol_fashion_mnist", "deepcluster_fashion_mnist")
OWN = {"quickstart": "--config.model.dtype=float32",
       **{f"{name}_fashion_mnist": "--config.objective.queue=512" for name in ("moco", "nnclr", "swav")}}
CONFIGS = [pytest.param(p.stem, marks=() if p.stem in AMONG_THE_QUICK else pytest.mark.slow)
           for p in sorted(command.CONFIGS.glob("*.py"))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(command line, workdir) of a config that ran from start to end, once for all tests."""
    done = {}

    def whole(name):
        if name not in done:
            line, workdir = ["--config", command.CONFIGS / f"{name}.py:debug", *FLAGS], tmp_path_factory.mktemp(name)
            line += [OWN[name]] if name in OWN else []
            status, _, err = command.run(*line, "--workdir", workdir)
            assert status == 0, err
            done[name] = line, workdir
        return done[name]

    return whole


@pytest.mark.parametrize("name", CONFIGS)
def test_killed_run_ends_identically(name, uninterrupted, tmp_path):
    """kill -9 at a random step after the first checkpoint; then again the same command; then once more."""
    line, whole = uninterrupted(name)
    step = random.Random(name).randrange(6, STEPS - 4)
    command.kill(line, tmp_path, lambda: newest_checkpoint(tmp_path) and newest_step(tmp_path) >= step)
    status, out, err = command.run(*line, "--workdir", tmp_path)
    assert status == 0 and "resumed at step" in out, err
    assert_identical(tmp_path, whole)

    content = (tmp_path / "metrics.jsonl").read_text()
    status, out, _ = command.run(*line, "--workdir", tmp_path)
    assert status == 0 and f"this run is finished: step {STEPS}" in out
    assert "loss" not in out.split("this run is finished")[1].partition("metric ")[0]  # not one step of training
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_checkpoint_means_that_the_log_is_complete_up_to_it(uninterrupted, tmp_path):
    """kill -9 when the last checkpoint has just been saved: the last evaluation must not be lost."""
    line, whole = uninterrupted("quickstart")
    process = command.start(*line, "--workdir", tmp_path)
    command.wait(process, lambda: newest_checkpoint(tmp_path) == STEPS)
    process.kill()
    command.end(process)
    assert command.run(*line, "--workdir", tmp_path)[0] == 0
    assert_identical(tmp_path, whole)


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    """One SIGINT: the state is saved where the run is, status 130; the same command then ends identically."""
    line, whole = uninterrupted("quickstart")
    process = command.start(*line, "--workdir", tmp_path)
    command.wait(process, lambda: newest_step(tmp_path) >= 2)
    process.send_signal(signal.SIGINT)
    status, out, err = command.end(process)
    assert status == 130 and "Traceback" not in err
    stopped = newest_checkpoint(tmp_path)
    assert 2 <= stopped < STEPS
    assert f"stopped at step {stopped} of {STEPS}" in out and str(tmp_path) in out and "same command again" in out
    assert command.run(*line, "--workdir", tmp_path)[0] == 0
    assert_identical(tmp_path, whole)


def test_resume_on_other_devices(uninterrupted, tmp_path):
    """Killed on one device, resumed on four: the same losses to 1e-5, in float32, of the same examples."""
    line, whole = uninterrupted("quickstart")
    command.kill(line, tmp_path, lambda: newest_checkpoint(tmp_path))
    status, out, err = command.run(*line, "--workdir", tmp_path, devices=4)
    assert status == 0 and "'data': 4" in out, err
    found, expected = points(tmp_path), points(whole)
    assert found.keys() == expected.keys()
    for key, point in found.items():
        assert point["tokens_seen"] == expected[key]["tokens_seen"]
        for name, value in point["metrics"].items():
            if name.endswith("loss"):
                np.testing.assert_allclose(value, expected[key]["metrics"][name], rtol=1e-5, err_msg=f"{key} {name}")
    runs = log.read(tmp_path)[0]
    assert [r["device_count"] for r in runs] == [1, 4] and runs[1]["resumed_from"] >= 5


@pytest.mark.parametrize("n_devices", [1, 4, 8])
@pytest.mark.parametrize("first", [0, 3, 7])
def test_rows_of_a_batch_do_not_depend_on_devices_or_on_where_reading_starts(n_devices, first):
    rows = np.arange(40)
    source = Source(Arrays(number=rows), Info(name="numbers", modality="text", fingerprint=""))
    stream = pipeline.stream(source, seed=5)
    expected = np.array([stream[i]["number"] for i in range(first * 8, 10 * 8)]).reshape(-1, 8)
    mesh = make_mesh(devices=jax.devices()[:n_devices])
    found = list(pipeline.batches(stream, batch_size=8, sharding=batch_sharding(mesh), first_step=first, last_step=10))
    np.testing.assert_array_equal([batch["number"] for batch, _ in found], expected)
    np.testing.assert_array_equal([host["index"] for _, host in found], expected)
    if first == 0:  # a pass over all examples has each once
        assert sorted(expected.ravel()[:40]) == rows.tolist()
