"""The command line: a mistake of the user is told in one paragraph; a bug keeps its traceback."""

import gzip
import resource
import signal
import subprocess
import sys
import time

import command
import numpy as np
import pytest
from PIL import Image
from runs import newest_step

from sslx import log

QUICKSTART = command.CONFIGS / "quickstart.py"
SECTIONS = ("mesh", "model", "objective", "data", "optim", "run", "evals")


def paragraph(err: str) -> str:
    """What the user is told: one paragraph, at the end of stderr unless threads of Orbax complain after it."""
    return next(line for line in err.splitlines() if line.startswith("error: "))


def refused(workdir, *flags, config=f"{QUICKSTART}:debug", devices=1) -> str:
    """The paragraph with which a run is refused before it has compiled, or left, anything."""
    status, out, err = command.run("--config", config, "--workdir", workdir, *flags, devices=devices)
    assert status == 2, (out, err)
    assert "Traceback" not in err and err.endswith(paragraph(err) + "\n")
    assert "parameters" not in out and not workdir.exists()
    return paragraph(err)


@pytest.mark.parametrize(("flag", "words"), [
    ("--config.model.widht=3", ("widht", "width")),
    ("--config.modle.width=3", ("modle",)),
    ("--config.mesh.contxt=2", ("config.mesh.contxt", "'context'")),  # neither in the file
    ("--config.mesh.context=two", ("config.mesh.context", "'two'", "number of devices")),
    ("--config.optim.parameters=bf16", ("config.optim.parameters", "'bfloat16'")),
    ("--config.model.width=wide", ("config.model.width", "wide")),
    ("--config.model.width=3.5", ("config.model.width", "3.5")),
    ("--confg=x", ("confg",)),
    ("leftover", ("leftover", "--config.a.b=value")),
])
def test_flag_that_cannot_be_read(flag, words, tmp_path):
    text = refused(tmp_path / "w", flag)
    assert all(word in text for word in words), text


def test_config_file_that_is_missing(tmp_path):
    text = refused(tmp_path / "w", config="configs/nothing.py:debug")
    assert "'configs/nothing.py'" in text and "configs/quickstart.py" in text


@pytest.mark.parametrize(("given", "missing"), [("--config", "--workdir"), ("--workdir", "--config")])
def test_flag_that_is_missing(given, missing, tmp_path):
    value = f"{QUICKSTART}:debug" if given == "--config" else tmp_path
    status, _, err = command.run(given, value)
    assert status == 2 and f"{missing} is missing" in err and "Traceback" not in err


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key(section, tmp_path):
    config = command.variant(tmp_path, "quickstart", f"config.{section}.dpeth = 3")
    text = refused(tmp_path / "w", config=config)
    assert f"{section}.dpeth" in text
    assert section == "evals" or "valid: " in text


@pytest.mark.parametrize(("name", "edit", "words"), [
    ("quickstart", "config.model = dict(config.model) | dict(width='64')", ("model.width", "'64'", "positive integer")),
    ("quickstart", "config.model = dict(config.model) | dict(width=64.0)", ("model.width", "64.0", "positive integer")),
    ("quickstart", "config.optim = dict(config.optim) | dict(learning_rate='1e-3')",
     ("config.optim.learning_rate", "'1e-3'", "a positive number")),
    ("quickstart", "config.model.norm = 'rmsnorm'", ("config.model.norm", "'rms'")),
    ("quickstart", "config.objective.name = 'causal_ml'", ("causal_ml", "causal_lm")),
    ("quickstart", "del config.optim", ("config.optim", "missing")),
    ("quickstart", "config.train = dict()", ("config.train", "valid: ")),
    ("quickstart", "config.data.train.path = '/nowhere'", ("config.data.path", "'/nowhere'")),
    ("mae_fashion_mnist", "config.model.patch = 3", ("model.patch=3", "model.image_size=8", "[1, 2, 4, 8]")),
    ("mae_fashion_mnist", "config.data.train = dict(name='idx', path='no-mnist', split='train')",
     ("'no-mnist'", "apt-get install")),
    ("mae_fashion_mnist", "config.objective = dict(name='causal_lm')", ("objective.name", "Transformer")),
])
def test_config_that_cannot_work(name, edit, words, tmp_path):
    text = refused(tmp_path / "w", config=command.variant(tmp_path, name, edit))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(("flags", "devices", "words"), [
    (["--config.mesh.data=3"], 4, ("data=3", "4 devices")),
    (["--config.data.batch_size=6"], 4, ("config.data.batch_size=6", "multiple of 4")),
    (["--config.data.train.length=300"], 1, ("data.train.length=300", "model.max_length=256")),
    (["--config.model.vocab_size=256"], 1, ("model.vocab_size=256", "set model.vocab_size to")),
    (["--config.model.heads=3"], 1, ("model.heads=3", "model.width=64")),
    (["--config.mesh.tensor=4"], 4, ("mesh.tensor=4", "'heads'", "multiple of 4")),
    (["--config.run.steps=0"], 1, ("config.run.steps", "positive")),
])
def test_flags_that_do_not_fit(flags, devices, words, tmp_path):
    text = refused(tmp_path / "w", *flags, devices=devices)
    assert all(word in text for word in words), text


def test_truncated_idx_file(tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    header = bytes([0, 0, 8, 3]) + np.array([100, 8, 8], ">u4").tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(6000)))
    edit = f"config.data.train = dict(name='idx', path={str(folder)!r}, split='train')"
    text = refused(tmp_path / "w", config=command.variant(tmp_path, "mae_fashion_mnist", edit))
    assert "train-images-idx3-ubyte.gz holds 6000 values" in text and "100 x 8 x 8" in text and "get it again" in text


def test_documents_that_are_all_empty(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(" \n" * i)
    edit = f"config.data.train = dict(name='text', path={str(folder)!r}, split='all', length=64)"
    text = refused(tmp_path / "w", config=command.variant(tmp_path, "quickstart", edit))
    assert str(folder) in text and "3 are empty" in text


def test_image_that_cannot_be_decoded(tmp_path):
    """on_bad='stop' names the file; 'skip' counts the same records when interrupted and resumed as when not."""
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    for i in range(48):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    for i in (5, 30):
        (folder / "ab"[i % 2] / f"{i:02}.png").write_bytes(b"not a picture")
    edit = (f"config.data = dict(batch_size=8, on_bad='skip', train=dict(name='folder', path={str(folder)!r}, size=8));"
            " config.evals = dict(); config.model.depth = 1; config.run.save_every = 3; config.run.log_every = 2")
    command_line = ["--config", command.variant(tmp_path, "mae_fashion_mnist", edit)]

    def bad_records(workdir):
        return {p["step"]: p["bad_records"] for p in log.read(workdir)[1] if p["split"] == "train"}

    assert command.run(*command_line, "--workdir", tmp_path / "whole")[0] == 0
    expected = bad_records(tmp_path / "whole")
    assert expected[24] == 8  # two of 48 in each of four passes
    process = command.start(*command_line, "--workdir", tmp_path / "cut", "--config.run.log_every=1")
    command.wait(process, lambda: newest_step(tmp_path / "cut") >= 7)
    process.send_signal(signal.SIGINT)
    assert command.end(process)[0] == 130
    assert command.run(*command_line, "--workdir", tmp_path / "cut")[0] == 0
    resumed = bad_records(tmp_path / "cut")
    assert expected.items() <= resumed.items()

    status, _, err = command.run(*command_line, "--workdir", tmp_path / "stop", "--config.data.on_bad=stop")
    assert status == 2 and "Traceback" not in err
    assert "a bad record" in paragraph(err) and ".png" in paragraph(err) and "on_bad='skip'" in paragraph(err)


def test_workdir_of_another_config(tmp_path):
    """The differences are shown; what changes nothing that is computed may differ."""
    short = ["--config", f"{QUICKSTART}:debug", "--workdir", tmp_path, "--config.run.steps=2", "--config.optim.steps=2"]
    assert command.run(*short)[0] == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    status, _, err = command.run(*short, "--config.model.width=32", "--config.optim.clip=2.0")
    assert status == 2 and "Traceback" not in err
    assert "model.width was 64, now 32" in paragraph(err) and "optim.clip was 1.0, now 2.0" in paragraph(err)
    assert "--workdir" in paragraph(err) and (tmp_path / "metrics.jsonl").read_text() == before
    assert command.run(*short, "--config.run.log_every=3")[0] == 0


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = command.run("--config", f"{QUICKSTART}:debug", "--workdir", tmp_path / "file" / "w")
    assert status == 2 and "Traceback" not in err
    assert str(tmp_path / "file" / "w") in paragraph(err) and "another --workdir" in paragraph(err)


def test_full_disk(tmp_path):
    """Files that may not grow beyond 0.3 MB: a checkpoint does not fit. (Orbax's threads print tracebacks.)"""
    flags = ["--config", f"{QUICKSTART}:debug", "--workdir", tmp_path / "w"]
    status, _, err = command.run(*flags, file_bytes=300_000)
    assert status == 2, err
    text = paragraph(err)
    assert str(tmp_path / "w") in text and "no space left" in text and "no checkpoint is complete" in text
    status, out, _ = command.run(*flags)  # with space again the same command goes on
    assert status == 0 and "step 24/24" in out


def test_diverged_run(tmp_path):
    """Names the step, the last good checkpoint and what to try; status 3."""
    status, _, err = command.run("--config", f"{QUICKSTART}:debug", "--workdir", tmp_path,
                                 "--config.optim.learning_rate=1e30", "--config.run.save_every=1")
    assert status == 3 and "Traceback" not in err
    text = paragraph(err)
    assert "of step 3 is not finite" in text and "checkpoint is of step 2" in text and "optim.learning_rate" in text
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("mistake", ["raise ValueError('mine')", "config.model['nothing']", "1 / 0"])
def test_bug_in_a_config_keeps_its_traceback(mistake, tmp_path):
    config = command.variant(tmp_path, "quickstart", mistake)
    status, _, err = command.run("--config", config, "--workdir", tmp_path / "w")
    assert status == 1 and "Traceback" in err and config.name in err


def test_second_interrupt_stops_at_once(tmp_path):
    """During the first evaluation, which compiles (the cache is empty): nothing is saved."""
    process = command.start("--config", f"{QUICKSTART}:debug", "--workdir", tmp_path / "w",
                            variables=dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache")))
    command.wait(process, (tmp_path / "w" / "metrics.jsonl").exists)
    for _ in range(2):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    status, out, err = command.end(process)
    assert status == 130 and "stopped at once" in err and "Traceback" not in err
    assert "saved" not in out and not list((tmp_path / "w" / "checkpoints").glob("[0-9]*"))


def test_help_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, out, _ = command.run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert status == 0 and "--workdir" in out
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_import_is_quick_and_starts_no_backend():
    code = ("import time; began = time.process_time(); import sslx, sys;"
            " assert time.process_time() - began < 1; assert 'jax' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=command.ROOT, check=True)
