"""What the README shows is what there is."""

import pathlib
import re

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
