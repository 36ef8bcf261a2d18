"""Studies that are kept: cut logs say what whole ones say, and the folders of this repository are read."""

import json

import jax
import numpy as np
import pytest
from experiments import ROOT, config_module
from test_points import log_of_a_run

from sslx import experiment, log
from sslx.config import UserError
from sslx.scaling import study
from sslx.scaling.points import from_runs


def runs(folder):
    for i, n in enumerate((1e6, 2e6, 4e6)):
        log_of_a_run(folder / f"r{i}", n, 3.0 - i / 10)
        with (folder / f"r{i}" / "metrics.jsonl").open("a") as file:
            file.writelines(log.line(dict(kind="point", step=s, split="train", tokens_seen=s, flops_model=s * n,
                                          metrics=dict(loss=9 / s))) for s in range(1, 101))
    return folder


def test_a_cut_log_says_the_same(tmp_path):
    whole, out = runs(tmp_path / "whole"), tmp_path / "cut"
    assert study.main([str(whole), "--out", str(out)]) == 0
    for name in ("r0", "r1", "r2"):
        kept = log.records(out / name)
        training = [r["step"] for r in kept if r.get("split") == "train"]
        assert len(training) <= study.KEPT and training[-1] == 100 and training == sorted(training)
        assert [r for r in kept if r.get("split") != "train"] == [r for r in log.records(whole / name)
                                                                  if r.get("split") != "train"]
    for a, b in zip(from_runs([whole], "heldout/loss", "n_params"), from_runs([out], "heldout/loss", "n_params"),
                    strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cut_log_names_no_folder_of_the_machine(tmp_path):
    record = dict(kind="run", dataset="text:/home/me/data/a.jsonl/train", n=1e-30,
                  config=dict(data=dict(train=dict(path="/home/me/data/a.jsonl")), run=dict(trunk="/home/me/data")))
    assert study.cut([record]) == [dict(kind="run", dataset="text:a.jsonl/train", n=1e-30, config=dict(
        data=dict(train=dict(path="a.jsonl")), run=dict(trunk="data")))]


def test_a_study_of_runs(tmp_path):
    runs(tmp_path / "s" / "runs")
    runs(tmp_path / "s" / "predicted")
    (tmp_path / "s" / "study.json").write_text(json.dumps(dict(title="T", n="n_params_nonembedding")))
    (tmp_path / "s" / "prediction.json").write_text(json.dumps(dict(predictions=[dict(n=1, d=2, loss=3)])))
    found = study.read(tmp_path / "s")
    assert (found.title, found.label, found.law) == ("T", "heldout/loss", None)
    assert found.points.n.tolist() == found.measured.n.tolist() == [5e5, 1e6, 2e6] and len(found.predictions) == 1


def test_what_runs_ended_with(tmp_path):
    logs = study.logs([runs(tmp_path)])
    ends = study.ends(logs, "heldout/loss")
    assert [(e["run"], e["n"], e["value"]) for e in ends] == [("r0", 1e6, 3.0), ("r1", 2e6, 2.9), ("r2", 4e6, 2.8)]
    assert study.ends(logs, "none")[0]["value"] is None
    assert len(study.table(ends, "heldout/loss").splitlines()) == 4


def test_objectives_apart(tmp_path):
    log_of_a_run(tmp_path / "a", 1e6)
    log_of_a_run(tmp_path / "b", 1e6, objective="mae")
    found = study.by_objective([tmp_path], "knn/accuracy")
    assert found.keys() == {"causal_lm", "mae"} and found["mae"].loss.tolist() == [0.5]


@pytest.mark.parametrize("about, said", [(None, "it has no study.json"), ("{", "no JSON"), ("[]", "holds no object"),
                                         ('{"tilte": "T"}', "did you mean 'title'"), ("{}", "neither runs/ nor")])
def test_what_is_no_study(tmp_path, about, said):
    if about is not None:
        (tmp_path / "study.json").write_text(about)
    with pytest.raises(UserError, match=said):
        study.read(tmp_path)


def test_runs_of_one_name(tmp_path, capsys):
    for folder in ("a", "b"):
        log_of_a_run(tmp_path / folder / "r", 1e6)
    assert study.logs([tmp_path]).keys() == {"a/r", "b/r"} and study.logs([tmp_path / "a"]).keys() == {"r"}
    assert study.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "workdirs of the same name" in capsys.readouterr().err


def test_nothing_to_cut(tmp_path, capsys):
    assert study.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no metrics.jsonl below" in capsys.readouterr().err


@pytest.mark.parametrize("name, argument", [
    ("masked_images", ()), ("prose_shallow", ()),
    *(("objectives_images", (o,)) for o in ("mae", "simclr", "dino")),
    *(("objectives_text", (o,)) for o in ("causal_lm", "masked_lm", "span_corruption"))])
def test_configs_of_studies(name, argument):
    """Every section is read; with rows of the same shape, which are always here."""
    conf = config_module(ROOT / "studies" / name / "config.py").get_config(*argument)
    conf.evals = {}
    model = conf.model
    rows = (dict(modality="text", length=128, vocab_size=model.vocab_size) if "vocab_size" in model else
            dict(modality="image", size=28, channels=1))
    conf.data.train = dict(name="synthetic", n=64, **rows)
    assert experiment.build(conf, jax.devices()[:1]).run.steps == conf.optim.steps
