"""Sweeps of real processes: planned by exact FLOPs, killed, gone on with, repeated by nobody."""

import os
import re
import signal
import subprocess
import sys

import command
import numpy as np
import pytest
import runs

from sslx import log, manifest
from sslx.scaling import grid, jobs, steplaw, sweep

FLAGS = ("--sizes=16x1", "--budgets=1e9,2e9", "--learning-rate=3e-3", "--batch-size=8")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny language model whose runs end without an evaluation that samples long."""
    folder = tmp_path_factory.mktemp("config")
    return runs.config(folder, edit='config.model.update(heads=2); config.optim.warmup = 3; config.run.log_every = 5')


def start(config, out, *flags) -> subprocess.Popen:
    line = [sys.executable, "-m", "sslx.scaling.sweep", f"--config={config}", f"--out={out}", *FLAGS, *flags]
    return subprocess.Popen(line, cwd=command.ROOT, env=command.environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def logged(out) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("*/metrics.jsonl")}


def planned(config, out, *flags: str) -> dict[str, grid.Planned]:
    """The plan of a command, in this process."""
    arguments = [f"--config={config}", f"--out={out}", *flags]
    conf, values = sweep.command.parse("scaling.sweep", "", sweep.FLAGS, arguments)
    study = grid.Study(conf)
    wanted = grid.grid_of(values, study, sweep.fields_given(arguments), out)
    return {p.name: p for p in grid.planned(study, wanted)}


def test_a_sweep_that_is_killed_loses_and_repeats_no_run(config, tmp_path, capsys):
    """kill -9 of the sweep and its child while the branch trains; then the same command, then once more."""
    out, flags = tmp_path / "runs", ("--branches", "--yes")
    process = start(config, out, *flags)
    trunk, branch = out / "16x1_2e9_s0", out / "16x1_1e9_s0"
    command.wait(process, lambda: runs.newest_checkpoint(branch) > 0)
    child = int((branch / "LOCK").read_text().split()[1])
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.communicate()
    done = logged(out)

    status, said, err = command.end(start(config, out, *flags))
    assert status == 0 and "all 2 runs are finished" in said and "measuring" not in said, said + err
    assert re.search(r"2 of 2 runs|1 of 2 runs to do: \S+ FLOPs, about \d+", said)  # measured when it was killed
    found = logged(out)
    assert found.keys() == {trunk.name, branch.name} and found[trunk.name] == done[trunk.name]
    assert {e["event"] for e in log.events(branch)} == {"branched", "resumed"}
    plan = planned(config, out, *FLAGS, *flags)
    for name, p in plan.items():
        points = runs.points(out / name)
        last = points[p.steps, "eval"]
        assert last["phase"] == "annealed" and np.isfinite(last["metrics"]["heldout/loss"])
        assert last["tokens_seen"] == p.steps * p.cost.tokens and last["flops_model"] == p.steps * p.cost.flops
        assert abs(last["flops_model"] - float(name.split("_")[1])) <= p.cost.flops / 2
        assert [step for step, split in points if split == "eval"] == [p.steps]
        assert log.read(out / name)[0][-1]["n_params_nonembedding"] == p.cost.n

    again = [f"--config={config}", f"--out={out}", *FLAGS, *flags]
    assert sweep.main(again) == 0
    assert "0 of 2 runs to do" in (said := capsys.readouterr().out) and said.count("finished") == 2
    assert sweep.main([*again, "--config.optim.b2=0.9"]) == 2
    assert "holds a run of another config (optim.b2 was 0.99, now 0.9)" in capsys.readouterr().err
    assert logged(out) == found


def test_ctrl_c_saves_all_and_a_failure_holds_up_no_other_run(config, tmp_path):
    """Two at a time; a run whose folder cannot be used fails, and is named at the end with the reason."""
    out, flags = tmp_path / "runs", ("--budgets=1e9", "--seeds=1,0", "--yes", "--jobs=2", "--rate=1e9")
    (out / "16x1_1e9_s1" / "checkpoints" / "5").mkdir(parents=True)
    process, first = start(config, out, *flags), out / "16x1_1e9_s0"
    command.wait(process, lambda: runs.newest_step(first) >= 5)
    process.send_signal(signal.SIGINT)
    status, said, err = command.end(process)
    assert status == 130 and "the same command goes on" in said, said + err
    assert not (first / "LOCK").exists() and 5 <= runs.newest_checkpoint(first)

    status, said, err = command.end(start(config, out, *flags))
    assert status == 1 and "1 of 2 runs failed" in err, said + err
    assert "failed: 16x1_1e9_s1: status 2: error: " in err and "config.json, which says of what, is missing" in err
    assert logged(out).keys() == {"16x1_1e9_s0"}
    assert log.read(first)[1][-1]["phase"] == "annealed"


def test_the_plan_counts_what_the_runs_spend(config, tmp_path):
    """By hand: 12 width^2 x depth parameters in blocks, and what a ladder and a law of the batch make of them."""
    plan = planned(config, tmp_path, "--sizes=32x1,64x2", "--grid=ladder", "--tokens-per-parameter=20,40",
                   "--learning-rate=steplaw", "--seeds=0,1")
    assert [*plan][:4] == ["32x1_40tpp_s0", "32x1_40tpp_s1", "32x1_20tpp_s0", "32x1_20tpp_s1"]
    for name, p in plan.items():
        width, depth = map(int, name.split("_")[0].split("x"))
        ratio = int(name.split("_")[1].removesuffix("tpp"))
        assert p.cost.n == pytest.approx(12 * width**2 * depth, rel=0.02)
        d, tokens = ratio * p.cost.n, p.steps * p.cost.tokens
        assert abs(tokens - d) <= p.cost.tokens / 2
        assert p.changes["optim.learning_rate"] == pytest.approx(1.79 * p.cost.n**-0.713 * d**0.307, rel=0.01)
        assert p.changes["data.batch_size"] in (2 ** np.floor(np.log2(0.58 * d**0.571 / 32)),
                                                2 ** np.ceil(np.log2(0.58 * d**0.571 / 32)))
        assert p.changes["run.seed"] == int(name[-1])


def test_what_the_config_counts_in_steps_keeps_its_share(tmp_path):
    """Objectives' own schedules too: whatever field is of Steps."""
    dino = planned(f"{command.CONFIGS}/dino_fashion_mnist.py:debug", tmp_path, "--sizes=32x1x2", "--budgets=1e11",
                   "--config.objective.temperature_warmup=6")
    [p] = dino.values()
    assert p.changes["objective.steps"] == p.changes["optim.steps"] == p.changes["run.steps"] == p.steps
    assert p.changes["optim.warmup"] == round(2 / 24 * p.steps)
    assert p.changes["objective.temperature_warmup"] == round(6 / 24 * p.steps)
    assert p.changes["optim.freeze_prototypes"] == round(1 / 24 * p.steps)
    assert p.changes["optim.learning_rate"] == 3e-3 and p.changes["model.heads"] == 2  # Step Law is of text


def test_a_queue_begins_at_the_same_share(tmp_path):
    swav = planned(f"{command.CONFIGS}/swav_fashion_mnist.py:debug", tmp_path, "--sizes=model.width=8;model.width=16",
                   "--budgets=3e10")
    assert len({p.steps for p in swav.values()}) == 2
    for p in swav.values():
        assert p.changes["objective.queue_from"] == round(2 / 24 * p.steps)


def test_branches_share_what_a_trunk_has_done_and_decay_where_they_branch(config, tmp_path):
    plan = planned(config, tmp_path, "--sizes=64x2x2", "--budgets=1e10,4e10,1e11", "--branches",
                   "--config.optim.decay=6", "--config.optim.schedule=wsd", "--config.data.batch_size=4")
    trunk, *branches = plan.values()
    assert trunk.name == "64x2x2_1e11_s0" and trunk.trunk is None and len(branches) == 2
    assert trunk.changes["run.keep_at"] == tuple(sorted(p.trunk_step for p in branches))
    for p in plan.values():
        assert p.changes["optim.decay"] == round(6 / 24 * p.steps) and p.changes["data.batch_size"] == 4
        assert p.changes["optim.warmup"] == trunk.changes["optim.warmup"]
    for p in branches:
        assert p.trunk == trunk.name and p.trunk_step == p.steps - p.changes["optim.decay"]
        assert p.flops == p.changes["optim.decay"] * p.cost.flops


def test_branches_have_all_that_counts_in_steps_of_their_trunk(tmp_path):
    """Or they would be refused, as of another config."""
    plan = planned(f"{command.CONFIGS}/swav_fashion_mnist.py:debug", tmp_path, "--sizes=model.width=8",
                   "--budgets=3e10,6e10", "--branches")
    trunk, branch = plan.values()
    counted = ("optim.warmup", "optim.freeze_prototypes", "objective.queue_from")
    assert branch.trunk == trunk.name and trunk.steps > branch.steps
    assert [branch.changes[name] for name in counted] == [trunk.changes[name] for name in counted]
    assert trunk.changes["objective.queue_from"] == round(2 / 24 * branch.steps)


@pytest.mark.parametrize("flags, said", [
    ((), "--budgets is missing"),
    (("--budgets=1e9",), "--sizes is missing"),
    (("--budgets=1e9,x", "--sizes=16x1"), "--budgets is '1e9,x'"),
    (("--budgets=1e9", "--sizes=16"), "it takes WIDTHxDEPTH"),
    (("--budgets=1e9", "--sizes=16x1", "--grid=cube"), "isoflop or ladder"),
    (("--budgets=1e9", "--sizes=16x1", "--grid=ladder"), "--budgets says nothing of --grid=ladder"),
    (("--budgets=1e6", "--sizes=16x1", "--batch-size=8"), "fewer than 10"),
    (("--budgets=1e9", "--sizes=model.wdith=16"), "unknown key config.model.wdith: did you mean 'width'"),
    (("--budgets=1e9", "--sizes=33x1x2"), "heads"),
    (("--budgets=1e9", "--sizes=16x1", "--learning-rate=fast"), "--learning-rate"),
    (("--budgets=1e9", "--sizes=16x1", "--config.optim.schedule=constant"), "only annealed runs belong in a law"),
    (("--budgets=1e9", "--sizes=16x1", "--config.optim.schedule=wsd"), "only annealed runs belong in a law"),
    (("--budgets=1e9", "--sizes=16x1", "--seeds=0,.5"), "--seeds is '0,.5'; it takes whole numbers"),
    (("--budgets=1e9", "--sizes=16x1", "--rate=1e9"), "--yes starts the plan"),
])
def test_mistakes_are_refused_in_one_line(config, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert sweep.main([f"--config={config}", f"--out={tmp_path / 'out'}", *flags]) == 2
    assert said in capsys.readouterr().err


def test_write_makes_configs_that_main_takes(config, tmp_path, capsys):
    out = tmp_path / "runs"
    assert sweep.main([f"--config={config}", f"--out={out}", *FLAGS, "--write"]) == 0
    lines = (out / "runs.txt").read_text().splitlines()
    assert len(lines) == 2 and not list(out.glob("*/metrics.jsonl"))
    status, _, err = command.run(*lines[1].split())
    assert status == 0, err
    job = sweep.job_of(out, planned(config, out, *FLAGS)["16x1_1e9_s0"])
    assert jobs.finished(job)
    (job.workdir / "LOCK").touch()
    assert not jobs.finished(job)  # killed before the last checkpoint was complete
    [record], points = log.read(job.workdir)
    assert record["config"]["model"]["width"] == 16 and record["config"]["run"]["eval_first"] is False
    # Beside the exact count, those of papers: attention over all 32 x 32 pairs, where 33 / 64 of them are needed.
    attention = 12 * 32 * 16 * (32 - 33 / 2)  # 3 passes, 2 products, 2 FLOPs; one layer of width 16
    counted = sum(record["flops_per_example"].values())
    assert record["flops_per_example_full_attention"] == pytest.approx(counted + attention, rel=1e-9)
    trained = [p for p in points if p["split"] == "train"][-1]
    assert trained["flops_6nd"] == 6 * record["n_params_nonembedding"] * trained["tokens_seen"]
    assert trained["hfu"] / trained["mfu"] == pytest.approx(trained["flops_hw"] / trained["flops_model"])


def test_step_law_of_a_billion_parameters():
    """N = 1e9, D = 1e11: 1.6e-3 and 1.1 million tokens, which are in use at this size."""
    assert steplaw.learning_rate(1e9, 1e11) == pytest.approx(1.6e-3, rel=0.05)
    assert steplaw.batch_tokens(1e11) == pytest.approx(1.1e6, rel=0.05)


def test_a_failed_trunk_takes_its_branches_with_it(tmp_path):
    """Nothing is started, and nothing waited for, that lacks what it needs."""
    needs = tmp_path / "trunk" / "checkpoints" / "7"
    job = jobs.Job(tmp_path / "config.py", tmp_path / "branch", 9, needs)
    failed, stopped = jobs.all_of([job], 1, lambda text: None)
    assert not stopped and failed == {"branch": f"there is no {needs} to branch from"}
    assert not (needs / manifest.NAME).exists()
