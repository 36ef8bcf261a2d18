"""The command, on tables of published runs: the numbers that were published for them (data/README.md)."""

import csv
import json
import pathlib

import pytest

from sslx.scaling import fit

DATA = pathlib.Path(__file__).parent / "data"


def fitted(tmp_path, table: str, *flags: object) -> dict:
    """The JSON of the command."""
    out = tmp_path / "law.json"
    assert fit.main(["--table", str(DATA / table), "--json", str(out), *map(str, flags)]) == 0
    return json.loads(out.read_text())


GEMSTONE = ("--n", "params_active_precise", "--d", "tokens", "--loss", "final_loss", "--form", "chinchilla")


@pytest.mark.parametrize("table, objective", [("gemstone_cool_end.jsonl", 1.96408643e-3),
                                              ("gemstone_hot.jsonl", 1.98161281e-3)])
def test_gemstone(tmp_path, table, objective):
    law = fitted(tmp_path, table, *GEMSTONE)
    assert law["objective"] == pytest.approx(objective, rel=1e-6)
    if table == "gemstone_cool_end.jsonl":
        assert law["params"] == pytest.approx(
            dict(E=2.0747, A=225.9, B=2.714e5, a=0.30036, b=0.58017), abs=1e-3, rel=3e-3)
        assert law["params"]["a"] == pytest.approx(0.30036, abs=1e-5)
        assert law["params"]["b"] == pytest.approx(0.58017, abs=1e-5)
        assert law["exponents"]["a"] == pytest.approx(0.58017 / (0.30036 + 0.58017), abs=1e-4)
    assert law["starts"]["agreeing"] > law["starts"]["n"] / 2 and law["n_points"] in (199, 220)


def test_gadre(tmp_path):
    """Five small runs predict the loss of one 24 times as over-trained, and of one with 300 times the compute."""
    rows = list(csv.DictReader((DATA / "gadre_redpajama.csv").open()))
    at_20 = [r["name"] for r in rows if "d=" in r["name"] and r["name"].endswith("-1.0")]
    names = [*at_20, "rpj-d=96_l=8_h=4-16.0"]
    assert len(names) == 5
    large = {r["name"]: r for r in rows if r["name"] in ("rpj-open_lm_1b-32.0", "rpj-open_lm_7b-1.0")}
    law = fitted(tmp_path, "gadre_redpajama.csv", "--n", "params", "--d", "tokens", "--loss", "loss_c4_val",
                 "--form", "overtraining", "--where", ",".join(f"name={n}" for n in names),
                 "--predict", ",".join(f"{r['params']}:{r['tokens']}" for r in large.values()))
    errors = [abs(p["loss"] / float(r["loss_c4_val"]) - 1)
              for p, r in zip(law["predictions"], large.values(), strict=True)]
    assert errors == pytest.approx([0.0071, 0.0073], abs=5e-5)
    assert any("5 points for 4 parameters" in w for w in law["warnings"])


@pytest.mark.parametrize("where, a", [
    ("decay=kaplan,warmup=long,param_count=kaplan", 0.834), ("decay=kaplan,warmup=long,param_count=standard", 0.701),
    ("decay=kaplan,warmup=short", 0.604), ("decay=chinchilla", 0.571), ("hparams=tuned,val=val", 0.497)])
def test_porian(tmp_path, where, a):
    """N_opt ~ C^a of RefinedWeb, as one discrepancy after the other is removed."""
    law = fitted(tmp_path, "porian_optimal_pairs.csv", "--n", "n_star", "--c", "flops",
                 "--where", f"file=summary_df,{where}")
    assert law["exponents"]["a"] == pytest.approx(a, abs=5e-4)
    low, high = law["exponents"]["intervals"]["a"]
    assert low < a < high < low + 0.12


MUENNIGHOFF = ("--n", "params", "--d", "tokens", "--loss", "val_loss", "--unique", "unique_tokens",
               "--form", "data-constrained")
C4 = "A=520.8249516599187,B=1487.716093782861,E=1.8691436784054858,a=.3526596,b=.3526596"


def test_muennighoff(tmp_path):
    """With the published constants of single epochs, a better optimum than the published (15.4, 5.3) at .0158259."""
    law = fitted(tmp_path, "muennighoff_c4_runs.csv", *MUENNIGHOFF, "--fix", C4)
    assert law["objective"] <= 0.0158074 and law["n_points"] == 182
    low, high = law["intervals"]["R_D"]
    assert low < 15.39 and high > 1000
    assert any(w.startswith("R_D is not identified") for w in law["warnings"])
    published = fitted(tmp_path, "muennighoff_c4_runs.csv", *MUENNIGHOFF, "--fix", f"{C4},R_D=15.387756,R_N=5.309743")
    assert published["objective"] == pytest.approx(0.0158259, abs=1e-7)


def test_muennighoff_with_all_parameters_free(tmp_path):
    law = fitted(tmp_path, "muennighoff_c4_runs.csv", *MUENNIGHOFF, "--predict", "1e9:1e11:1e9,1e9:1e11")
    assert law["objective"] < 0.0067
    assert any(w.startswith("R_D is not identified") for w in law["warnings"])
    repeated, fresh = law["predictions"]
    assert repeated["loss"] > fresh["loss"] * 1.01
