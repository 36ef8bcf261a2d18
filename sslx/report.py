"""One page about a run: `python -m sslx.report W` turns W/metrics.jsonl and W/samples into W/report.html.

The page needs nothing but itself: plots are inline SVG, pictures are data URLs, and its security policy
forbids every request. What it shows is what metrics.jsonl holds; nothing is computed anew.
"""

import argparse
import base64
import datetime
import html
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image

from sslx import log
from sslx.config import UserError
from sslx.workdir import write_atomically

Record = Mapping[str, Any]
XY = tuple[float, float]

BASELINES = {"random_init": "random init", "raw": "raw input"}
MONITORS = ("rankme", "feature_std", "collapsed")
TILE, GAP = 96, 4  # pixels of one picture in a strip, and between two


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes workdir/report.html from workdir/metrics.jsonl and the newest step of workdir/samples.

    Raises UserError if there is no metrics.jsonl, or no run record in it.
    """
    workdir = pathlib.Path(workdir)
    metrics = workdir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics} does not exist: a report is made of the metrics.jsonl that a run writes;"
                        " give the folder that was the --workdir of a run")
    runs, points = log.read(workdir)
    if not runs:
        raise UserError(f"{metrics} holds no record of kind 'run', which every run writes first:"
                        " the file is cut off or is not from sslx; give the --workdir of a run")
    written = datetime.datetime.fromtimestamp(metrics.stat().st_mtime).astimezone()
    path = workdir / "report.html"
    write_atomically(path, page(runs, points, log.events(workdir), newest_samples(workdir), written))
    return path


def save_samples(workdir: str | os.PathLike[str], step: int, shown: Mapping[str, np.ndarray],
                 decode: Callable[[Sequence[int]], str] | None = None) -> None:
    """Writes `shown` of an objective to workdir/samples/<step>, one file per caption, all at once.

    Images, float [N, H, W, C] in [0, 1] with C 1 or 3, become a PNG with the N examples in a row. All
    captions share one tile size, so that an example, its views and its reconstruction stand above each
    other. Tokens, int [N, T], become a text file through `decode`, or their ids without one.

    Raises UserError for an array that is neither.
    """
    folder = pathlib.Path(workdir) / "samples" / str(step)
    partial = folder.with_name(f".{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = {caption: np.asarray(array) for caption, array in shown.items()}
    widest = max((a.shape[2] for a in arrays.values() if a.ndim == 4), default=1)
    tile = widest * max(1, round(TILE / widest))
    names = {}
    for caption, array in arrays.items():
        stem = caption.replace("/", "_")
        if array.ndim == 4 and array.shape[-1] in (1, 3):
            names[f"{stem}.png"] = caption
            strip(array, tile).save(partial / f"{stem}.png")
        elif array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
            names[f"{stem}.txt"] = caption
            (partial / f"{stem}.txt").write_text(transcript(array, decode), encoding="utf-8")
        else:
            raise UserError(f"the sample {caption!r} has shape {array.shape} and type {array.dtype}: an objective"
                            " shows images float [N, H, W, 1 or 3] or tokens int [N, T]; change its `show`")
    (partial / "captions.json").write_text(json.dumps(names), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def strip(x_NHWC: np.ndarray, tile: int) -> Image.Image:
    """N images in a row, each `tile` pixels wide, pixels kept square; the gaps are transparent."""
    bytes_NHWC = np.round(255 * np.clip(np.nan_to_num(x_NHWC.astype(np.float32)), 0, 1)).astype(np.uint8)
    N, H, W, _ = bytes_NHWC.shape
    height = max(1, round(tile * H / W))
    canvas = Image.new("RGBA", (N * (tile + GAP) - GAP, height))
    for n, x_HWC in enumerate(bytes_NHWC):
        image = Image.fromarray(np.broadcast_to(x_HWC, (H, W, 3)).copy())
        canvas.paste(image.resize((tile, height), Image.Resampling.NEAREST), (n * (tile + GAP), 0))
    return canvas


def transcript(x_NT: np.ndarray, decode: Callable[[Sequence[int]], str] | None) -> str:
    """One text per row of tokens, with a rule between two."""
    texts = (" ".join(map(str, x_T)) if decode is None else decode(x_T) for x_T in x_NT.tolist())
    return "\n\n────────\n\n".join(texts) + "\n"


class Samples(NamedTuple):
    """The files of one step, in the order in which they were shown: (caption, file)."""

    step: int
    files: list[tuple[str, pathlib.Path]]


def newest_samples(workdir: pathlib.Path) -> Samples | None:
    """The samples of the highest step; None if there are none. Raises UserError for captions that cannot be read."""
    folders = [f for f in (workdir / "samples").glob("*") if f.is_dir() and f.name.isdecimal()]
    if not folders:
        return None
    folder = max(folders, key=lambda f: int(f.name))
    order = folder / "captions.json"
    try:
        names = dict(json.loads(order.read_text(encoding="utf-8"))) if order.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{order} cannot be read ({error}): remove it; pictures then have the names of their"
                        " files") from error
    # Of this folder alone, whatever names the captions are for.
    found = {f.name: f for f in sorted(folder.iterdir()) if f.suffix in (".png", ".txt") and f.is_file()}
    order_of = [*(n for n in names if n in found), *(n for n in found if n not in names)]
    return Samples(int(folder.name), [(str(names.get(n, found[n].stem)), found[n]) for n in order_of])


# ---- numbers out of the points


def finite(value: Any) -> TypeGuard[float]:
    """Whether a plot can hold it: differences and ratios of such numbers are finite too."""
    return log.is_number(value) and (value == 0 or 1e-150 < abs(value) < 1e150)


def series(points: Iterable[Record], split: str, name: str, x: str = "step") -> list[XY]:
    """(x, value) of a metric or field, by step; what a resumed run repeated counts once, the later one."""
    by_step = {}
    for point in points:
        value = point["metrics"].get(name, point.get(name))
        if point["split"] == split and finite(value) and finite(point.get(x)):
            by_step[point["step"]] = (point[x], value)
    return [by_step[step] for step in sorted(by_step)]


def metric_names(points: Iterable[Record], split: str) -> list[str]:
    """Names of the metrics of a split in the order of their first appearance, without baselines."""
    names = dict.fromkeys(n for p in points if p["split"] == split for n, v in p["metrics"].items() if finite(v))
    return [name for name in names if "@" not in name]


def last(points: Sequence[Record], split: str, name: str) -> float | None:
    found = series(points, split, name)
    return found[-1][1] if found else None


def last_step(points: Iterable[Record]) -> int:
    return max((p["step"] for p in points), default=0)


def levels(points: Sequence[Record], name: str) -> dict[str, float]:
    """The baselines of a metric: what random weights and the raw input reach."""
    found = {label: last(points, "eval", f"{name}@{kind}") for kind, label in BASELINES.items()}
    return {label: value for label, value in found.items() if value is not None}


# ---- numbers as text


def rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def number(value: float, digits: int = 4) -> str:
    """12345678 -> 12.35M; powers of ten beyond trillions and below thousandths."""
    value = rounded(value, digits)
    if value and not 1e-3 <= abs(value) < 1e15:
        return scientific(value, digits)
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.12g}{suffix}"
    return f"{value:.12g}"


def scientific(value: float, digits: int = 4) -> str:
    """1.2e15 -> 1.2×10¹⁵, 1e15 -> 10¹⁵."""
    if abs(value) < 1e4 and (value == 0 or abs(value) >= 1e-2):
        return number(value, digits)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if float(mantissa) == 1 else f"{float(mantissa):g}×{power}"


def percent(value: float, digits: int = 3) -> str:
    return f"{number(100 * value, digits)}%"


def whole(value: float, digits: int = 0) -> str:
    return f"{value:,.0f}"


def duration(seconds: float, digits: int = 3) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return f"{rounded(seconds, digits):g} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{hours:g} h"


# ---- markup


class Html(str):
    """Text that is markup already; `tag` escapes every other string."""


def markup(child: object) -> str:
    return child if isinstance(child, Html) else html.escape(str(child))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """<name attributes>children</name>: `class_` is class, `stroke_width` is stroke-width; None is left out."""
    pairs = ((key.strip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opening = name + "".join(f' {key}="{html.escape(str(value))}"' for key, value in pairs)
    closing = "" if name in ("img", "meta", "link") else f"</{name}>"
    return Html(f"<{opening}>{''.join(map(markup, children))}{closing}")


def join(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], caption: str) -> Html:
    """A table whose first column names the rows."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = (tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows)
    return tag("table", tag("caption", caption), tag("thead", head), tag("tbody", join(body)))


# ---- plots


class Axis(NamedTuple):
    """A scale from values low..high to the pixels start..end."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def pixel(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


class Quantity(NamedTuple):
    """What an axis measures: its name, and how ticks and tooltips write it."""

    label: str
    text: Callable[[float, int], str] = number
    log: bool = False


STEP = Quantity("step")
TOKENS = Quantity("tokens seen")
FLOPS = Quantity("model FLOPs", scientific, log=True)

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 400, 10, 212  # of the plotting area
MARKED = 30  # a line of at most so many points also shows where they are


def fit_axis(values: Sequence[float], log: bool, start: float, end: float, margin: float) -> Axis:
    """The axis that holds all values, with a margin (a fraction of the axis) on both sides."""
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=1e-9):
        low, high = (low / 2, high * 2) if log else (low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1))
    if log:
        pad = (high / low) ** margin
        return Axis(low / pad, high * pad, log, start, end)
    pad = (high - low) * margin
    return Axis(low - pad, high + pad, log, start, end)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in low..high."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    gap = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= most)
    return [round(i * gap / power) * power for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten in low..high; with multiples by 3, or 2 and 5, where there are few of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**e for e in exponents for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / most)]
    return linear_ticks(low, high, most)


def tick_labels(ticks: Sequence[float], text: Callable[[float, int], str]) -> list[str]:
    """The ticks with as few digits as tell each exactly."""
    digits = next((d for d in range(1, 9) if all(math.isclose(rounded(t, d), t, rel_tol=1e-9) for t in ticks)), 9)
    return [text(t, digits) for t in ticks]


def thin(points: list[XY], buckets: int = 250) -> list[XY]:
    """At most about 2 * buckets points that draw the same line: lowest and highest of each bucket."""
    size = math.ceil(len(points) / buckets)
    if size <= 2:
        return points
    chunks = (points[i:i + size] for i in range(0, len(points) - 1, size))
    extremes = (sorted({min(c, key=lambda p: p[1]), max(c, key=lambda p: p[1])}) for c in chunks)
    return [*(p for pair in extremes for p in pair), points[-1]]


def plot(title: str, x: Quantity, y: Quantity, lines: Mapping[str, list[XY]],
         baselines: Mapping[str, float]) -> Html:
    """A figure with one line per name over x, and a dashed line per baseline; empty if there are no points.

    A logarithmic x wants three points and a factor of ten between them; a logarithmic y wants positive values.
    """
    xs_all = [p[0] for line in lines.values() for p in line if p[0] > 0]
    log_x = x.log and len(set(xs_all)) >= 3 and max(xs_all) >= 10 * min(xs_all)
    drawn = {n: thin([p for p in line if p[0] > 0 or not log_x]) for n, line in lines.items()}
    drawn = {n: line for n, line in drawn.items() if line}
    if not drawn:
        return Html()
    xs = [p[0] for line in drawn.values() for p in line]
    ys = [p[1] for line in drawn.values() for p in line] + list(baselines.values())
    x_axis = fit_axis(xs, log_x, LEFT, RIGHT, 0.02)
    y_axis = fit_axis(ys, y.log and min(ys) > 0, BOTTOM, TOP, 0.06)
    pixels = {n: [(round(x_axis.pixel(a), 1), round(y_axis.pixel(b), 1)) for a, b in line]
              for n, line in drawn.items()}
    name = f"{title} against {x.label}"
    picture = tag(
        "svg", tag("title", name), tag("desc", description(drawn, baselines, x, y)),
        grid(x_axis, y_axis, x, y),
        *(tag("line", class_=f"baseline b{i}", x1=LEFT, x2=RIGHT, y1=f"{y_axis.pixel(v):.1f}",
              y2=f"{y_axis.pixel(v):.1f}") for i, v in enumerate(baselines.values())),
        *(curve(line, i) for i, line in enumerate(pixels.values())),
        tag("g", class_="cursor"), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", tabindex=0)
    tips = [{"name": n, "points": [[*at, x.text(a, 5), y.text(b, 5)] for at, (a, b) in zip(pixels[n], line,
                                                                                          strict=True)]}
            for n, line in drawn.items()]
    return tag("figure", tag("figcaption", tag("h3", name), legend(drawn, baselines, y)), picture, data(tips),
               class_="plot")


def description(lines: Mapping[str, list[XY]], baselines: Mapping[str, float], x: Quantity, y: Quantity) -> str:
    """The plot in words, for who cannot see it."""
    ends = [f"{n}: from {y.text(line[0][1], 4)} at {x.text(line[0][0], 4)} to {y.text(line[-1][1], 4)}"
            f" at {x.text(line[-1][0], 4)} ({x.label})" for n, line in lines.items()]
    return "; ".join(ends + [f"{n}: {y.text(v, 4)}" for n, v in baselines.items()])


def legend(lines: Mapping[str, list[XY]], baselines: Mapping[str, float], y: Quantity) -> Html:
    """Names with their last values."""
    def entry(kind: str, name: str, value: float) -> Html:
        swatch = tag("svg", tag("line", class_=kind, x1=0, x2=18, y1=5, y2=5), viewBox="0 0 18 10", class_="swatch",
                     aria_hidden="true")
        return tag("span", swatch, name, " ", tag("b", y.text(value, 4)))
    return tag("span", *(entry(f"line c{i}", n, line[-1][1]) for i, (n, line) in enumerate(lines.items())),
               *(entry(f"baseline b{i}", n, v) for i, (n, v) in enumerate(baselines.items())), class_="legend")


def curve(pixels: list[XY], color: int) -> Html:
    """A line, and dots where points are few."""
    path = tag("path", class_=f"line c{color}", d="M" + "L".join(f"{a:g} {b:g}" for a, b in pixels))
    dots = (tag("circle", class_=f"dot c{color}", cx=a, cy=b, r=2.6) for a, b in pixels)
    return join([path, *dots] if len(pixels) <= MARKED else [path])


def grid(x_axis: Axis, y_axis: Axis, x: Quantity, y: Quantity) -> Html:
    """Tick lines and labels of both axes, and the name of the x axis."""
    x_ticks, y_ticks = ((log_ticks if a.log else linear_ticks)(a.low, a.high) for a in (x_axis, y_axis))
    columns = [tag("text", label, x=f"{x_axis.pixel(t):.1f}", y=BOTTOM + 15, class_="x")
               for t, label in zip(x_ticks, tick_labels(x_ticks, x.text), strict=True)]
    rows = [tag("line", x1=LEFT, x2=RIGHT, y1=f"{y_axis.pixel(t):.1f}", y2=f"{y_axis.pixel(t):.1f}")
            + tag("text", label, x=LEFT - 7, y=f"{y_axis.pixel(t) + 3.8:.1f}", class_="y")
            for t, label in zip(y_ticks, tick_labels(y_ticks, y.text), strict=True)]
    scale = " (log)" if x_axis.log else ""
    name = tag("text", x.label + scale, x=(LEFT + RIGHT) / 2, y=HEIGHT - 5, class_="x name")
    return tag("g", *map(Html, rows), *columns, name, class_="grid")


def data(value: object) -> Html:
    """JSON for the page's script; no text in it can close the element."""
    return Html('<script type="application/json">' + json.dumps(value).replace("<", "\\u003c") + "</script>")


# ---- the page, from top to bottom


def page(runs: Sequence[Record], points: Sequence[Record], events: Sequence[Record], samples: Samples | None,
         written: datetime.datetime) -> str:
    run = runs[-1]
    title = f"{run.get('objective', 'run')} on {run.get('dataset', 'unnamed data')}"
    return document(title, [
        heading(title, runs, points, events, written), summary(run, points), sample_section(samples),
        section("Loss", loss_plots(points)),
        section("Evaluations", evaluation_plots(points)),
        section("Collapse monitors", monitor_plots(points)),
        section("Optimization and throughput", machine_plots(points)),
        section("Other training metrics", other_plots(points)),
        compute(run), time_spent(points), settings(run)], script=SCRIPT)


def document(title: str, parts: Iterable[Html], style: str = "", script: str = "") -> str:
    """A page that may request nothing, with `style` after that of all pages."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", http_equiv="Content-Security-Policy", content=policy),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("link", rel="icon", href="data:,"), tag("title", f"{title} · sslx"),
               tag("style", Html(STYLE + style)))
    body = tag("body", tag("main", join(parts)), tag("script", Html(script)) if script else "")
    return "<!doctype html>\n" + tag("html", head, "\n", body, lang="en") + "\n"


def section(title: str, figures: Iterable[Html]) -> Html:
    """Figures under a heading; nothing without figures."""
    figures = [f for f in figures if f]
    if not figures:
        return Html()
    return tag("section", tag("h2", title), tag("div", join(figures), class_="plots"))


def heading(title: str, runs: Sequence[Record], points: Sequence[Record], events: Sequence[Record],
            written: datetime.datetime) -> Html:
    """Title, state of the run, and what was run on what for how much."""
    run, step = runs[-1], last_step(points)
    ids = {"run": run.get("run_id"), "config": run.get("config_hash"), "git": run.get("git_sha"),
           "seed": run.get("seed")}
    line = tag("p", written.strftime("%-d %B %Y, %H:%M %Z"),
               *(tag("span", f"{k} ", tag("code", v)) for k, v in ids.items() if v is not None), class_="ids")
    cells = [tag("div", tag("dt", k), tag("dd", v, note and tag("small", note)))
             for k, v, note in facts(run, points, step)]
    remarks = [tag("li", r) for r in notes(runs, points, events, step)]
    return tag("header", tag("h1", title), line, remarks and tag("ul", *remarks, class_="notes") or "",
               tag("dl", *cells, class_="facts"))


def facts(run: Record, points: Sequence[Record], step: int) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what is known."""
    end = max(points, key=lambda p: p["step"], default={})
    medians = {k: statistics.median([v for _, v in series(points, "train", k)] or [math.nan])
               for k in ("tokens_per_s", "mfu", "hfu")}
    total, inner = run.get("n_params"), run.get("n_params_nonembedding")
    found: list[tuple[str, Any, Callable[[float, int], str], str]] = [
        ("parameters", total, number, f"{number(inner, 3)} without embeddings" if finite(inner) else ""),
        ("step", step, whole, f"of {whole(run['total_steps'])}" if finite(run.get("total_steps")) else ""),
        ("tokens seen", end.get("tokens_seen"), number,
         f"{number(end['epochs'], 3)} epochs" if finite(end.get("epochs")) else ""),
        ("model FLOPs", end.get("flops_model"), scientific,
         f"6 N D: {scientific(end['flops_6nd'], 3)}" if finite(end.get("flops_6nd")) else ""),
        ("tokens/s", medians["tokens_per_s"], number, "median"),
        ("MFU", medians["mfu"], percent, f"HFU {percent(medians['hfu'])}" if finite(medians["hfu"]) else "median"),
        ("energy per token", end.get("joules_per_token"), lambda joules, digits: f"{scientific(joules, digits)} J", ""),
        ("wall time", end.get("wall_s"), duration, ""),
        ("batch size", run.get("batch_size"), whole, ""),
    ]
    device = [("device", str(run["device"]), f"× {run.get('device_count', 1)}")] if run.get("device") else []
    return device + [(name, text(value, 3), note) for name, value, text, note in found if finite(value)]


def notes(runs: Sequence[Record], points: Sequence[Record], events: Sequence[Record], step: int) -> list[str]:
    """What a reader must know before believing a number."""
    total = runs[-1].get("total_steps")
    found = []
    if finite(total) and step < total:
        found.append(f"Not finished: the last record is of step {whole(step)} of {whole(total)}.")
    for before, run in itertools.pairwise(runs):
        changed = [k for k in run if k != "resumed_from" and run[k] != before.get(k)]
        where = f" at step {whole(run['resumed_from'])}" if finite(run.get("resumed_from")) else ""
        change = f" with another {', '.join(changed)}; the last is shown" if changed else ""
        found.append(f"Resumed{where}{change}.")
    skipped = [e for e in events if e["event"] == "skipped"]
    if skipped:
        found.append(f"Skipped {len(skipped)} bad steps, the last because {skipped[-1]['why']}.")
    for event in events:
        if event["event"] == "rolled back":
            start, end = event["passed_over"]
            found.append(f"Rolled back to step {whole(event['step'])}, since {event['why']};"
                         f" the batches of steps {whole(start)} to {whole(end)} are not used.")
        if event["event"] == "collapsed":
            found.append(f"Features were collapsed at step {whole(event['step'])}.")
    broken = [p["step"] for p in points if "loss" in p["metrics"] and not finite(p["metrics"]["loss"])]
    if broken:
        found.append(f"The loss was not finite in {len(broken)} records, first at step {whole(min(broken))}.")
    if not metric_names(points, "eval"):
        found.append("No evaluations yet.")
    return found


def summary(run: Record, points: Sequence[Record]) -> Html:
    """metric | random init | raw input | final."""
    def row(split: str, name: str, label: str) -> list[str]:
        marks = levels(points, name)
        values = [*(marks.get(b) for b in BASELINES.values()), last(points, split, name)]
        return [label, *("–" if v is None else number(v) for v in values)]
    rows = [row("train", "loss", "train/loss")] if last(points, "train", "loss") is not None else []
    rows += [row("eval", name, name) for name in metric_names(points, "eval")]
    if not rows:
        return Html()
    step = last_step(points)
    final = "final" if step == run.get("total_steps") else f"at step {whole(step)}"
    return tag("section", tag("h2", "Summary"),
               tag("div", table(["metric", *BASELINES.values(), final], rows, "Frozen features against baselines"),
                   class_="card summary"))


def sample_section(samples: Samples | None) -> Html:
    """Rows are captions, columns are examples; then texts."""
    if samples is None or not samples.files:
        return Html()
    widths = {f: width(f) for _, f in samples.files if f.suffix == ".png"}
    strips = [tag("figure", tag("figcaption", caption),
                  tag("img", src=data_url(f), alt=f"{caption}: examples in a row",
                      style=f"width:{100 * widths[f] / max(widths.values()):.4g}%"))
              for caption, f in samples.files if f in widths]
    texts = [tag("figure", tag("figcaption", caption),
                 tag("pre", f.read_text(encoding="utf-8", errors="replace"), dir="auto"))
             for caption, f in samples.files if f.suffix == ".txt"]
    grids = [tag("div", tag("div", *strips, class_="strips", style=f"--width:{max(widths.values())}px"),
                 class_="card scroll")] if strips else []
    return tag("section", tag("h2", f"Samples at step {whole(samples.step)}"), *grids,
               *(tag("div", t, class_="card text") for t in texts))


def width(picture: pathlib.Path) -> int:
    """Raises UserError if it is none."""
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            return image.width
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{picture} is no picture ({error}): remove it") from error


def data_url(path: pathlib.Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def loss_plots(points: Sequence[Record]) -> list[Html]:
    def lines(x: str) -> dict[str, list[XY]]:
        return {"train": series(points, "train", "loss", x), "held out": series(points, "eval", "heldout/loss", x)}
    axes = (("step", STEP), ("tokens_seen", TOKENS), ("flops_model", FLOPS))
    return [plot("loss", x, Quantity("loss", log=x.log), lines(field), {}) for field, x in axes]


def evaluation_plots(points: Sequence[Record]) -> list[Html]:
    names = [n for n in metric_names(points, "eval") if n not in ("heldout/loss", *MONITORS)]
    return [plot(n, FLOPS, Quantity(n), {"trained": series(points, "eval", n, "flops_model")}, levels(points, n))
            for n in names]


def monitor_plots(points: Sequence[Record]) -> list[Html]:
    """A collapsed encoder has a rank and a standard deviation near zero."""
    return [plot(n, STEP, Quantity(n), {"trained": series(points, "eval", n)}, levels(points, n)) for n in MONITORS]


def machine_plots(points: Sequence[Record]) -> list[Html]:
    shown = {"lr": Quantity("learning rate", scientific), "tokens_per_s": Quantity("tokens/s"),
             "mfu": Quantity("MFU", percent), "hfu": Quantity("HFU", percent),
             "joules_per_token": Quantity("joules per token", scientific)}
    return [plot(y.label, STEP, y, {"train": series(points, "train", field)}, {}) for field, y in shown.items()]


def other_plots(points: Sequence[Record]) -> list[Html]:
    names = [n for n in metric_names(points, "train") if n not in ("loss", "tokens", "lr", "tokens_per_s", "mfu")]
    return [plot(n, STEP, Quantity(n), {"train": series(points, "train", n)}, {}) for n in names]


def compute(run: Record) -> Html:
    """FLOPs of one example by component, largest first."""
    parts = {k: v for k, v in (run.get("flops_per_example") or {}).items() if k != "total"}
    return breakdown("FLOPs by component", ("component", "FLOPs per example"), parts, scientific,
                     "Counted from the jaxpr", str(run.get("flops_convention", "")))


def time_spent(points: Sequence[Record]) -> Html:
    """Wall time by what it was spent on, largest first."""
    spent = max(points, key=lambda p: p["step"], default={}).get("spent") or {}
    return breakdown("Where the time went", ("spent on", "wall time"), spent, duration, "Of all processes of the run",
                     "data: devices waited for a batch. save: what is not in the background. lost: done again after a"
                     " resume or a roll-back.")


def breakdown(title: str, columns: tuple[str, str], parts: Mapping[str, Any], text: Callable[[float, int], str],
              caption: str, note: str) -> Html:
    """A table of parts and their shares of the sum; nothing without parts."""
    parts = {k: v for k, v in parts.items() if finite(v) and v > 0}
    if not parts:
        return Html()
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    rows = [[name, text(value, 3), percent(value / total),
             tag("span", class_="bar", style=f"width:{100 * value / total:.2f}%")] for name, value in ordered]
    rows.append(["sum", text(total, 3), percent(1), ""])
    return tag("section", tag("h2", title),
               tag("div", table([*columns, "share", ""], rows, caption), tag("p", note, class_="note"),
                   class_="card flops"))


def settings(run: Record) -> Html:
    """The config by section, and versions, folded."""
    config = run.get("config") or {}
    flat = {k: v for k, v in config.items() if not isinstance(v, Mapping)}
    sections = ({"config": flat} if flat else {}) | {k: v for k, v in config.items() if isinstance(v, Mapping)}
    tables = [table(["key", "value"], leaves(values), name) for name, values in sections.items() if values]
    versions = run.get("versions") or {}
    folds = [("Config", tables), ("Versions", [table(["package", "version"], sorted(versions.items()), "versions")]
                                  if versions else [])]
    return join(tag("details", tag("summary", tag("h2", name)), tag("div", *content, class_="settings"))
                for name, content in folds if content)


def leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Html]]:
    """(dotted key, value) of a nested mapping."""
    found: list[tuple[str, Html]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", tag("code", json.dumps(value, ensure_ascii=False, default=str))))
    return found


STYLE = """
:root { color-scheme: light dark; --paper: #f7f7f5; --card: #fff; --ink: #1d2126; --soft: #646b75; --rule: #e3e3df;
  --c0: #2563a8; --c1: #c9541b; --b0: #8a6d1f; --b1: #7a5ca6; --warn: #fdf3dc; --warn-ink: #6b4b06; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e6e8ea; --soft: #99a1ac;
  --rule: #31363e; --c0: #6aaef2; --c1: #f2945c; --b0: #d9bd6a; --b1: #bda2ea; --warn: #352c16; --warn-ink: #f0d998; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem clamp(1rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.15rem; letter-spacing: -.01em; margin: 2.4rem 0 .8rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875em/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.ids { margin: 0; color: var(--soft); font-size: .9rem; display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; }
.ids code { color: var(--ink); overflow-wrap: anywhere; }
.notes { list-style: none; margin: 1.1rem 0 0; padding: .6rem .9rem; border-radius: 6px; background: var(--warn);
  color: var(--warn-ink); font-size: .92rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.8rem, 1fr)); gap: 1rem 1.2rem;
  margin: 1.4rem 0 0; padding: 1.1rem 0; border-block: 1px solid var(--rule); }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.facts small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.card, .plot { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.card { padding: .9rem 1.1rem; overflow-x: auto; }
.card + .card { margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--rule); text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-size: .85rem; }
tbody tr:last-child > * { border-bottom: 0; }
.summary table, .flops table { width: 100%; }
.summary :is(th, td):not(:first-child), .flops :is(th, td):is(:nth-child(2), :nth-child(3)) { text-align: right; }
.summary :is(th, td):last-child { padding-right: 0; }
.summary td:last-child { font-weight: 650; }
.flops :is(th, td):last-child { width: 45%; padding-right: 0; }
.flops tbody tr:last-child > * { font-weight: 650; }
.bar { display: block; height: .7rem; min-width: 2px; border-radius: 2px; background: var(--c0); }
.note { margin: .7rem 0 0; color: var(--soft); font-size: .88rem; }
.note:empty { display: none; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); gap: 1rem; }
.plot { position: relative; margin: 0; padding: .8rem .9rem .5rem; display: flex; flex-direction: column;
  justify-content: space-between; gap: .3rem; break-inside: avoid; }
.plot > svg { display: block; width: 100%; height: auto; outline-offset: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .82rem; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.swatch { width: 18px; height: 10px; margin-right: .35em; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.dot { stroke: var(--card); stroke-width: 1; }
.baseline { stroke-width: 1.4; stroke-dasharray: 5 3.5; }
.baseline.b1 { stroke-dasharray: 1.5 3; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); }
.b0 { stroke: var(--b0); } .b1 { stroke: var(--b1); }
.grid line { stroke: var(--rule); } .grid text { fill: var(--soft); font-size: 11.5px; }
.grid .x { text-anchor: middle; } .grid .y { text-anchor: end; }
.cursor line { stroke: var(--soft); stroke-width: .8; } .cursor circle { stroke: var(--card); stroke-width: 1.5; }
.tip { position: absolute; z-index: 1; pointer-events: none; padding: .3rem .55rem; border-radius: 5px;
  font-size: .8rem; line-height: 1.4; background: var(--ink); color: var(--paper); white-space: pre;
  font-variant-numeric: tabular-nums; }
.strips { display: grid; gap: .5rem; min-width: min(var(--width), 36rem); max-width: calc(var(--width) + 9rem); }
.strips figure { display: grid; grid-template-columns: 8rem 1fr; gap: 1rem; align-items: center; margin: 0; }
.strips img { display: block; image-rendering: pixelated; }
figcaption { overflow-wrap: anywhere; } .strips figcaption, .text figcaption { font-size: .9rem; color: var(--soft); }
.text figure { margin: 0; } pre { margin: .4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 82ch; }
details { margin-top: 1.6rem; border-top: 1px solid var(--rule); }
details h2 { display: inline-block; margin: .8rem 0 .4rem; } summary { cursor: pointer; }
.settings { columns: 20rem; column-gap: 2rem; }
.settings table { width: 100%; margin-bottom: 1.3rem; break-inside: avoid; font-size: .88rem; }
.settings caption { position: static; width: auto; height: auto; clip-path: none; text-align: left; font-weight: 600; }
.settings thead { display: none; } .settings :is(th, td) { padding-block: .2rem; vertical-align: top; }
.settings tbody th { color: var(--soft); }
.settings td { text-align: right; padding-right: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .strips figure { grid-template-columns: 1fr; gap: .2rem; }
  .facts { grid-template-columns: repeat(2, 1fr); } .summary :is(th, td), .flops :is(th, td) { padding-right: .6rem; }
  .flops :is(th, td):last-child { display: none; } }
@media print { :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc;
  --c0: #2563a8; --c1: #c9541b; --b0: #8a6d1f; --b1: #7a5ca6; --warn: #fff; --warn-ink: #000; }
  @page { margin: 14mm; } main { max-width: none; padding: 0; } body { font-size: 10pt; }
  .plots { grid-template-columns: repeat(3, 1fr); gap: .5rem; } .strips { min-width: 0; } h2 { break-after: avoid; }
  .bar { print-color-adjust: exact; } .notes { border: 1px solid var(--rule); } }
"""

SCRIPT = """
'use strict';
const svgNode = (name, attributes) => {
  const node = document.createElementNS(document.body.querySelector('svg').namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};
for (const figure of document.querySelectorAll('.plot')) {
  const svg = figure.querySelector(':scope > svg'), cursor = svg.querySelector('.cursor');
  const lines = JSON.parse(figure.querySelector('script').textContent);
  const tip = figure.appendChild(document.createElement('div'));
  tip.className = 'tip';
  tip.hidden = true;
  const columns = [...new Set(lines.flatMap(line => line.points.map(p => p[0])))].sort((a, b) => a - b);
  const nearest = (values, x) => values.reduce((best, v) => Math.abs(v - x) < Math.abs(best - x) ? v : best);
  let at = null;
  const hide = () => { at = null; tip.hidden = true; cursor.replaceChildren(); };
  const show = x => {
    at = nearest(columns, x);
    const hits = lines.map((line, i) => [line.name, i, line.points.find(p => Math.abs(p[0] - at) < 1)])
      .filter(hit => hit[2]);
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    cursor.replaceChildren(svgNode('line', {x1: at, x2: at, y1: TOP, y2: BOTTOM}),
      ...hits.map(([, i, p]) => svgNode('circle', {cx: p[0], cy: p[1], r: 4, class: 'dot c' + i})));
    const label = svg.querySelector('.name').textContent;
    tip.textContent = [label + ' ' + hits[0][2][2], ...hits.map(([name, , p]) => name + ' ' + p[3])].join('\\n');
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), left = box.left - frame.left + at * scale + 12;
    const beyond = left + tip.offsetWidth > figure.clientWidth;
    tip.style.left = (beyond ? left - 24 - tip.offsetWidth : left) + 'px';
    tip.style.top = (box.top - frame.top + TOP * scale) + 'px';
  };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    show((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
  });
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('blur', hide);
  svg.addEventListener('keydown', event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    const i = at === null ? (move > 0 ? -1 : columns.length) : columns.indexOf(at);
    show(columns[Math.max(0, Math.min(columns.length - 1, i + move))]);
  });
}
""".replace("TOP", str(TOP)).replace("BOTTOM", str(BOTTOM))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslx.report", description="Writes W/report.html.")
    parser.add_argument("workdir", help="the --workdir of a run: holds metrics.jsonl, and samples/ if any")
    try:
        print(write(parser.parse_args(arguments).workdir))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
