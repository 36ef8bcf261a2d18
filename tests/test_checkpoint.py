"""A damaged checkpoint is named and never restored: the run goes on from the newest sound one, to the same end."""

import functools
import pathlib
import random
import shutil

import command
import pytest
from runs import assert_identical
from test_resume import STEPS

from sslx import checkpoint, manifest
from sslx.config import UserError

LINE = ("--config", f"{command.CONFIGS / 'quickstart.py'}:debug", "--config.run.save_every=8")
KEPT = [16, STEPS]  # the newest two, as run.keep is by default


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path, seed=0):
    draw, content = random.Random(f"{path.name} {seed}"), bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


DAMAGES = (delete, truncate, extend, flip_a_bit)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run that came to its end; not to be changed."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    status, _, err = command.run(*LINE, "--workdir", workdir)
    assert status == 0, err
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "w"))


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def array_file(folder) -> str:
    """The largest file: values of parameters, of which Orbax restores any."""
    return max(files(folder), key=lambda file: (folder / file).stat().st_size)


def verify(workdir, capsys) -> tuple[int, str]:
    return checkpoint.main(["verify", str(workdir)]), capsys.readouterr().out


def test_every_step_is_complete_when_a_run_has_ended(finished, capsys):
    folder = finished / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [str(step) for step in KEPT]
    assert verify(finished, capsys) == (0, "step 16: sound\nstep 24: sound\n")
    listed = [line.split(" ", 2)[2] for line in (folder / "24" / manifest.NAME).read_text().splitlines()[1:]]
    assert [*listed, manifest.NAME] == sorted(files(folder / "24"), key=lambda file: (file == manifest.NAME, file))


def test_every_damage_of_every_file_is_named_and_fallen_back_from(workdir, capsys):
    """Also those that Orbax would restore without a word: flips within the values of parameters."""
    folder, aside = workdir / "checkpoints" / "24", workdir / "damaged" / "24"
    names = files(folder)
    flips = [functools.partial(flip_a_bit, seed=seed) for seed in range(-(-300 // len(names)))]
    damages = [(name, damage) for name in names for damage in (delete, truncate, extend, *flips)]
    assert len(names) > 10 and len(damages) > 300 + 3 * len(names) - 1
    for name, damage in damages:
        whole = (folder / name).read_bytes()
        damage(folder / name)
        assert whole != ((folder / name).read_bytes() if (folder / name).exists() else None)
        status, out = verify(workdir, capsys)
        first, second, *found = out.splitlines()
        assert (status, first, second) == (1, "step 16: sound", "step 24: damaged"), (name, damage)
        assert len(found) == 1 and found[0].strip().startswith(f"{name}: "), (found, name, damage)
        checkpoint.repair(workdir)
        assert f"step 24 is damaged and is not used: {name}: " in capsys.readouterr().out
        assert [p.name for p in folder.parent.iterdir()] == ["16"]
        aside.rename(folder)
        (folder / name).write_bytes(whole)
    assert verify(workdir, capsys)[0] == 0


def test_no_bit_of_a_manifest_can_flip_unseen(workdir):
    path = workdir / "checkpoints" / "24" / manifest.NAME
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 7):  # every byte, each bit of them in turn
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert manifest.damage(path.parent) == [f"{manifest.NAME}: other bytes than were saved"], bit
    path.write_bytes(whole)
    assert not manifest.damage(path.parent)


@pytest.mark.parametrize(("which", "damage"), [("array", flip_a_bit), ("default/_METADATA", delete),
                                               ("_CHECKPOINT_METADATA", flip_a_bit), (manifest.NAME, truncate)])
def test_a_run_goes_on_from_the_newest_sound_step(which, damage, finished, workdir, capsys):
    """It names the file, keeps the damaged step aside, and ends in the same log and, to the bit, the same state."""
    folder = workdir / "checkpoints" / "24"
    name = array_file(folder) if which == "array" else which
    damage(folder / name)
    before = files(folder)
    status, out, err = command.run(*LINE, "--workdir", workdir)
    assert status == 0, err
    assert f"the checkpoint of step 24 is damaged and is not used: {name}: " in out and "resumed at step 16" in out
    assert files(workdir / "damaged" / "24") == before and str(workdir / "damaged" / "24") in out
    assert verify(workdir, capsys) == (0, "step 16: sound\nstep 24: sound\n")
    assert_identical(workdir, finished)


def test_a_run_whose_checkpoints_are_all_damaged_stops(workdir):
    folder = workdir / "checkpoints"
    flip_a_bit(folder / "16" / array_file(folder / "16"))
    delete(folder / "24" / "default/_METADATA")
    before = files(workdir)
    status, _, err = command.run(*LINE, "--workdir", workdir)
    assert status == 2 and "Traceback" not in err
    assert "step 24 (default/_METADATA: " in err and f"step 16 ({array_file(folder / '16')}: " in err
    assert files(workdir) == before


def test_what_was_cut_off_is_removed_and_what_is_damaged_is_kept(workdir, capsys):
    """A save that a kill ended between the last file and the manifest, a folder of Orbax's, a step half removed."""
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "24", folder / "32")
    delete(folder / "32" / manifest.NAME)
    (folder / checkpoint.UNSEALED).write_text("32")
    (folder / "40.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    (folder / "8.removed").mkdir()
    delete(folder / "24" / manifest.NAME)  # no save of this step was going on: this is damage
    status, out = verify(workdir, capsys)
    assert status == 1 and "step 32: not complete" in out and "step 24: damaged" in out
    checkpoint.repair(workdir)
    out = capsys.readouterr().out
    assert "step 32 was cut off" in out and f"step 24 is damaged and is not used: {manifest.NAME}: " in out
    assert [p.name for p in folder.iterdir()] == ["16"]
    assert [p.name for p in (workdir / "damaged").iterdir()] == ["24"]
    shutil.copytree(workdir / "damaged" / "24", folder / "24")  # damaged once more: what is there stays
    checkpoint.repair(workdir)
    assert sorted(p.name for p in (workdir / "damaged").iterdir()) == ["24", "24.2"]


def test_a_first_save_that_was_cut_off_is_no_damage(workdir, capsys):
    folder = workdir / "checkpoints"
    shutil.rmtree(folder / "16")
    delete(folder / "24" / manifest.NAME)
    with pytest.raises(UserError, match=manifest.NAME):
        checkpoint.repair(workdir)
    (folder / checkpoint.UNSEALED).write_text("24")
    checkpoint.repair(workdir)
    assert not list(folder.iterdir()) and "step 24 was cut off" in capsys.readouterr().out


def test_prune_and_list(workdir, capsys):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "24", folder / "8")
    flip_a_bit(folder / "24" / array_file(folder / "24"))
    (workdir / "damaged" / "4").mkdir(parents=True)
    assert checkpoint.main(["list", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["8", "16", "24"]
    assert all(float(line.split()[2]) == pytest.approx(1.4, abs=0.3) for line in lines)
    assert checkpoint.main(["prune", str(workdir), "--keep=1"]) == 0
    removed = [folder / "24", folder / "8", workdir / "damaged" / "4"]
    assert capsys.readouterr().out.splitlines() == [f"removed {path}" for path in removed]
    assert [p.name for p in folder.iterdir()] == ["16"]
    flip_a_bit(folder / "16" / array_file(folder / "16"))
    assert checkpoint.main(["prune", str(workdir), "--keep=1"]) == 2
    assert "nothing was removed" in capsys.readouterr().err and [p.name for p in folder.iterdir()] == ["16"]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], ("required", "verify W")),
    (["verify"], ("required: workdir",)),
    (["verif", "W"], ("'verif'", "verify")),
    (["verify", "W", "--fast"], ("--fast",)),
    (["verify", "W", "--keep=1"], ("--keep", "only prune")),
    (["prune", "W"], ("--keep=N",)),
    (["prune", "W", "--keep=0"], ("--keep is 0", "at least 1")),
    (["prune", "W", "--keep=two"], ("--keep", "'two'")),
    (["list", "/nowhere"], ("/nowhere/checkpoints", "--workdir")),
])
def test_command_line_that_cannot_be_read(arguments, words, capsys):
    assert checkpoint.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("\nerror: ") and all(word in err for word in words), err


def test_two_processes_have_one_manifest(tmp_path, capsys):
    """Process 0 writes it when the files of both are there, and both go on from the step that it finds sound."""
    flags = (*LINE, "--config.run.steps=2", "--config.optim.steps=2", "--config.optim.warmup=1",
             "--config.run.save_every=1", "--workdir", tmp_path)

    def run() -> list[str]:
        ended = [command.end(process) for process in command.start_all(2, *flags, devices=1)]
        assert [status for status, _, _ in ended] == [0, 0], ended
        return [out for _, out, _ in ended]

    run()
    folder = tmp_path / "checkpoints" / "2"
    listed = (folder / manifest.NAME).read_text()
    assert all(f" {file}\n" in listed for file in files(folder) if file != manifest.NAME)
    assert "ocdbt.process_0/" in listed and "ocdbt.process_1/" in listed
    name = array_file(folder)
    flip_a_bit(folder / name)
    first, second = run()
    assert f"step 2 is damaged and is not used: {name}: " in first and "resumed at step 1" in first
    assert "damaged" not in second
    assert verify(tmp_path, capsys) == (0, "step 1: sound\nstep 2: sound\n")
