"""The table of scores says what logs hold: means over seeds, at the last evaluation within a time."""

import pytest

from sslx import log
from sslx.scaling import scores


def written(workdir, points):
    """A log of evaluations {step: (CPU-seconds, metrics)}."""
    workdir.mkdir(parents=True)
    run = dict(kind="run", objective="x", flops_per_example={"encoder": 2e8, "loss": 5e7})
    evaluated = [dict(kind="point", split="eval", step=step, examples=100 * step, cpu_s=cpu_s, metrics=metrics)
                 for step, (cpu_s, metrics) in points.items()]
    (workdir / "metrics.jsonl").write_text("".join(map(log.line, [run, *evaluated])))


@pytest.fixture
def folder(tmp_path):
    for seed, shift in enumerate((0.0, 0.1)):
        written(tmp_path / f"byol_s{seed}", {
            0: (5.0, {"knn/accuracy@random_init": 0.5 + shift, "rankme@random_init": 20.0, "knn/accuracy@raw": 0.9}),
            10: (130.0, {"knn/accuracy": 0.6 + shift, "rankme": 30.0}),
            40: (500.0, {"knn/accuracy": 0.7 + shift, "rankme": 34.0 + 2 * seed})})
    written(tmp_path / "swav", {7: (61.0, {"knn/accuracy": 0.25})})
    return tmp_path


def printed(capsys, *arguments):
    status = scores.main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    return status, [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[3:]], err


def test_means_at_the_end(folder, capsys):
    status, rows, _ = printed(capsys, folder, "--metrics", "knn/accuracy,rankme")
    assert status == 0
    assert rows == [["byol, 2 seeds", "250M", "55.0 / 20", "75.0 / 35 (4k, 8.3 min)"],
                    ["swav", "250M", "- / -", "25.0 / - (700, 1.0 min)"]]


def test_the_last_evaluation_within_a_time(folder, capsys):
    _, rows, _ = printed(capsys, folder, "--metrics", "knn/accuracy", "--minutes", "2,2.1,8,20")
    assert rows[0][2:] == ["55.0", "-", "65.0 (1k, 2.2 min)", "75.0 (4k, 8.3 min)", "75.0 (4k, 8.3 min)"]
    assert rows[1][2:] == ["-", *["25.0 (700, 1.0 min)"] * 4]
    written(folder / "swav_s1", {7: (150.0, {"knn/accuracy": 0.35})})
    assert printed(capsys, folder, "--metrics", "knn/accuracy", "--minutes", "2")[1][1][3] == "-"  # two seeds or none


def test_mistakes_are_named(folder, tmp_path, capsys):
    assert printed(capsys, folder, "--minutes", "four")[::2] == (
        2, "\nerror: --minutes is 'four'; it takes numbers of at least 1e-09, with commas between them\n")
    written(folder / "young", {0: (5.0, {})})
    status, _, err = printed(capsys, folder)
    assert status == 2 and "young has no evaluation after its first step" in err
