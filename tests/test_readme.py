"""What the README shows is what there is."""

import json
import pathlib
import re
import statistics

import pytest

from sslx.scaling import scores

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_of_an_objective_is_the_file():
    assert f"```python\n{(ROOT / 'sslx/objectives/rotation.py').read_text()}```" in README


def test_every_config_is_listed():
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    first_columns = "".join(cell for page in pages for cell in re.findall(r"^\|[^|]*\|", page, re.M))
    listed = set(re.findall(r"`(\w+\.py)`", first_columns))
    assert listed == {p.name for p in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:sslx|configs)/[\w/]+\.py)`", README))))
def test_every_file_that_is_named_exists(path):
    assert (ROOT / path).is_file()


def test_the_table_of_joint_embeddings_is_of_its_logs(capsys):
    runs = ROOT / "studies/joint_embeddings/runs"
    assert scores.main([str(runs), "--minutes", "4,8,20"]) == 0
    _, *table = capsys.readouterr().out.splitlines()
    assert len(table) > 10 and "\n".join(table) in (ROOT / "docs/joint_embeddings.md").read_text()


def test_the_table_beside_lightly_is_of_its_runs():
    runs = json.loads((ROOT / "studies/joint_embeddings/lightly.json").read_text())["300"]
    page = (ROOT / "docs/joint_embeddings.md").read_text()
    assert len(runs) > 10
    for name, sides in runs.items():
        mean = {(side, what): statistics.fmean(run[what] for run in of_seeds.values())
                for side, of_seeds in sides.items() for what in ("knn", "probe", "cpu_s")}
        cells = [f"{mean[side, 'knn']:.1f} / {mean[side, 'probe']:.1f}, {mean[side, 'cpu_s']:.0f}" for side in sides]
        ratio = statistics.median(sides["lightly"][seed]["cpu_s"] / run["cpu_s"] for seed, run in sides["sslx"].items())
        assert f"| {name} | {len(sides['sslx'])} | {' | '.join(cells)} | {ratio:.2f}x |" in page
