"""The log of a workdir: its schema, and what is left of it after a kill and a resume."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sslx import log
from sslx.config import UserError

RUN = dict(run_id="r", config={"mesh": {"data": -1}, "optim": {"betas": (0.9, 0.95)}}, config_hash="c", git_sha=None,
           objective="mae", modality="image", dataset="d", seed=0, n_params=10, n_params_nonembedding=8,
           flops_per_example={"encoder": 3}, flops_convention="f", batch_size=4, total_steps=10, device="cpu",
           device_count=8, peak_flops=1e9, versions={"jax": "0"})
HUGE = 2**70 + 1  # outgrows a float


def logger(workdir, resume_step=None, show=True, **changes):
    return log.Logger(workdir, RUN | changes, resume_step, 10, show)


def write(open_log, steps, **metrics):
    for step in steps:
        open_log.point(step=step, examples=4 * step, tokens_seen=step, flops_model=HUGE * step, flops_hw=HUGE * step,
                       tokens_per_flop=1 / HUGE, epochs=0.5, lr=1e-3, phase="warmup", split="train",
                       metrics={"loss": 1.0 / step} | metrics, wall_s=float(step), tokens_per_s=2.0, mfu=None)
    open_log.close()


def records(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps(workdir):
    return [r["step"] for r in records(workdir) if r["kind"] == "point"]


def events(workdir):
    """(step, tag, value) of the scalars in all TensorBoard files: [length 8, crc 4, data, crc 4] per record."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            end = 12 + int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12:end])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[end + 4:]
    return found


def test_run_record_first_then_points_with_exact_integers(tmp_path):
    write(logger(tmp_path), [1, 2])
    run, *points = records(tmp_path)
    assert run == {"kind": "run", "schema_version": 1, **RUN, "config": {"mesh": {"data": -1},
                                                                         "optim": {"betas": [0.9, 0.95]}}}
    assert [p["kind"] for p in points] == ["point", "point"]
    assert points[1]["flops_model"] == 2 * HUGE
    assert set(points[0]) == {"kind", "step", "examples", "tokens_seen", "flops_model", "flops_hw", "tokens_per_flop",
                              "epochs", "lr", "phase", "split", "metrics", "wall_s", "tokens_per_s", "mfu"}
    assert log.read(tmp_path) == log.read(tmp_path / "metrics.jsonl") == ([run], points)


def test_json_is_strict(tmp_path):
    write(logger(tmp_path), [1], nan=math.nan, inf=np.float32("-inf"), int64=np.int64(7), f32=np.float32(0.5),
          jax=jnp.ones(()), flag=np.bool_(True))
    assert records(tmp_path)[1]["metrics"] == {"loss": 1.0, "nan": None, "inf": None, "int64": 7, "f32": 0.5,
                                               "jax": 1.0, "flag": True}
    assert all(math.isfinite(value) for _, _, value in events(tmp_path))


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write(logger(tmp_path), [1, 2, 3, 4])
    resumed = logger(tmp_path, resume_step=2)
    assert resumed.earlier == {"step": 2.0, "lost": 2.0}
    assert log.events(tmp_path) == [{"kind": "event", "event": "resumed", "step": 2, "lost_s": 2.0}]
    write(resumed, [3])
    assert steps(tmp_path) == [1, 2, 3]
    assert sum(r["kind"] == "run" for r in records(tmp_path)) == 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_cut_short_by_a_kill_is_repaired(tmp_path, kept):
    write(logger(tmp_path), [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    start = whole.rindex("\n", 0, -1) + 1
    path.write_text(whole[:start] + whole[start:-1][:kept])
    assert [p["step"] for p in log.read(tmp_path)[1]] == [1, 2]
    write(logger(tmp_path, resume_step=3), [4])
    assert steps(tmp_path) == [1, 2, 4]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    write(logger(tmp_path), [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:9], lines[2], ""]))
    with pytest.raises(UserError, match="metrics.jsonl line 2"):
        log.read(tmp_path)


def test_resume_adds_a_run_record_only_if_something_changed(tmp_path):
    write(logger(tmp_path), [1, 2])
    write(logger(tmp_path, resume_step=2, peak_flops=2e9), [3])  # a CPU's peak is measured, so it differs every time
    assert len(log.read(tmp_path)[0]) == 1
    write(logger(tmp_path, resume_step=3, device_count=4), [4])
    first, second = log.read(tmp_path)[0]
    assert "resumed_from" not in first
    assert (second["resumed_from"], second["device_count"]) == (3, 4)
    write(logger(tmp_path, resume_step=4, device_count=4), [5])
    assert len(log.read(tmp_path)[0]) == 2
    write(logger(tmp_path, resume_step=1), [2])  # back to before the change, on the first machine
    assert log.read(tmp_path)[0] == [first]


def test_resume_from_a_log_killed_in_its_first_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "ru')
    write(logger(tmp_path, resume_step=5), [6])
    (run,), (point,) = log.read(tmp_path)
    assert (run["resumed_from"], point["step"]) == (5, 6)


def test_a_fresh_run_starts_a_fresh_log(tmp_path):
    write(logger(tmp_path), [1, 2])
    write(logger(tmp_path), [1])
    assert steps(tmp_path) == [1]


def test_no_log_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl does not exist"):
        log.read(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    quiet = logger(tmp_path, show=False)
    quiet.progress(1, loss=1.0, tokens_per_s=1.0, mfu=None)
    write(quiet, [1])
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_numbers(tmp_path):
    write(logger(tmp_path), [1, 2], **{"probe/accuracy@raw": 0.25})
    found = events(tmp_path)
    assert (2, "train/loss", 0.5) in found
    assert (1, "train/probe/accuracy_raw", 0.25) in found
    assert not [tag for _, tag, _ in found if "mfu" in tag]  # None is no number


def test_progress_on_no_terminal_is_a_line_at_every_twentieth(tmp_path, capsys):
    open_log = log.Logger(tmp_path, RUN, None, 100, True)
    for step in range(1, 101):
        open_log.progress(step, loss=0.5, tokens_per_s=1234.0, mfu=0.25)
    open_log.close()
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 21
    assert lines[-1] == "step 100/100  loss 0.5000  tokens/s 1,234  MFU 25%"


def test_summary_sets_the_final_value_beside_its_baselines(tmp_path):
    open_log = logger(tmp_path)
    baselines = {"probe/accuracy@random_init": 0.1, "probe/accuracy@raw": 0.2}
    newest = {"probe/accuracy": 0.75, "rankme": 12.0}
    for step, metrics in [(0, baselines), (5, {"probe/accuracy": 0.5}), (9, newest)]:
        open_log.point(step=step, split="eval", metrics=metrics, wall_s=0.0)
    open_log.close()
    table = [line.split() for line in log.summary(tmp_path).splitlines()]
    assert table[1:] == [["probe/accuracy", "0.1", "0.2", "0.75"], ["rankme", "-", "-", "12"]]
