"""One writer at a time, of one config; and where the time of a run went, over its deaths."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import command
import pytest
from runs import newest_checkpoint, newest_step

from sslx import checkpoint, log, workdir
from sslx.clock import KINDS
from sslx.config import UserError

LONG = ("--config", f"{command.CONFIGS / 'quickstart.py'}:debug", "--config.run.steps=2000",
        "--config.optim.steps=2000", "--config.run.log_every=1",
        "--config.run.eval_every=5000", "--config.run.save_every=20")


def test_a_second_run_is_refused_and_a_dead_one_makes_room(tmp_path):
    first = command.start(*LONG, "--workdir", tmp_path)
    try:
        command.wait(first, lambda: newest_checkpoint(tmp_path))
        before = newest_step(tmp_path)
        status, _, err = command.run(*LONG, "--workdir", tmp_path)
        assert status == 2 and "Traceback" not in err
        assert f"another run writes in {tmp_path}: process {first.pid} on {socket.gethostname()}" in err
        assert checkpoint.main(["prune", str(tmp_path), "--keep=1"]) == 2
        assert newest_step(tmp_path) > before  # the first was not disturbed
    finally:
        first.send_signal(signal.SIGKILL)
        command.end(first)
    assert (tmp_path / workdir.LOCK).exists()
    again = command.start(*LONG, "--workdir", tmp_path)
    command.wait(again, lambda: any(e["event"] == "resumed" for e in log.events(tmp_path)))
    command.wait(again, lambda: newest_step(tmp_path) > log.events(tmp_path)[-1]["step"])
    again.send_signal(signal.SIGTERM)
    status, out, err = command.end(again)
    assert status == 130 and "resumed at step" in out, err
    assert not (tmp_path / workdir.LOCK).exists()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(workdir, "BEAT_S", 0.1)
    monkeypatch.setattr(workdir, "STALE_S", 1.0)


def test_a_lock_of_another_machine_is_waited_for(quick, tmp_path, capsys):
    (tmp_path / workdir.LOCK).write_text("elsewhere 7 1234 2026-01-01T00:00:00+0000")
    began = time.monotonic()
    with workdir.locked(tmp_path):
        assert 1.0 <= time.monotonic() - began < 5
        assert (tmp_path / workdir.LOCK).read_text().startswith(f"{socket.gethostname()} {os.getpid()} ")
    assert "process 7 on elsewhere, begun 2026-01-01T00:00:00+0000" in capsys.readouterr().out
    assert not (tmp_path / workdir.LOCK).exists()


def test_a_lock_of_another_machine_that_beats_is_respected(quick, tmp_path):
    path = tmp_path / workdir.LOCK
    path.write_text("elsewhere 7 1234 2026-01-01T00:00:00+0000")
    beats = f"import os, time\nwhile True: os.utime({str(path)!r}); time.sleep(.1)"
    owner = subprocess.Popen([sys.executable, "-c", beats])
    try:
        with pytest.raises(UserError, match="another run writes in .*process 7 on elsewhere.*alive 0 s ago"):
            with workdir.locked(tmp_path):
                raise AssertionError("locked")
    finally:
        owner.kill()
        owner.wait()
    assert path.read_text().startswith("elsewhere")


@pytest.mark.parametrize("text", ["", "garbage", "HOST PID 1 2026", "h \0\xff 3"])
def test_a_lock_of_nobody_is_taken_over(text, quick, tmp_path):
    """Cut off while it was written, damaged, or of a process whose number this one has got again."""
    mine = text.replace("HOST", socket.gethostname()).replace("PID", str(os.getpid()))
    (tmp_path / workdir.LOCK).write_text(mine)
    with workdir.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_only_one_of_many_gets_a_stale_lock(tmp_path):
    """Four processes find the lock of a dead one at once, and hold it in turn."""
    (tmp_path / workdir.LOCK).write_text(f"{socket.gethostname()} 999999999 1 2026")
    code = f"""
import pathlib, time
from sslx import workdir
from sslx.config import UserError
folder, held = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(tmp_path / 'held')!r})
while True:
    try:
        with workdir.locked(folder):
            held.mkdir()  # fails if another one holds it
            time.sleep(.05)
            held.rmdir()
        break
    except UserError:
        time.sleep(.01)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=command.ROOT, stderr=subprocess.PIPE, text=True)
                 for _ in range(4)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read()


@pytest.mark.parametrize(("damage", "words"), [
    (lambda w: (w / "config.json").write_text("{"), "config.json is damaged"),
    (lambda w: (w / "config.json").write_text("[1]"), "config.json is damaged"),
    (lambda w: (w / "config.json").unlink(), "config.json, which says of what, is missing"),
])
def test_a_workdir_that_no_config_belongs_to_is_refused(damage, words, tmp_path):
    workdir.claim(tmp_path, {"run": {"steps": 3}}, "f")
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    workdir.claim(tmp_path, {"run": {"steps": 3}}, "f")
    damage(tmp_path)
    with pytest.raises(UserError, match=words):
        workdir.claim(tmp_path, {"run": {"steps": 3}}, "f")


def test_time_is_accounted_for_over_a_kill(tmp_path):
    """Every second of the processes is charged once: what came after the checkpoint is lost."""
    line = ["--config", f"{command.CONFIGS / 'quickstart.py'}:debug", "--config.run.log_every=1",
            "--config.run.save_every=8"]
    began = time.monotonic()
    command.kill(line, tmp_path, lambda: newest_step(tmp_path) >= 14)
    killed_s = time.monotonic() - began
    dead = log.read(tmp_path)[1][-1]
    assert dead["spent"]["lost"] == 0 and sum(dead["spent"].values()) == pytest.approx(dead["wall_s"], abs=0.2)
    began = time.monotonic()
    assert command.run(*line, "--workdir", tmp_path)[0] == 0
    last, event = log.read(tmp_path)[1][-1], log.events(tmp_path)[-1]
    assert event["event"] == "resumed" and event["lost_s"] == last["spent"]["lost"] > 0
    saved = next(p for p in log.read(tmp_path)[1] if p["step"] == event["step"])
    assert event["lost_s"] == pytest.approx(dead["wall_s"] - sum(saved["spent"].values()), abs=0.5)
    assert set(last["spent"]) == set(KINDS) and min(last["spent"].values()) >= 0
    assert sum(last["spent"].values()) == pytest.approx(last["wall_s"], abs=0.2)
    assert last["wall_s"] < killed_s + time.monotonic() - began
    assert last["spent"]["start_up"] > 1 and last["spent"]["compile"] > 0.1
    after = next(p for p in log.read(tmp_path)[1] if p["step"] > event["step"])
    assert after["cpu_s"] > saved["cpu_s"] + 1  # at least its start-up


def test_keeping(tmp_path):
    """The newest, every multiple, and the best by a metric; the last evaluation of a falling loss is the best."""
    flags = ("--config", f"{command.CONFIGS / 'quickstart.py'}:debug", "--config.run.save_every=4",
             "--config.run.eval_every=6", "--config.run.keep=1", "--config.run.keep_every=8", "--workdir", tmp_path)
    status, _, err = command.run(*flags, "--config.run.keep_best=max:heldout/los")
    assert status == 2 and "did you mean 'heldout/loss'?" in err
    shutil.rmtree(tmp_path)
    assert command.run(*flags, "--config.run.keep_best=max:heldout/loss")[0] == 0  # "max": the first
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [6, 8, 16, 24]


def test_kept_steps():
    steps, scores = [10, 20, 30, 40, 50], {20: 3.0, 40: 1.0}
    assert checkpoint.kept(steps, 1, None, "", {}) == {50}
    assert checkpoint.kept(steps, 2, None, "min", scores) == {40, 50}
    assert checkpoint.kept(steps, 1, None, "max", scores) == {20, 50}
    assert checkpoint.kept(steps, 1, 15, "", {}) == {30, 50}


def test_saving_by_the_clock(tmp_path):
    flags = (*LONG[:6], "--config.run.log_every=10", "--config.run.eval_every=5000", "--config.run.save_every=5000",
             "--config.run.save_minutes=0.01", "--config.run.keep=100", "--workdir", tmp_path)
    process = command.start(*flags)
    command.wait(process, lambda: len(list((tmp_path / "checkpoints").glob("[0-9]*/MANIFEST"))) >= 3)
    process.kill()
    command.end(process)
    saved = sorted(int(p.parent.name) for p in (tmp_path / "checkpoints").glob("*/MANIFEST"))
    assert all(step % 10 == 0 for step in saved)
    times = {p["step"]: p["wall_s"] for p in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
             if p["kind"] == "point"}
    assert all(times[b] - times[a] > 0.5 for a, b in zip(saved, saved[1:], strict=False) if b in times)
