"""Disks that are full, read-only, or go away: one readable error, nothing lost that was saved, and the run goes on."""

import contextlib
import os
import pathlib
import shutil
import subprocess

import command
import pytest
import runs

from sslx import manifest

STEPS = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(command line, workdir) of a run whose disk is well."""
    folder = tmp_path_factory.mktemp("disks")
    line = ("--config", runs.config(folder), *runs.with_steps(STEPS, 1), "--config.run.keep=1000")
    status, _, err = command.run(*line, "--workdir", folder / "w")
    assert status == 0, err
    return line, folder / "w"


@contextlib.contextmanager
def mounted(path: pathlib.Path, *how: str):
    """Mounts something at `path` meanwhile. Skips the test where that is not allowed."""
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *how, path], capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("mounting takes root")
    try:
        yield
    finally:
        while subprocess.run(["umount", "--lazy", path], capture_output=True).returncode == 0:
            pass


def told(err: str) -> str:
    """The one error that the user is told."""
    assert "Traceback" not in err.partition("error: ")[2], err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    return line


def assert_sound(workdir: pathlib.Path) -> None:
    """The newest checkpoint that was complete is what it was."""
    assert manifest.damage(workdir / "checkpoints" / str(runs.newest_checkpoint(workdir))) == []


def goes_on(line, workdir, expected) -> None:
    """The same command ends as if nothing had happened."""
    status, out, err = command.run(*line, "--workdir", workdir)
    assert status == 0 and "resumed at step" in out, err
    runs.assert_identical(workdir, expected)
    assert runs.examples(workdir) == runs.examples(expected) and runs.leftovers(workdir) == []


@pytest.mark.parametrize("kilobytes", [
    2000, *(pytest.param(kilobytes, marks=pytest.mark.slow) for kilobytes in range(1300, 4000, 300))])
def test_full_disk(kilobytes, whole, tmp_path):
    """A disk that some of the checkpoints fit on, whatever it is that first does not. Then it grows."""
    line, expected = whole
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"):
        workdir = tmp_path / "disk" / "w"
        status, _, err = command.run(*line, "--workdir", workdir)
        assert status == 2, err
        assert "space" in told(err) and str(workdir) in told(err)
        assert 1 <= runs.newest_checkpoint(workdir) < STEPS
        assert_sound(workdir)
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path / "disk"], check=True)
        goes_on(line, workdir, expected)


def test_read_only_workdir(whole, tmp_path):
    """Of a new run, and of one that could go on: refused with the path, and nothing is touched."""
    line, finished = whole
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with mounted(tmp_path / "disk", "--bind", "-o", "ro", str(finished)):
        for workdir in (tmp_path / "disk", tmp_path / "disk" / "new"):
            status, _, err = command.run(*line, "--workdir", workdir)
            assert status == 2, err
            assert str(workdir) in told(err) and "Read-only file system" in told(err) and "--workdir" in told(err)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize("how", ["moved", "unmounted", pytest.param("removed", marks=pytest.mark.slow)])
def test_workdir_that_vanishes(how, whole, tmp_path):
    """While the run trains. What was saved is there when the folder comes back."""
    line, expected = whole
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    kept.mkdir()
    with mounted(disk, "--bind", str(kept)) if how == "unmounted" else contextlib.nullcontext(disk.mkdir()):
        workdir = disk / "w"
        process = command.start(*line, "--workdir", workdir)
        command.wait(process, lambda: runs.newest_checkpoint(workdir) >= 2)
        match how:
            case "moved":
                workdir.rename(kept / "w")
            case "unmounted":
                subprocess.run(["umount", "--lazy", disk], check=True)
            case "removed":
                shutil.rmtree(workdir, ignore_errors=True)
        status, out, err = command.end(process)
    assert status == 2, err
    assert str(workdir) in told(err) and "removed, moved or unmounted" in told(err)
    assert "finished" not in out
    if how != "removed":
        assert runs.newest_checkpoint(kept / "w") >= 2
        assert_sound(kept / "w")
        goes_on(line, kept / "w", expected)
