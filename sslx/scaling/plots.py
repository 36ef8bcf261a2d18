"""Figures of scaling laws, for papers and pages: 3.3 or 6.6 inches wide, vectors, told apart by shade and mark.

Each function draws one figure from points and laws and returns it; nothing is computed that they do not hold.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from sslx.config import UserError
from sslx.log import Record
from sslx.report import number, series
from sslx.scaling.approaches import envelope, parabolas
from sslx.scaling.forms import Array
from sslx.scaling.law import CONFIDENCE, Law
from sslx.scaling.points import Points

COLUMN, PAGE = 3.3, 6.6  # inches
HEIGHT = 2.5
MARKS = "osD^vP*X<>"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)), (0, (6, 1, 1, 1, 1, 1)))
DARK, SOFT = "#1a1a1a", "#8a8a8a"
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5, "axes.titlesize": 7.5,
    "axes.labelsize": 7.5, "axes.facecolor": "none", "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": 6.5, "legend.title_fontsize": 6.5, "legend.frameon": False,
    "legend.handlelength": 1.8, "legend.borderaxespad": 0.2, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "svg.fonttype": "none", "svg.hashsalt": "sslx",
    "pdf.fonttype": 42, "savefig.facecolor": "none",
}


class Plot(Figure):
    """A figure that a notebook shows as SVG, the same bytes each time."""

    def _repr_svg_(self) -> str:
        return svg(self)


def svg(figure: Figure) -> str:
    """The <svg> element of a figure, in few bytes. Text stays text, in a font as wide where the first is missing."""
    out = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue().partition("<!DOCTYPE")[2].partition(">")[2].strip()
    text = re.sub(r"<!--.*?-->|(?<=>)\s+(?=<)", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: shorter(tag[0]), text)
    return text.replace("<svg ", "<svg style=\"font-family: 'DejaVu Sans', Verdana, sans-serif\" ", 1)


def shorter(tag: str) -> str:
    """A tag with hundredths of a point, and without its font and a name that nothing refers to."""
    for pattern, short in ((r"(\.\d\d)\d+", r"\1"), (r"; font-family: [^;\"]*", ""), (r' id="\w*[a-z._]+_\d+"', "")):
        tag = re.sub(pattern, short, tag)
    return tag


def styled(draw: Callable[..., Plot]) -> Callable[..., Plot]:
    """A function whose figure has the style of all."""
    @functools.wraps(draw)
    def within(*args: Any, **options: Any) -> Plot:
        with mpl.rc_context(STYLE):
            figure = draw(*args, **options)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # which would move things a little each time they are drawn
            return figure
    return within


def canvas(width: float = COLUMN, panels: int = 1, height: float = HEIGHT, **options: Any) -> tuple[Plot, list[Axes]]:
    figure = Plot(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def shades(n: int) -> list[Any]:
    """n colours from dark to light, which greys keep apart."""
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.0, 0.78, n)]


def log_x(ax: Axes, label: str) -> None:
    """Powers of ten; where they are few, what lies between them has labels as well."""
    ax.set_xscale("log")
    log_axis(ax.xaxis, *ax.get_xlim())
    ax.set_xlabel(label)


def log_y(ax: Axes, label: str) -> None:
    ax.set_yscale("log")
    log_axis(ax.yaxis, *ax.get_ylim())
    ax.set_ylabel(label)


def log_axis(axis: Any, low: float, high: float) -> None:
    if high / low > 30:
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_formatter(NullFormatter())
        if high / low > 300:
            axis.set_minor_locator(NullLocator())
        return
    most = 6 if 1e-2 < low < high < 1e4 else 3  # labels that fit: those with powers are long
    if high / low > most:
        ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
                 for m in (1, 2, 5)]
    else:
        gap = next(g * 10.0**e for e in range(-6, 20) for g in (1, 2, 5) if (high - low) / (g * 10.0**e) <= most)
        ticks = list(np.arange(math.ceil(low / gap), math.floor(high / gap) + 1) * gap)
    axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axis.set_major_formatter(FuncFormatter(lambda t, _: power(t) if not 1e-2 < t < 1e4 else f"{t:g}"))
    axis.set_minor_locator(NullLocator())


def power(x: float) -> str:
    """2e18 as TeX; a power of ten without its factor."""
    mantissa, exponent = f"{x:.3g}".split("e") if "e" in f"{x:.3g}" else f"{x:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else rf"{float(mantissa):g}\times "
    return rf"${factor}10^{{{int(exponent)}}}$"


def of_budgets(points: Points) -> list[tuple[float, Array]]:
    """[(C, rows)] of each budget."""
    rows = [np.flatnonzero(points.budget == k) for k in range(points.budget.max() + 1)]
    return [(float(np.exp(np.log(points.c[r]).mean())), r[np.argsort(points.n[r])]) for r in rows]


def parts(c: Array, c_max: float) -> tuple[Array, Array]:
    """Where a line is within the fit, and beyond it, with one point in both."""
    last = int((c <= c_max * 1.001).sum())
    return np.arange(len(c)) < last, np.arange(len(c)) >= last - 1


# ---- one law


@styled
def isoflops(points: Points, law: Law | None = None, label: str = "") -> Plot:
    """Loss against size at each budget: runs, the law, and the minima of parabolas through the runs (Approach 2)."""
    figure, (ax,) = canvas(COLUMN, height=2.9)
    budgets = of_budgets(points)
    for (c, rows), shade, mark in zip(budgets, shades(len(budgets)), cycled(MARKS, len(budgets)), strict=True):
        ax.plot(points.n[rows], points.loss[rows], mark, color=shade, markeredgewidth=0, label=power(c))
        if law is not None:
            n = np.geomspace(points.n[rows].min() / 1.3, points.n[rows].max() * 1.3, 40)
            ax.plot(n, law.loss(n, c / law.flops.of(n, 1.0)), "-", color=shade, linewidth=0.9)
    minima = parabolas(points)
    ax.plot(np.exp(minima.ln_n), minima.loss, "o", markerfacecolor="none", markeredgecolor=DARK, markersize=6.5,
            markeredgewidth=0.8, label="parabola's\nminimum")
    log_x(ax, "parameters $N$")
    log_y(ax, label or points.metric)
    ax.legend(title="FLOPs $C$", loc="upper left", bbox_to_anchor=(1.0, 1.0), labelspacing=0.35)
    return figure


@styled
def allocation(points: Points, law: Law) -> Plot:
    """The best size and the best amount of data against compute: law, parabolas, envelope."""
    figure, axes = canvas(PAGE, 2)
    one, two = envelope(points), parabolas(points)
    c = np.geomspace(points.c.min(), points.c.max() * 10, 40)
    best = np.array([law.optimum(float(x)) for x in c])
    exponents = law.report["exponents"]
    for ax, i, letter, e in zip(axes, (0, 1), "ND", "ab", strict=True):
        low, high = exponents.get("intervals", {}).get(e, (math.nan, math.nan))
        span = f" [{low:.2f}, {high:.2f}]" if low < high else ""
        inside, beyond = parts(c, points.c.max())
        ax.plot(c[inside], best[inside, i], "-", color=DARK,
                label=rf"law: ${letter} \propto C^{{{exponents[e]:.2f}}}$" + span)
        ax.plot(c[beyond], best[beyond, i], ":", color=DARK)
        for found, mark, name in ((two, "o", "parabolas"), (one, "x", "least loss of a budget")):
            ax.plot(np.exp(found.ln_c), np.exp(found.ln_n if letter == "N" else found.ln_d), mark, color=SOFT,
                    markerfacecolor="none", label=name)
        log_x(ax, "FLOPs $C$")
        log_y(ax, "best size $N$ (parameters)" if letter == "N" else "best amount of data $D$ (units)")
        ax.legend(loc="upper left")
    return figure


@styled
def frontier(points: Points, law: Law, label: str = "", measured: Points | None = None) -> Plot:
    """Loss against compute: all runs, the law at the best size with its interval, and runs beyond the fit."""
    figure, (ax,) = canvas(COLUMN)
    last = max(10 * law.c_max, *(measured.c * 1.5 if measured is not None else [0.0]))
    c = np.geomspace(points.c.min(), last, 60)
    sized = {"A", "B"} <= law.params.keys()
    # A best size below all that were run would show the law where it knows nothing.
    n = np.array([max(law.optimum(float(x))[0], points.n.min()) for x in c]) if sized else np.ones(len(c))
    d = c / law.flops.of(n, 1.0)
    low, high = law.interval(n, d)
    inside, beyond = parts(c, law.c_max)
    ax.fill_between(c, low, high, color="#c8c8c8", linewidth=0, label=f"{CONFIDENCE:.0%} interval")
    ax.plot(points.c, points.loss, "o", color=SOFT, markersize=2.2, markeredgewidth=0, label="runs")
    ax.plot(c[inside], law.loss(n, d)[inside], "-", color=DARK, label="law at the best size" if sized else "law")
    ax.plot(c[beyond], law.loss(n, d)[beyond], "--", color=DARK, label="extrapolated")
    if measured is not None:
        ax.plot(measured.c, measured.loss, "D", color="#c8442b", markeredgecolor="white", markeredgewidth=0.4,
                markersize=4.5, label="not in the fit")
    log_x(ax, "FLOPs $C$")
    log_y(ax, label or points.metric)
    ax.legend(loc="upper right")
    return figure


@styled
def residuals(points: Points, law: Law) -> Plot:
    """Measured over expected loss, against compute, size and data: what a law misses shows as a trend."""
    figure, axes = canvas(PAGE, 3, height=2.0, sharey=True)
    off = 100 * (points.loss / law.loss(points.n, points.d, points.unique) - 1)
    budgets = of_budgets(points)
    for ax, values, label in zip(axes, (points.c, points.n, points.d),
                                 ("FLOPs $C$", "parameters $N$", "data $D$ (units)"), strict=True):
        ax.axhline(0, color=DARK, linewidth=0.6)
        for (_, rows), shade, mark in zip(budgets, shades(len(budgets)), cycled(MARKS, len(budgets)), strict=True):
            ax.plot(values[rows], off[rows], mark, color=shade, markersize=3, markeredgewidth=0)
        log_x(ax, label)
    axes[0].set_ylabel("measured / law − 1 (%)")
    return figure


@styled
def backtests(law: Law) -> Plot:
    """How far earlier fits were off, against how far they had to reach: one line for each budget they ended at."""
    figure, (ax,) = canvas(COLUMN)
    folds = law.report["backtest"]["folds"]
    ends = [0, *(i for i in range(1, len(folds)) if folds[i]["extrapolation"] < folds[i - 1]["extrapolation"]),
            len(folds)]
    groups = [folds[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    ax.axhline(0, color=DARK, linewidth=0.6)
    for i, (group, shade, mark) in enumerate(zip(groups, shades(len(groups)), cycled(MARKS, len(groups)), strict=True)):
        at = [f["extrapolation"] for f in group]
        ax.plot(at, [100 * f["relative"] for f in group], marker=mark, color=shade, label=f"{i + 1}")
    log_x(ax, "compute beyond the fit (factor)")
    ax.set_ylabel("predicted / measured − 1 (%)")
    if len(groups) > 1:
        ax.legend(title="fit, the\nearliest first", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@styled
def predictions(predicted: Sequence[Mapping[str, float]], measured: Points, label: str = "") -> Plot:
    """Predicted intervals beside what was measured, one row for each run."""
    rows = matched(predicted, measured)
    figure, (ax,) = canvas(COLUMN, height=0.75 + 0.33 * len(rows))
    for y, (p, i) in enumerate(rows):
        ax.plot([p["lo"], p["hi"]], [y, y], "-", color="#b0b0b0", linewidth=5, solid_capstyle="butt",
                label=f"predicted, {CONFIDENCE:.0%}" if y == 0 else None)
        ax.plot(p["loss"], y, "|", color=DARK, markersize=9, markeredgewidth=1.4)
        ax.plot(measured.loss[i], y, "D", color="#c8442b", markeredgewidth=0, markersize=4,
                label="measured" if y == 0 else None)
        off = f"{measured.loss[i] / p['loss'] - 1:+.1%}".replace("-", "−")
        ax.annotate(off, (1.01, y), xycoords=("axes fraction", "data"),
                    va="center", fontsize=6.5)
    ax.set_yticks(range(len(rows)), [f"$N$ {power(p['n'])}\n$D$ {power(p['d'])}" for p, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.15)
    ax.set_xlabel(label or measured.metric)
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    return figure


def matched(predicted: Iterable[Mapping[str, float]], measured: Points) -> list[tuple[Mapping[str, float], int]]:
    """[(prediction, row of its run)]: the nearest in size and data. Raises UserError where none is within 10 %."""
    found = []
    for p in predicted:
        away = np.hypot(np.log(measured.n / p["n"]), np.log(measured.d / p["d"]))
        if away.min() > 0.1:
            raise UserError(f"no run was measured that is like the prediction of N {p['n']:.4g}, D {p['d']:.4g}: the"
                            f" nearest has N {measured.n[away.argmin()]:.4g}, D {measured.d[away.argmin()]:.4g}")
        found.append((p, int(away.argmin())))
    return found


# ---- several objectives, several widths, single runs


@styled
def objectives(points: Mapping[str, Points], laws: Mapping[str, Law] | None = None, label: str = "",
               baselines: Mapping[str, float] | None = None) -> Plot:
    """A metric against FLOPs for several objectives; runs of about the same compute are one mark, their mean.

    Raises UserError for losses, of which each objective has its own, and for different metrics.
    """
    metrics = {p.metric for p in points.values()}
    if len(metrics) != 1 or "loss" in (metric := metrics.pop()):
        raise UserError("objectives are compared by one metric, such as knn/accuracy, and never by their losses, which"
                        " measure different things")
    figure, (ax,) = canvas(COLUMN)
    for (name, p), shade, mark, dash in zip(points.items(), shades(len(points)), cycled(MARKS, len(points)),
                                            cycled(DASHES, len(points)), strict=True):
        groups = [(c, p.loss[rows]) for c, rows in of_budgets(p)]
        c, mean = np.array([(c, y.mean()) for c, y in groups]).T
        spread = np.abs([(y.mean() - y.min(), y.max() - y.mean()) for _, y in groups]).T
        ax.errorbar(c, mean, spread if (spread > 1e-9).any() else None, fmt=mark, linestyle=dash, color=shade,
                    elinewidth=0.7, capsize=1.5, label=name.replace("_", " "))
        if laws and name in laws:
            at = np.geomspace(c.min(), 10 * c.max(), 50)
            low, high = laws[name].interval(1.0, at / laws[name].flops.of(1.0, 1.0))
            ax.fill_between(at, low, high, color=shade, alpha=0.2, linewidth=0)
    for (name, value), dash in zip((baselines or {}).items(), cycled(DASHES[2:], len(baselines or {})), strict=True):
        ax.axhline(value, color=SOFT, linestyle=dash, linewidth=0.9, label=name)
    log_x(ax, "model FLOPs")
    ax.set_ylabel(label or metric)
    ax.legend(loc="best")
    return figure


class Tried(NamedTuple):
    """A run of a search for the learning rate."""

    width: int
    learning_rate: float
    loss: float


@styled
def transfer(tried: Mapping[str, Sequence[Tried]], label: str = "loss") -> Plot:
    """Loss against learning rate, a curve for each width; a panel for each parametrization, which names it."""
    figure, axes = canvas(COLUMN if len(tried) == 1 else PAGE, len(tried), sharey=True)
    widths = sorted({t.width for runs in tried.values() for t in runs})
    for ax, (name, runs) in zip(axes, tried.items(), strict=True):
        for width, shade, mark in zip(widths, shades(len(widths)), cycled(MARKS, len(widths)), strict=True):
            line = sorted((t.learning_rate, t.loss) for t in runs if t.width == width and math.isfinite(t.loss))
            if not line:
                continue
            rate, loss = np.array(line).T
            ax.plot(rate, loss, marker=mark, color=shade, label=str(width))
            ax.plot(rate[loss.argmin()], loss.min(), "o", markersize=8, markerfacecolor="none", color=DARK,
                    markeredgewidth=0.8)
        log_x(ax, "learning rate")
        ax.set_title(name)
    axes[0].set_ylabel(label)
    axes[-1].legend(title="width", loc="best")
    return figure


@styled
def training(logs: Mapping[str, tuple[Record, Sequence[Record]]], metric: str = "loss", split: str = "train",
             label: str = "training loss") -> Plot:
    """A metric of runs of one objective, {name: (run, points)}, on their way; the smallest network is darkest."""
    lines = {name: (run["n_params"], series(points, split, metric, "flops_model"))
             for name, (run, points) in logs.items()}
    ordered = sorted((n, name, line) for name, (n, line) in lines.items() if line)
    sizes = sorted({n for n, _, _ in ordered})
    of_size = dict(zip(sizes, zip(shades(len(sizes)), cycled(DASHES, len(sizes)), strict=True), strict=True))
    figure, (ax,) = canvas()
    for n, _, line in ordered:
        shade, dash = of_size[n]
        x, y = np.array(line).T
        ax.plot(x, y, color=shade, linestyle=dash, linewidth=0.9)
        ax.plot(x[-1], y[-1], "o", color=shade, markersize=2.5)
    for n in sizes:
        ax.plot([], [], color=of_size[n][0], linestyle=of_size[n][1], label=number(n, 3))
    log_x(ax, "model FLOPs")
    log_y(ax, label)
    ax.legend(title="parameters", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def cycled(items: Sequence[Any], n: int) -> list[Any]:
    return [items[i % len(items)] for i in range(n)]
