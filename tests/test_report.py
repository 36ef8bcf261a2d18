"""The report: what the numbers say, what the page holds, and how a real browser runs it."""

import html.parser
import json
import math
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from sslx import report
from sslx.config import UserError

CHROMIUM = shutil.which("chromium")
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync",
           "--enable-logging=stderr", "--v=0"]
ATTACK = "<script>console.error('escaped')</script> & \"quotes\""

browser = pytest.mark.skipif(CHROMIUM is None, reason="needs the chromium browser on PATH")


def run_record(modality: str, total_steps: int = 2000, **changes) -> dict:
    text = modality == "text"
    return {
        "kind": "run", "schema_version": 1, "run_id": "r-3f9a", "config_hash": "9c41d2e0", "git_sha": "4be1c07",
        "config": {"objective": {"name": "causal_lm" if text else "mae", "mask": {"ratio": 0.75}},
                   "model": {"name": "transformer" if text else "vit", "width": 384, "depth": 12},
                   "optim": {"lr": 1.5e-3, "betas": [0.9, 0.95], "decay": None}, "run": {"seed": 0}},
        "objective": "causal_lm" if text else "mae", "modality": modality,
        "dataset": "tiny stories" if text else "cifar10", "seed": 0, "n_params": 21_345_678,
        "n_params_nonembedding": 20_100_000,
        "flops_per_example": {"encoder": 4.1e9, "decoder": 1.3e9, "head": 6.2e7},
        "flops_convention": "forward and backward of every network, without rematerialization",
        "batch_size": 1024, "total_steps": total_steps, "device": "TPU v5p", "device_count": 64,
        "peak_flops": 4.59e14, "versions": {"jax": "0.10.2", "flax": "0.12.8"}} | changes


def point(step: int, split: str, metrics: dict, **changes) -> dict:
    tokens = step * 1024 * 64
    return {"kind": "point", "step": step, "examples": step * 1024, "tokens_seen": tokens,
            "flops_model": step * 1024 * 5_462_000_000, "flops_hw": step * 1024 * 7_000_000_000, "epochs": step / 48,
            "lr": 1.5e-3 * min(1, step / 200) * (0.5 + 0.5 * math.cos(math.pi * step / 2000)), "phase": "train",
            "split": split, "metrics": metrics, "wall_s": step * 0.31, "tokens_per_s": 211_000 + 900 * math.sin(step),
            "mfu": 0.41 + 0.004 * math.sin(step / 3)} | changes


def points_of(modality: str, steps: int = 2000) -> list[dict]:
    noise = np.random.default_rng(0)
    records = []
    for step in range(10, steps + 1, 10):
        loss = 0.35 + 1.9 * step**-0.32 + 0.02 * noise.normal()
        records.append(point(step, "train", {"loss": loss, "grad_norm": 0.4 + 8 / step}))
        if step % 200 == 0:
            s = step / steps
            metrics = {"heldout/loss": 0.37 + 1.9 * step**-0.32, "rankme": 40 + 180 * s, "feature_std": 0.3 + 0.6 * s}
            if modality == "text":
                metrics |= {"heldout/bits_per_byte": 1.1 + 2 * step**-0.3, "heldout/bits_per_byte@random_init": 2.31}
            else:
                metrics |= {"probe/accuracy": 0.45 + 0.352 * s, "probe/accuracy@random_init": 0.367,
                            "probe/accuracy@raw": 0.391, "knn/accuracy": 0.4 + 0.31 * s,
                            "knn/accuracy@random_init": 0.312, "knn/accuracy@raw": 0.338, "rankme@random_init": 12.5}
            records.append(point(step, "eval", metrics))
    return records


def save(folder: pathlib.Path, records: list[dict]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def pictures(count: int = 8, size: int = 32) -> np.ndarray:
    """Coloured gradients that differ by example, float32 [count, size, size, 3]."""
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([np.stack([x, y, np.full_like(x, n / count)], -1) for n in range(count)]).astype(np.float32)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> pathlib.Path:
    folder = save(tmp_path_factory.mktemp("vision"), [run_record("image"), *points_of("image")])
    x_NHWC = pictures()
    masked = np.where(np.random.default_rng(1).random((8, 8, 8)) < 0.75, 0.5, np.nan).repeat(4, 1).repeat(4, 2)
    view = np.where(np.isnan(masked)[..., None], x_NHWC, 0.5)
    report.save_samples(folder, 1000, {"older": x_NHWC})
    report.save_samples(folder, 2000, {"input": x_NHWC, "view": view, "reconstruction": (x_NHWC + 0.1 * view) / 1.1})
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """A text run that was resumed and has not finished."""
    records = [r for r in points_of("text") if r["step"] <= 1200]
    runs = run_record("text"), run_record("text", config_hash="77aa00ff", resumed_from=800)
    folder = save(tmp_path_factory.mktemp("text"), [runs[0], *records[:90], runs[1], *records[80:]])
    story = f"Once upon a time there was a small lighthouse. {ATTACK}\nIt shone all night. " * 3
    report.save_samples(folder, 1200, {"prompt": np.zeros((2, 4), np.int32), "generated": np.ones((2, 4), np.int32)},
                        lambda ids: story if ids[0] else "Once upon a time")
    report.write(folder)
    return folder


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and the text in between."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def named(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def browse(path: pathlib.Path, profile: pathlib.Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM after the scripts of a page ran, and what the page said on the console."""
    done = subprocess.run([CHROMIUM, *BROWSER, f"--user-data-dir={profile}", *flags, "--dump-dom", path.as_uri()],
                          capture_output=True, text=True, timeout=60, env=os.environ | {"HOME": str(profile)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


# ---- the page in a browser


@browser
def test_control_page_reports_its_console_errors(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<!doctype html><body><script>console.error('one'); missing()</script>")
    _, console = browse(bad, tmp_path / "profile")
    assert len(console) == 2 and "Uncaught ReferenceError" in console[1]


@browser
@pytest.mark.parametrize("modality", ["vision", "text"])
def test_page_runs_without_console_messages_and_answers_the_pointer(modality, request, tmp_path):
    folder = request.getfixturevalue(modality)
    page = (folder / "report.html").read_text()
    probe = """<script>
      const before = document.querySelectorAll('script:not([type])').length;
      for (const svg of document.querySelectorAll('.plot > svg')) {
        const box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 4 * box.width / 420}));
      }
      document.body.dataset.scripts = before;
      document.body.dataset.cut = [...document.querySelectorAll('.grid text')].map(text => [text, text.getBBox()])
        .filter(([, box]) => box.x < 0 || box.x + box.width > 420).map(([text]) => text.textContent).join(' ');
    </script>"""
    hovered = tmp_path / "hovered.html"
    hovered.write_text(page.replace("</body>", probe + "</body>"))
    dom, console = browse(hovered, tmp_path / "profile")
    assert console == []
    assert 'data-scripts="2"' in dom  # the page's own script and the probe: none came out of a generated text
    assert 'data-cut=""' in dom  # every label of an axis lies within its picture
    tips = re.findall(r'<div class="tip"[^>]*>([^<]*)</div>', dom)
    assert len(tips) == dom.count('<figure class="plot">') and all(tips)
    last = 2000 if modality == "vision" else 1200
    loss = 0.37 + 1.9 * last**-0.32
    assert tips[0].startswith(f"step {report.number(last)}") and f"held out {report.number(loss, 5)}" in tips[0]


@browser
def test_page_requests_nothing(vision, tmp_path):
    """The browser's own list of what a page requested is empty, and holds the picture of a control page."""
    listing = """<script>addEventListener('load', () => { document.body.dataset.requested =
      performance.getEntriesByType('resource').map(entry => entry.name).join(' '); });</script>"""

    def requested(page: str) -> str:
        path = tmp_path / "listed.html"
        path.write_text(page.replace("</body>", listing + "</body>"))
        return re.search(r'data-requested="([^"]*)"', browse(path, tmp_path / "profile")[0]).group(1)
    address = "http://127.0.0.1:9/picture.png"
    assert requested(f"<!doctype html><body><img src='{address}'></body>") == address
    assert requested((vision / "report.html").read_text()) == ""


# ---- the page as text


def test_vision_page_shows_summary_plots_and_pictures(vision):
    page = Elements((vision / "report.html").read_text())
    words = " ".join(page.words)
    for expected in ("mae on cifar10", "21.3M", "TPU v5p", "× 64", "9c41d2e0", "4be1c07", "Samples at step 2,000"):
        assert expected in words
    row = words[words.index("probe/accuracy"):].split()[:4]
    assert row == ["probe/accuracy", "0.367", "0.391", "0.802"]
    strips = page.named("img")
    assert [s["alt"].split(":")[0] for s in strips] == ["input", "view", "reconstruction"]
    assert len({s["style"] for s in strips}) == 1
    assert "Not finished" not in words


def test_text_page_escapes_and_tells_that_the_run_was_resumed(text):
    source = (text / "report.html").read_text()
    assert "<script>console.error" not in source
    page = Elements(source)
    words = " ".join(page.words)
    assert ATTACK in words
    assert "Not finished: the last record is of step 1,200 of 2,000." in words
    assert "Resumed at step 800 with another config_hash; the last is shown." in words and "77aa00ff" in words
    assert words.index("prompt") < words.index("generated")


@pytest.mark.parametrize("modality", ["vision", "text"])
def test_page_holds_all_it_needs(modality, request):
    page = Elements((request.getfixturevalue(modality) / "report.html").read_text())
    addresses = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "srcset")]
    assert addresses and all(a.startswith("data:") for a in addresses)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", report.STYLE + report.SCRIPT)


def test_every_plot_has_a_name_a_description_and_finite_geometry(vision):
    source = (vision / "report.html").read_text()
    plots = re.findall(r'<svg viewBox="0 0 420 250" role="img".*?</svg>', source, re.S)
    titles = [re.search(r"<title>(.*?)</title><desc>(.+?)</desc>", p, re.S).group(1) for p in plots]
    assert {"loss against step", "loss against tokens seen", "loss against model FLOPs",
            "probe/accuracy against model FLOPs", "rankme against step", "grad_norm against step"} <= set(titles)
    for p in plots:
        assert "nan" not in p and "inf" not in p
        for d in re.findall(r' d="M([^"]*)"', p):
            xy = np.array([pair.split() for pair in d.split("L")], float)
            assert (xy >= [report.LEFT, report.TOP]).all() and (xy <= [report.RIGHT, report.BOTTOM]).all()
            assert (np.diff(xy[:, 0]) >= 0).all()


HOSTILE = ATTACK.replace("escaped", "metric")


@pytest.mark.parametrize("records", [
    [run_record("image")],
    [{"kind": "run"}],
    [run_record("image"), point(0, "train", {"loss": 2.5})],
    [run_record("image"), point(1, "train", {"loss": None}, lr=None, mfu=None, tokens_per_s=None, flops_model=None)],
    [run_record("image"), point(1, "train", {"loss": math.nan}), point(2, "train", {"loss": 1.0})],
    [run_record("image"), point(5, "eval", {"probe/accuracy": 0.5, "probe/accuracy@raw": None})],
    [run_record("image"), *(point(s, "train", {"loss": 0.0}) for s in range(3))],
    [run_record("image"), *(point(s, "train", {"loss": -1.5}, lr=0.0) for s in (1, 100))],
    [run_record("image", objective=HOSTILE, config={HOSTILE: {HOSTILE: HOSTILE}}, versions={HOSTILE: HOSTILE},
                flops_per_example={HOSTILE: 1}), point(1, "eval", {HOSTILE: 1.0})],
], ids=["no points", "bare run", "one point", "nulls", "nan", "one eval", "constant", "negative", "hostile"])
def test_poor_runs_make_a_page(records, tmp_path):
    page = Elements(report.write(save(tmp_path, records)).read_text())
    assert len(page.named("h1")) == 1
    assert sum("type" not in script for script in page.named("script")) == 1


def test_missing_or_foreign_metrics_are_errors_of_the_user(tmp_path, capsys):
    with pytest.raises(UserError, match="metrics.jsonl does not exist"):
        report.write(tmp_path)
    with pytest.raises(SystemExit, match="does not exist"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="no record of kind 'run'"):
        report.write(save(tmp_path, [point(1, "train", {"loss": 1.0})]))
    report.main([str(save(tmp_path, [run_record("image")]))])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


# ---- samples


@pytest.mark.parametrize("size, channels", [(32, 3), (28, 1), (96, 3), (224, 3)])
def test_strip_holds_each_image_enlarged_by_a_whole_number(size, channels, tmp_path):
    x_NHWC = np.random.default_rng(0).random((3, size, size, channels)).astype(np.float32)
    report.save_samples(tmp_path, 7, {"input": x_NHWC})
    pixels = np.asarray(Image.open(tmp_path / "samples/7/input.png"))
    factor = max(1, round(96 / size))
    tile = factor * size
    assert pixels.shape == (tile, 3 * tile + 2 * report.GAP, 4)
    for n, x_HWC in enumerate(x_NHWC):
        found = pixels[:, n * (tile + report.GAP):][:, :tile, :3]
        np.testing.assert_array_equal(found, np.broadcast_to(
            np.round(x_HWC * 255).repeat(factor, 0).repeat(factor, 1), found.shape))


def test_captions_share_columns_and_keep_their_order(tmp_path):
    shown = {"z input": pictures(4, 32), "crop": pictures(4, 16), "a/b": pictures(2, 32)}
    report.save_samples(tmp_path, 30, shown)
    samples = report.newest_samples(tmp_path)
    assert [caption for caption, _ in samples.files] == ["z input", "crop", "a/b"]
    widths = [Image.open(path).width for _, path in samples.files]
    assert widths == [4 * 96 + 3 * report.GAP] * 2 + [2 * 96 + report.GAP]


def test_images_outside_the_range_are_clipped(tmp_path):
    x_NHWC = np.array([-1.0, 2.0, np.nan], np.float32).reshape(3, 1, 1, 1)
    report.save_samples(tmp_path, 1, {"x": x_NHWC})
    pixels = np.asarray(Image.open(tmp_path / "samples/1/x.png"))
    assert [pixels[0, n * (96 + report.GAP), 0] for n in range(3)] == [0, 255, 0]


def test_tokens_are_decoded_row_by_row(tmp_path):
    ids_NT = np.array([[104, 105], [121, 111]])
    report.save_samples(tmp_path, 1, {"said": ids_NT}, lambda ids: bytes(ids).decode())
    report.save_samples(tmp_path, 2, {"said": ids_NT})
    assert (tmp_path / "samples/1/said.txt").read_text().split() == ["hi", "────────", "yo"]
    assert "104 105" in (tmp_path / "samples/2/said.txt").read_text()


def test_newest_step_is_by_number_and_a_step_is_replaced_whole(tmp_path):
    for step in (9, 10):
        report.save_samples(tmp_path, step, {"old": pictures(1, 8)})
    report.save_samples(tmp_path, 10, {"new": pictures(1, 8)})
    samples = report.newest_samples(tmp_path)
    assert samples.step == 10 and [c for c, _ in samples.files] == ["new"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["10", "9"]


def test_an_array_that_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'wave' has shape \(2, 5\) and type float32"):
        report.save_samples(tmp_path, 1, {"wave": np.zeros((2, 5), np.float32)})
    assert not (tmp_path / "samples/1").exists()


# ---- numbers


@pytest.mark.parametrize("value, text", [
    (0, "0"), (0.367, "0.367"), (999.96, "1k"), (21_345_678, "21.35M"), (1.5e9, "1.5B"), (3e-4, "3×10⁻⁴"),
    (1e15, "10¹⁵"), (-2500, "-2.5k"), (120, "120")])
def test_number(value, text):
    assert report.number(value) == text


def test_a_resumed_run_counts_a_repeated_step_once():
    points = [point(s, "train", {"loss": v}) for s, v in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5))]
    assert report.series(points, "train", "loss") == [(1, 5.0), (2, 4.5), (3, 3.5)]


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (1e-9, 2e-9), (12_345, 98_765), (0.367, 0.3671)])
def test_linear_ticks_are_few_even_and_inside(low, high):
    ticks = np.array(report.linear_ticks(low, high))
    assert 2 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)
    labels = report.tick_labels(list(ticks), report.number)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("low, high", [(1, 1e12), (3, 500), (1.1, 1.9), (1e15, 8e16)])
def test_log_ticks_are_few_and_inside(low, high):
    ticks = report.log_ticks(low, high)
    assert 3 <= len(ticks) <= 7 and all(low <= t <= high for t in ticks)


def test_thinning_keeps_ends_and_extremes():
    y = np.random.default_rng(0).normal(size=5000)
    y[3210] = 99.0
    line = list(enumerate(y.tolist()))
    few = report.thin(line)
    assert len(few) <= 501 and (3210, 99.0) in few and set(few) <= set(line)
    assert few[0][0] < 20 and few[-1] == line[-1] and [p[0] for p in few] == sorted(p[0] for p in few)
    assert report.thin(line[:300]) == line[:300]


def test_plot_puts_points_where_numpy_puts_them():
    line = [(10.0, 1.0), (100.0, 2.0), (1000.0, 4.0)]
    figure = report.plot("loss", report.FLOPS, report.Quantity("loss", log=True), {"train": line}, {})
    d = re.search(r' d="M([^"]*)"', figure).group(1)
    found = np.array([pair.split() for pair in d.split("L")], float)
    assert "(log)" in figure
    for axis in (0, 1):
        logs = np.log([p[axis] for p in line])
        slope, offset = np.polyfit(logs, found[:, axis], 1)
        np.testing.assert_allclose(found[:, axis], slope * logs + offset, atol=0.06)
    assert (np.diff(found[:, 0]) > 0).all() and (np.diff(found[:, 1]) < 0).all()
