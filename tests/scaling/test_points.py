"""What points are read from, and what is refused: every bad row, column and run is named."""

import json
import pathlib

import numpy as np
import pytest

from sslx import config
from sslx.config import UserError
from sslx.scaling import fit
from sslx.scaling.points import from_runs, from_table

OBJECTIVES = pathlib.Path(__file__).parent.parent.parent / "sslx/objectives"


def rows(budgets: int = 4, sizes: int = 4) -> list[dict]:
    """An isoFLOP grid of L = 1.7 + 400/N^.34 + 900/D^.3."""
    found = []
    for c in 1e17 * 4.0 ** np.arange(budgets):
        for n in (c / 120) ** 0.5 * np.geomspace(0.3, 3, sizes):
            d = c / 6 / n
            found.append(dict(n=n, d=d, c=c, loss=1.7 + 400 / n**0.34 + 900 / d**0.3, kind="a"))
    return found


def write(path, table: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


COLUMNS = dict(n="n", d="d", loss="loss")


def refusal(capsys, tmp_path, table: list[dict], *flags: str) -> str:
    """What the command says of a table that it refuses."""
    columns = [part for role, name in COLUMNS.items() for part in (f"--{role}", name) if f"--{role}" not in flags]
    status = fit.main(["--table", str(write(tmp_path / "t.jsonl", table)), *columns, *flags])
    out, err = capsys.readouterr()
    assert status == 2 and not out, (out, err)
    return err


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, "three", None, float("inf")])
@pytest.mark.parametrize("column", ["n", "d", "loss"])
def test_a_bad_value_is_named(capsys, tmp_path, column, value):
    table = rows()
    table[6][column] = value
    said = refusal(capsys, tmp_path, table)
    assert "row 7" in said and repr(column) in said and repr(value) in said


def test_a_missing_column_has_neighbours(capsys, tmp_path):
    assert "did you mean 'loss'" in refusal(capsys, tmp_path, rows(), "--loss", "los")
    assert "did you mean 'kind'" in refusal(capsys, tmp_path, rows(), "--where", "kin=a")
    assert "values of the column" in refusal(capsys, tmp_path, rows(), "--where", "kind=b")


@pytest.mark.parametrize("n, d, loss", [("loss", "d", "n"), ("n", "loss", "d"), ("n", "loss", "loss"), ("n", "d", "c")])
def test_swapped_columns(capsys, tmp_path, n, d, loss):
    assert "are the columns swapped?" in refusal(capsys, tmp_path, rows(), "--n", n, "--d", d, "--loss", loss)


def test_size_and_data_swapped(tmp_path):
    table = write(tmp_path / "t.jsonl", rows())
    assert not from_table(table, COLUMNS).warnings
    assert "are --n and --d swapped?" in from_table(table, dict(n="d", d="n", loss="loss")).warnings[0]


@pytest.mark.parametrize("table, said", [
    (rows()[:3], "3 points for"),
    (rows(1, 12), "about the same compute"),
    ([row | dict(loss=3.0) for row in rows()], "constant"),
    ([row | dict(loss=3.0 + 1e-4 * (i % 2)) for i, row in enumerate(rows())], "constant"),
    ([row | dict(n=1e8) for row in rows()], "different values of N"),
    (rows()[:2] * 6, "2 points for"),
])
def test_too_little_is_refused(capsys, tmp_path, table, said):
    assert said in refusal(capsys, tmp_path, table)


def test_one_line_in_size_and_data(capsys, tmp_path):
    table = [dict(n=n, d=20 * n, loss=1.7 + 400 / n**0.34 + 900 / (20 * n)**0.3) for n in np.geomspace(1e7, 1e9, 12)]
    assert "N and D lie on one line" in refusal(capsys, tmp_path, table, "--form", "chinchilla")


def test_duplicates_count_once(tmp_path):
    table = rows()
    points = from_table(write(tmp_path / "t.jsonl", table + table[:5]), COLUMNS)
    assert len(points.loss) == len(table) and "5 of 21 rows are duplicates" in points.warnings[0]


def test_what_is_no_table(tmp_path):
    for name, text, said in (("t.txt", "n,d\n", "a table is"), ("t.csv", "", "no rows"), ("t.jsonl", "{\n", "read"),
                             ("t.jsonl", "3\n", "no rows")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said):
            from_table(tmp_path / name, COLUMNS)
    with pytest.raises(UserError, match="cannot be read"):
        from_table(tmp_path / "none.csv", COLUMNS)


def test_csv_where_and_group(tmp_path):
    (tmp_path / "t.csv").write_text("n,d,loss,run\n1e6,1e8,4,a\n1e6,2e8,3,a\n2e6,1e8,3.5,b\n3e6,1e8,3.2,c\n")
    points = from_table(tmp_path / "t.csv", COLUMNS, "run", [("run", "a"), ("run", "c")])
    assert points.n.tolist() == [1e6, 1e6, 3e6] and points.run.tolist() == [0, 0, 1]
    np.testing.assert_allclose(points.c, 6 * points.n * points.d)


def test_budgets(tmp_path):
    points = from_table(write(tmp_path / "t.jsonl", rows()), COLUMNS | dict(c="c"))
    assert points.budget.tolist() == sorted([0, 1, 2, 3] * 4)
    without_gaps = points._replace(c=np.geomspace(1, 2**7, 16))
    assert without_gaps.budget.max() == 7
    assert points._replace(c=np.geomspace(1, 1e9, 16)).budget.max() == 8


def log_of_a_run(folder, n: float, metric: float = 3.0, *, phase: str = "annealed", step: int = 100, seed: int = 0,
                 objective: str = "causal_lm", metrics: dict | None = None, heldout_batch: int | None = None,
                 **section):
    """A run's log with what a fit reads of it, beside a point in the middle of the run."""
    folder.mkdir(parents=True)
    run = dict(kind="run", schema_version=1, run_id=f"{n}", config=dict(objective=dict(name=objective, **section)),
               objective=objective, dataset="text", seed=seed, n_params=n, n_params_nonembedding=n / 2,
               batch_size=8, heldout_batch=heldout_batch, total_steps=100)
    points = [dict(kind="point", step=s, tokens_seen=s * 1e6, flops_model=s * 7e6 * n, epochs=4.0, phase=p,
                   split="eval", metrics={"heldout/loss": m, "knn/accuracy": 0.5, "heldout/loss@random_init": 9.0}
                   | (metrics or {}))
              for s, p, m in ((50, "decay", metric + 1), (step, phase, metric))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (run, *points)))


def test_runs(tmp_path):
    for i, n in enumerate((1e6, 2e6, 4e6)):
        log_of_a_run(tmp_path / "sweep" / str(i), n, 3.0 - i / 10)
    points = from_runs([tmp_path / "sweep"], "heldout/loss", "n_params")
    assert points.n.tolist() == [1e6, 2e6, 4e6] and points.loss.tolist() == [3.0, 2.9, 2.8]
    assert points.d.tolist() == [1e8] * 3 and points.unique.tolist() == [2.5e7] * 3
    np.testing.assert_allclose(points.c, 7e8 * points.n)
    assert from_runs([tmp_path / "sweep" / "1"], "knn/accuracy", "n_params_nonembedding").n.tolist() == [1e6]


@pytest.mark.parametrize("other, said", [
    (dict(phase="decay"), "1 of 3 runs not annealed"), (dict(phase="stable"), "'stable'"),
    (dict(step=90), "1 of 3 runs unfinished"), (dict(objective="mlm"), "1 of mlm"),
    (dict(mask_rate=0.5), "objectives"),
])
def test_runs_that_do_not_belong(tmp_path, other, said):
    log_of_a_run(tmp_path / "a", 1e6)
    log_of_a_run(tmp_path / "b", 2e6)
    log_of_a_run(tmp_path / "c", 4e6, **other)
    with pytest.raises(UserError, match=said):
        from_runs([tmp_path], "heldout/loss", "n_params")


def test_held_out_losses_of_other_batches_share_no_law_if_they_are_of_the_batch(tmp_path):
    for i, rows in enumerate((8, 8, 16)):
        log_of_a_run(tmp_path / str(i), 1e6 * 2**i, heldout_batch=rows)
    with pytest.raises(UserError, match="1 of causal_lm .* in batches of 16"):
        from_runs([tmp_path], "heldout/loss", "n_params")
    assert len(from_runs([tmp_path], "knn/accuracy", "n_params").loss) == 3


@pytest.mark.parametrize("name", [p.stem for p in OBJECTIVES.glob("*.py") if config.has_make(p)])
def test_runs_of_other_lengths_belong_together(tmp_path, name):
    """Whatever an objective counts in steps."""
    counted = ["steps", *config.fields(config.load("objectives", name), config.Steps)]
    for i in range(3):
        log_of_a_run(tmp_path / str(i), 1e6 * 2**i, objective=name, **dict.fromkeys(counted, 10 * i))
    assert len(from_runs([tmp_path], "heldout/loss", "n_params").loss) == 3


@pytest.mark.parametrize("gains, warned", [
    ((0.0, 0.01, -0.02), False), ((0.2, 0.3, 0.1), False), ((0.0, 0.01, 0.3), True), ((None, None, 0.3), False)])
def test_runs_on_both_sides_of_copying(tmp_path, gains, warned):
    for i, gain in enumerate(gains):
        log_of_a_run(tmp_path / str(i), 1e6 * 2 ** i, metrics={"copying/gain": gain})
    warnings = from_runs([tmp_path], "heldout/loss", "n_params").warnings
    assert [w for w in warnings if "1 of 3 runs copy from their context" in w and "/2)" in w] == list(warnings)
    assert bool(warnings) == warned


def test_runs_without_the_metric(tmp_path):
    log_of_a_run(tmp_path / "a", 1e6)
    with pytest.raises(UserError, match="did you mean 'heldout/loss'"):
        from_runs([tmp_path], "heldout/los", "n_params")
    with pytest.raises(UserError, match="no metrics.jsonl"):
        from_runs([tmp_path / "none"], "heldout/loss", "n_params")


@pytest.mark.parametrize("flags", [[], ["runs", "--table", "t.csv"], ["--table", "t.csv"], ["--form", "none"],
                                   ["--table", "t.csv", "--n", "n", "--predict", "3"],
                                   ["--table", "t.csv", "--predict", "1e8:x"], ["--fix", "A"]])
def test_command_lines_that_cannot_be_read(capsys, flags):
    assert fit.main(flags) == 2
    assert "error:" in capsys.readouterr().err
