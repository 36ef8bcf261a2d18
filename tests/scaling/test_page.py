"""The page about runs: whole by itself, made of real logs and tables, and honest where there is no law."""

import html.parser
import json
import re

import pytest
from experiments import ROOT

from sslx.scaling import report

STUDIES = ROOT / "studies"


def made(tmp_path, *arguments: object) -> str:
    out = tmp_path / "page.html"
    assert report.main([*map(str, arguments), "-o", str(out)]) == 0
    return out.read_text()


class Nesting(html.parser.HTMLParser):
    """Fails where elements do not nest; collects what the page would ask for."""

    def __init__(self):
        super().__init__()
        self.open, self.requests = [], []

    def handle_starttag(self, tag, attributes):
        self.requests += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v
                          and not v.startswith(("#", "data:"))]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return made(tmp_path_factory.mktemp("page"), STUDIES / "refinedweb")


def test_the_page_is_whole_and_asks_for_nothing(public):
    page = Nesting()
    page.feed(public)
    assert not page.open and not page.requests and "@import" not in public
    assert 'content="default-src &#x27;none&#x27;' in public
    assert len(public) < 400_000


def test_a_study_shows_its_law_figures_and_predictions(public):
    law = json.loads((STUDIES / "refinedweb" / "law.json").read_text())
    text = re.sub(r"<style>.*?</style>|<svg .*?</svg>", "", public, flags=re.DOTALL)
    for name, value in law["params"].items():
        assert re.search(rf">{name}</th><td>{report.number(value)}</td>", text), name
    assert public.count("<svg ") == 6 and law["form"] == "chinchilla"
    prediction = json.loads((STUDIES / "refinedweb" / "prediction.json").read_text())["predictions"]
    assert all(f"<td>{report.number(p['loss'])}</td>" in text for p in prediction)
    for warning in law["warnings"]:
        assert report.tag("li", warning) in text


def test_the_runs_of_a_pilot(tmp_path):
    """Real logs: each run is in the table, and what the fit warned of is above the figures."""
    page = made(tmp_path, STUDIES / "pilot_text" / "runs")
    names = [p.name for p in (STUDIES / "pilot_text" / "runs").iterdir()]
    assert len(names) == 16 and all(f">{name}</th>" in page for name in names)
    assert "E is at its bound" in page and page.index("E is at its bound") < page.index("<svg ")


def test_objectives_stand_beside_each_other_by_accuracy_only(tmp_path):
    page = made(tmp_path, STUDIES / "objectives_images" / "runs")
    assert "Objectives at equal FLOPs" in page and "probe/accuracy" in page and "knn/accuracy" in page
    assert page.count("No law:") == 3  # three budgets of one size each
    for objective in ("mae", "simclr", "dino"):
        assert f"{objective} on fashion-mnist/train" in page


def test_mistakes(tmp_path, capsys):
    assert report.main([str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
