"""A branch ends to the bit as one run from the start does, killed or not; what cannot be one is refused."""

import shutil

import command
import pytest
import runs
from runs import assert_identical, newest_checkpoint, points

from sslx import branches, log
from sslx.config import UserError
from sslx.experiment import Run

AT, SHORT, LONG = 8, 12, 20
EVERY = ("--config.run.log_every=1", "--config.run.save_every=3", "--config.run.keep=1", "--config.run.eval_every=100")


def steps(n: int) -> tuple[str, ...]:
    return f"--config.run.steps={n}", f"--config.optim.steps={n}"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(command line, trunk of LONG steps that keeps step AT, unbroken run of SHORT steps)."""
    folder = tmp_path_factory.mktemp("study")
    config = runs.config(folder, edit='config.optim.update(schedule="wsd", warmup=2, decay=3)')
    line = ["--config", config, *EVERY]
    trunk, unbroken = folder / "trunk", folder / "unbroken"
    for workdir, flags in {trunk: (*steps(LONG), f"--config.run.keep_at=({AT},)"), unbroken: steps(SHORT)}.items():
        status, _, err = command.run(*line, *flags, "--workdir", workdir)
        assert status == 0, err
    assert sorted(p.name for p in (trunk / "checkpoints").glob("[0-9]*")) == ["20", "8"]
    return line, trunk, unbroken


def of(trunk, at: int = AT) -> tuple[str, ...]:
    return *steps(SHORT), f"--config.run.trunk={trunk}", f"--config.run.trunk_step={at}"


def test_a_branch_ends_as_one_unbroken_run(study, tmp_path):
    """Parameters, optimizer, counters and every point of the log, which begins with the trunk's; killed on the way."""
    line, trunk, unbroken = study
    before = {p: p.read_bytes() for p in trunk.rglob("*") if p.is_file()}
    branch = tmp_path / "branch"
    command.kill([*line, *of(trunk)], branch, lambda: newest_checkpoint(branch) == 9)
    assert "branched" in [e["event"] for e in log.events(branch)]
    status, out, err = command.run(*line, *of(trunk), "--workdir", branch)
    assert status == 0 and "resumed at step" in out, err
    assert_identical(branch, unbroken)
    assert points(branch)[SHORT, "eval"]["phase"] == "annealed"
    assert [r.get("branched_from") for r in log.read(branch)[0]] == [{"workdir": str(trunk), "step": AT}]
    spent = log.read(branch)[1][-1]["spent"], [p for p in log.read(trunk)[1] if p["step"] <= AT][-1]["spent"]
    assert spent[0]["step"] > spent[1]["step"] and spent[0]["eval"] > spent[1]["eval"]
    assert {p: p.read_bytes() for p in trunk.rglob("*") if p.is_file()} == before
    shutil.copytree(branch, tmp_path / "moved")  # finished, it needs no trunk
    status, out, err = command.run(*line, *of("gone"), "--workdir", tmp_path / "moved")
    assert status == 0 and "this run is finished" in out, err


def test_a_run_of_another_config_is_refused_before_anything_is_written(study, tmp_path):
    line, trunk, _ = study
    status, _, err = command.run(*line, *of(trunk), "--config.optim.learning_rate=1e-3", "--workdir",
                                 tmp_path / "branch")
    assert status == 2 and "optim.learning_rate was 0.003, now 0.001" in err and "Traceback" not in err
    assert not (tmp_path / "branch").exists()


def check(trunk, at=AT, **changes):
    """Of a branch with the config of the unbroken run, but for `changes` of a.b, written a__b."""
    config = branches.workdir.bound(trunk / "config.json")
    fingerprint = config.pop("data fingerprint")
    config |= {"run.steps": SHORT, "optim.steps": SHORT} | {k.replace("__", "."): v for k, v in changes.items()}
    branches.check(branches.Trunk(trunk, at), config, fingerprint)


@pytest.mark.parametrize("at, changes, said", [
    (AT, dict(optim__warmup=3, run__seed=1), r"another config \(optim.warmup was 2, now 3; run.seed was 0, now 1\)"),
    (9, {}, r"no checkpoint of step 9; it has 8, 20. Keep it with --config.run.keep_at=\(9,\)"),
    (AT, dict(optim__decay=5), "not in the stable phase of this branch, whose learning rate decays from step 7 on"),
    (18, dict(optim__steps=30), "not in the stable phase of the trunk, whose learning rate decays from step 17 on"),
    (AT, dict(optim__schedule="cosine"), "not in the stable phase of this branch"),
])
def test_what_is_no_branch_is_refused(study, at, changes, said):
    for same in (dict(optim__decay=4), dict(optim__schedule="constant"), dict(optim__final=0.5, run__log_every=7)):
        check(study[1], **same)
    with pytest.raises(UserError, match=said):
        check(study[1], at, **changes)


def test_a_trunk_that_is_gone_or_damaged_is_refused(study, tmp_path):
    with pytest.raises(UserError, match=f"no workdir of a run: {tmp_path}/gone/config.json does not exist"):
        branches.check(branches.Trunk(tmp_path / "gone", AT), {}, "")
    trunk = shutil.copytree(study[1], tmp_path / "trunk")
    largest = max((trunk / "checkpoints/8").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=f"step 8 .*damaged .*{largest.name}: other bytes"):
        check(trunk)


def test_a_branch_takes_both_a_trunk_and_a_step():
    with pytest.raises(UserError, match="leaves nothing to train"):
        branches.trunk_of(Run(steps=9, trunk="W", trunk_step=9))
    with pytest.raises(UserError, match="takes both"):
        branches.trunk_of(Run(steps=9, trunk="W"))
    with pytest.raises(UserError, match="takes both"):
        branches.trunk_of(Run(steps=9, trunk_step=3))
    assert branches.trunk_of(Run(steps=9)) is None
