"""Plans: against closed forms, against brute force, and the run against the FLOPs of what its command line trains."""

import json
import shlex

import jax
import numpy as np
import pytest
from experiments import ROOT
from laws import CHINCHILLA, law

from sslx import aot, command, flops, train
from sslx.config import UserError
from sslx.flops import PEAKS
from sslx.scaling import plan

CAUSAL = f"{ROOT}/configs/causal_1b.py"


def by_hand(c: float) -> float:
    """N of the optimum for C = 6 N D: (a A / b B)^(1/(a+b)) (C/6)^(b/(a+b)) (Hoffmann et al. 2022, eq. 4)."""
    a, b = CHINCHILLA["a"], CHINCHILLA["b"]
    return (a * CHINCHILLA["A"] / (b * CHINCHILLA["B"])) ** (1 / (a + b)) * (c / 6) ** (b / (a + b))


def test_the_best_choice_is_the_closed_form():
    best, _ = plan.flat_region(law(), 3e20)
    assert best.n == pytest.approx(by_hand(3e20), rel=0.005)
    assert best.flops == pytest.approx(3e20) == 6 * best.n * best.d
    assert best.lo < best.loss < best.hi


def test_the_flat_region_ends_where_the_loss_does():
    best, flat = plan.flat_region(law(), 3e20)
    assert [x.n for x in flat] == sorted(x.n for x in flat) and best in flat
    assert all(x.flops == pytest.approx(3e20) and x.loss <= 1.005 * best.loss for x in flat)
    for end, outward in ((flat[0], 0.98), (flat[-1], 1.02)):
        assert law().loss(end.n * outward, end.d / outward)[0] > 1.005 * best.loss


def test_smaller_networks_are_as_good_and_pay_when_they_say():
    best, _ = plan.flat_region(law(), 3e20)
    found = plan.smaller(law(), best, np.array([0.75, 0.5, 0.01]))
    assert [round(s.n / best.n, 3) for s in found] == [0.75, 0.5]  # a hundredth of the size is never as good
    for s in found:
        assert law().loss(s.n, s.d)[0] == pytest.approx(best.loss, rel=1e-6)
        assert s.overhead == pytest.approx(6 * s.n * s.d / best.flops - 1)
        assert s.flops + 2 * s.n * s.pays_from == pytest.approx(best.flops + 2 * best.n * s.pays_from)
    assert 0 < found[0].overhead < found[1].overhead


def test_for_inference_nothing_costs_less():
    best, _ = plan.flat_region(law(), 3e20)
    tokens = 3e12
    found = plan.for_inference(law(), best, tokens)
    n = best.n * np.geomspace(0.05, 1, 4000)
    d = ((best.loss - CHINCHILLA["E"] - CHINCHILLA["A"] / n**CHINCHILLA["a"]) / CHINCHILLA["B"])
    d = np.where(d > 0, np.abs(d) ** (-1 / CHINCHILLA["b"]), np.inf)
    cost = 6 * n * d + 2 * n * tokens
    assert found.flops + 2 * found.n * tokens == pytest.approx(cost.min(), rel=1e-3)
    assert found.n == pytest.approx(n[cost.argmin()], rel=0.03) and found.n < 0.8 * best.n
    assert plan.for_inference(law(), best, 1.0) is None


def test_data_that_repeat():
    best, _ = plan.flat_region(law(), 3e20)
    few = best.d / 10
    found = plan.plan(law(), 3e20, unique=few)
    within = found["repetition"]["within"]
    assert within["d"] == 4 * few and within["flops"] == pytest.approx(3e20, rel=0.01) and within["loss"] > best.loss
    assert found["repetition"]["epochs"] == pytest.approx(10)
    assert "beyond about 4 epochs" in found["warnings"][-1] and "fresh data only" in found["warnings"][-1]
    assert "within" not in plan.plan(law(), 3e20, unique=best.d / 3)["repetition"]
    knowing = law("data-constrained", R_D=15.0, R_N=5.0)
    moved, _ = plan.flat_region(knowing, 3e20, few)
    # Excess parameters lose their worth sooner than repeated data, R_N < R_D: more epochs, as Muennighoff et al. found.
    assert moved.loss > best.loss and moved.d > best.d


@pytest.mark.parametrize("flags, c", [
    (["--budget", "3e20"], 3e20),
    (["--chip-hours", "100", "--chip", "v5p", "--mfu", "0.5"], 100 * 3600 * 0.5 * PEAKS["TPU v5p"]),
    (["--money", "420", "--price-per-chip-hour", "4.2", "--chip", "v5p"], 100 * 3600 * 0.4 * PEAKS["TPU v5p"]),
    (["--chip-hours", "100", "--chip", "tpu7x"], 100 * 3600 * 0.4 * 2 * PEAKS["TPU7x"])])
def test_budgets(tmp_path, flags, c):
    assert planned(tmp_path, *flags)["budget"]["flops"] == pytest.approx(c)


def planned(tmp_path, *flags: str, **options) -> dict:
    """The JSON of the command."""
    out = tmp_path / "plan.json"
    assert plan.main(["--law", written(tmp_path, **options), "--json", str(out), *flags]) == 0
    return json.loads(out.read_text())


def written(tmp_path, **options) -> str:
    path = tmp_path / "law.json"
    path.write_text(json.dumps(law(**options).as_json([])))
    return str(path)


@pytest.mark.parametrize("flags, said", [
    ([], "--budget"), (["--budget", "1e20", "--chip-hours", "3"], "--budget and --chip-hours"),
    (["--budget", "-3"], "--budget is -3"), (["--budget", "many"], "many"), (["--chip-hours", "3"], "--chip is None"),
    (["--chip-hours", "3", "--chip", "v5x"], "did you mean 'v5"), (["--money", "3", "--chip", "v5p"],
                                                                  "--price-per-chip-hour is missing"),
    (["--chip-hours", "3", "--chip", "v5p", "--mfu", "40"], "--mfu is 40"),
    (["--budget", "1e20", "--topology", "v5p:2x2x1"], "--config is missing"),
    (["--budget", "1e20", "--config", f"{CAUSAL}:debug", "--n", "params"], "did you mean 'n_params'"),
    (["--budget", "1e20", "--config", f"{ROOT}/configs/simclr_rn50.py"], "config.model has no depth"),
    (["--budget", "1e24"], "1e+04 times the largest"), (["--budgets", "1e20"], "budgets")])
def test_mistakes_name_the_flag(tmp_path, capsys, flags, said):
    assert plan.main(["--law", written(tmp_path), *flags]) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


def test_what_is_no_law(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for name, said in (("none.json", "cannot be read"), ("other.json", "this is no law")):
        assert plan.main(["--law", str(tmp_path / name), "--budget", "1e20"]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="knows compute only"):
        plan.flat_region(law()._replace(form="power", params=dict(E=1.0, A=3.0, a=0.1)), 1e20)


def test_a_law_of_runs_knows_what_it_counts(tmp_path, capsys):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(law()._replace(counted="n_params_nonembedding").as_json([])))
    ask = ["--law", str(path), "--budget", "3e19", "--config", CAUSAL]
    assert plan.main([*ask, "--n", "n_params"]) == 2
    assert "--n is n_params, and the runs of this law were counted by n_params_nonembedding" in capsys.readouterr().err
    assert plan.main([*ask, "--json", str(tmp_path / "plan.json")]) == 0
    same = planned(tmp_path, *ask[2:], "--n", "n_params_nonembedding")["run"]
    assert json.loads((tmp_path / "plan.json").read_text())["run"]["n"] == same["n"]


def test_warnings_of_the_law_and_of_the_distance():
    assert plan.plan(law(), 3e20)["warnings"] == ["what the fit warned of"]
    assert "back-tests reached 16 times" in plan.plan(law(), 3e21)["warnings"][-1]
    near, far = (plan.plan(law(drift=0.02), c)["optimum"] for c in (1e20, 1e22))
    assert far["hi"] / far["lo"] > near["hi"] / near["lo"]


def test_a_best_size_that_was_never_run():
    few = law()._replace(flops=law().flops._replace(ln_n=np.log([3e9, 1e10])))
    assert "is none that was fitted: these were 3e+09 to 1e+10" in plan.plan(few, 1e20)["warnings"][-1]


@pytest.mark.parametrize("count", ["n_params", "n_params_nonembedding"])
def test_the_command_line_of_the_run_spends_the_budget(tmp_path, count):
    """Its FLOPs are counted again on the config that the line makes, and its parameters."""
    budget = 3e19
    found = planned(tmp_path, "--budget", str(budget), "--config", CAUSAL, "--n", count, "--config.optim.b2=0.98")
    line = shlex.split(found["run"]["command"])
    assert line[:3] == ["python", "-m", "sslx.main"] and "--config.optim.b2=0.98" in line
    conf, _ = command.parse("main", "", {"workdir": command.Flag(str, "")}, line[3:])
    model = conf.model
    assert model.width // model.heads == 128 and model.heads // model.kv_heads == 4 and conf.optim.warmup > 0
    step = aot.step_of(aot.changed(conf, {"mesh.fsdp": 1}), jax.devices()[:1])
    with jax.set_mesh(step.built.mesh):
        per_step = train.count_flops(step.built.objective, step.current, step.batch).model_total
    assert per_step * conf.run.steps == pytest.approx(budget, rel=0.01)
    assert conf.run.steps == conf.optim.steps
    n = {"n_params": flops.n_params, "n_params_nonembedding": flops.n_params_nonembedding}[count](step.current.params)
    assert n == found["run"]["n"] == pytest.approx(found["optimum"]["n"], rel=0.06)
    assert found["run"]["d"] == conf.run.steps * conf.data.batch_size * 4096
    assert found["run"]["loss"] == pytest.approx(float(law().loss(n, found["run"]["d"])[0]))


@pytest.mark.parametrize("field, value", [("depth", 8), ("width", 2048)])
def test_a_width_or_depth_that_a_flag_sets_stays(tmp_path, field, value):
    found = planned(tmp_path, "--budget", "3e19", "--config", CAUSAL, f"--config.model.{field}={value}")
    assert f"--config.model.{field}={value}" in shlex.split(found["run"]["command"])
    assert found["run"]["n"] == pytest.approx(found["optimum"]["n"], rel=0.2)  # heads come in groups of four


def test_whether_it_fits_a_pod_and_how_long_it_takes(tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install 'sslx[tpu]'")
    found = planned(tmp_path, "--budget", "3e11", "--config", f"{CAUSAL}:debug", "--topology", "v5e:2x2",
                    "--config.mesh.data=4", "--mfu", "0.3", c_max=1e12)
    assert any("is none that was fitted" in w for w in found["warnings"])
    assert "spends" in found["warnings"][-1]  # embeddings cost no FLOPs, and the law says C = 6 N D
    pod, run = found["pod"], found["run"]
    assert pod["fits"] and pod["devices"] == 4 and 0 < pod["hbm_peak_bytes"] < pod["hbm_limit_bytes"]
    assert pod["hours"] == pytest.approx(run["flops"] / (4 * 0.3 * PEAKS["TPU v5e"]) / 3600)
    assert pod["chip_hours"] == pytest.approx(4 * pod["hours"])
    assert 0 < pod["hours_roofline"] <= pod["hours_scheduled"] * 1.001
