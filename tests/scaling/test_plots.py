"""Figures hold what they are about, with units, at the width of a column, readable without colours."""

import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from laws import law, points

from sslx.config import UserError
from sslx.scaling import fit, plots
from sslx.scaling.plots import Tried

LAW = law(drift=0.02)
POINTS = points(LAW, noise=0.002)
BEYOND = points(LAW._replace(c_max=1e21), budgets=1, sizes=2)
PREDICTED = LAW.predictions([(n, d) for n, d in zip(BEYOND.n, BEYOND.d, strict=True)])
RUNS = {name: (dict(n_params=n), [dict(split="train", step=s, flops_model=s * n, metrics=dict(loss=9 / s)) for s in
                                  (1, 10, 100)]) for name, n in (("small", 1e6), ("large", 4e6), ("again", 1e6))}
ACCURACY = {name: POINTS._replace(loss=0.9 - (POINTS.c / 1e20) ** -0.1 / more, metric="knn/accuracy")
            for name, more in (("mae", 8), ("dino", 6))}
RATES = 2.0 ** np.arange(-9, -4)
TRIED = {name: [Tried(w, r, 3 + abs(np.log2(r / best / w**slope))) for w in (64, 128, 256) for r in RATES]
         for name, best, slope in (("standard", 1, -1), ("muP", 2**-7, 0))}
FIGURES = {
    "isoflops": lambda: plots.isoflops(POINTS, LAW, "loss (nats)"),
    "isoflops without a law": lambda: plots.isoflops(POINTS),
    "allocation": lambda: plots.allocation(POINTS, LAW),
    "frontier": lambda: plots.frontier(POINTS, LAW, "loss (nats)", BEYOND),
    "residuals": lambda: plots.residuals(POINTS, LAW),
    "backtests": lambda: plots.backtests(LAW),
    "predictions": lambda: plots.predictions(PREDICTED, BEYOND),
    "objectives": lambda: plots.objectives(ACCURACY, baselines={"raw pixels": 0.5}),
    "transfer": lambda: plots.transfer(TRIED),
    "training": lambda: plots.training(RUNS),
}


@pytest.fixture(params=FIGURES)
def figure(request):
    return FIGURES[request.param]()


def test_axes_are_named_and_the_width_is_a_columns(figure):
    assert figure.get_size_inches()[0] in (plots.COLUMN, plots.PAGE)
    for ax in figure.axes:
        assert ax.get_xlabel() and (ax.get_ylabel() or ax.get_shared_y_axes().joined(ax, figure.axes[0])
                                    or len(ax.get_yticklabels()) == len(PREDICTED))


def test_the_svg_is_small_whole_and_the_same_each_time(figure):
    text = plots.svg(figure)
    assert text == plots.svg(figure) == figure._repr_svg_() and len(text) < 60_000
    root = ElementTree.fromstring(text)
    assert not [e for e in root.iter() if e.tag.endswith("image")]  # vectors
    assert all(v.startswith("#") for e in root.iter() for k, v in e.attrib.items() if k.endswith("href"))
    assert figure.axes[0].get_xlabel().split(" $")[0] in "".join(root.itertext())


def test_what_is_written_is_not_shortened():
    """Numbers of coordinates are; those of labels are what a reader takes for the truth."""
    figure = plots.objectives({name: p._replace(loss=0.6 + p.loss / 40) for name, p in ACCURACY.items()})
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    with mpl.rc_context(plots.STYLE):
        labels = {t.get_text() for t, y in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True) if low <= y <= high}
    assert any(len(text.partition(".")[2]) >= 3 for text in labels), labels
    assert labels <= {e.text for e in ElementTree.fromstring(plots.svg(figure)).iter()}


def test_every_run_is_drawn_where_it_is():
    ax = FIGURES["isoflops"]().axes[0]
    drawn = np.concatenate([line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 6])
    assert sorted(drawn.tolist()) == sorted(np.stack([POINTS.n, POINTS.loss], 1).tolist())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_the_lines_of_equal_compute_are_the_law():
    lines = [line.get_xydata().T for line in FIGURES["isoflops"]().axes[0].lines if line.get_linestyle() == "-"]
    for (n, loss), c in zip(lines, np.unique(POINTS.c.round(-6)), strict=True):
        np.testing.assert_allclose(LAW.loss(n, c / 6 / n), loss, rtol=1e-6)


def test_the_interval_holds_the_law_and_widens():
    ax = FIGURES["frontier"]().axes[0]
    [band] = [c.get_paths()[0].vertices for c in ax.collections]
    width = [np.ptp(band[np.isclose(band[:, 0], c), 1]) / LAW.loss(*LAW.optimum(c))[0]
             for c in (band[:, 0].min(), band[:, 0].max())]
    assert width[1] > 2 * width[0] > 0
    c, loss = np.concatenate([line.get_xydata() for line in ax.lines if line.get_linestyle() == "--"]).T
    assert c.max() >= 10 * LAW.c_max and LAW.loss(*LAW.optimum(c[-1]))[0] == pytest.approx(loss[-1])


def test_residuals_are_percent_of_the_law():
    ax = FIGURES["residuals"]().axes[1]
    drawn = np.concatenate([line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 6])
    expected = np.stack([POINTS.n, 100 * (POINTS.loss / LAW.loss(POINTS.n, POINTS.d) - 1)], 1)
    np.testing.assert_allclose(sorted(drawn.tolist()), sorted(expected.tolist()))


def test_backtests_are_a_line_for_each_fit():
    lines = [line.get_xydata().tolist() for line in FIGURES["backtests"]().axes[0].lines[1:]]
    assert lines == [[[4.0, 0.2], [16.0, -0.6]], [[4.0, 0.1]]]


def test_predictions_stand_beside_their_runs():
    texts = [t.get_text() for t in FIGURES["predictions"]().axes[0].texts]
    assert texts == [f"{BEYOND.loss[i] / PREDICTED[i]['loss'] - 1:+.1%}".replace("-", "−") for i in range(2)]
    with pytest.raises(UserError, match="no run was measured that is like the prediction"):
        plots.predictions([PREDICTED[0] | dict(n=1e6)], BEYOND)


def test_shades_are_told_apart_in_greys():
    for n in range(2, 10):
        grey = np.array([np.dot(s[:3], (0.2126, 0.7152, 0.0722)) for s in plots.shades(n)])
        assert (np.diff(grey) > 0.5 / n).all() and grey[-1] < 0.75  # on white paper


def test_losses_of_objectives_share_no_axis():
    losses = {name: p._replace(metric="heldout/loss") for name, p in ACCURACY.items()}
    with pytest.raises(UserError, match="never by their losses"):
        plots.objectives(losses)
    with pytest.raises(UserError, match="one metric"):
        plots.objectives(ACCURACY | dict(simclr=POINTS._replace(metric="probe/accuracy")))


def test_laws_of_metrics_shade_their_objective():
    laws = {name: fit.fit(p, "power") for name, p in ACCURACY.items()}
    ax = plots.objectives(ACCURACY, laws).axes[0]
    for band, (name, p) in zip(ax.collections[-2:], ACCURACY.items(), strict=True):
        at_end = band.get_paths()[0].vertices
        near = at_end[np.abs(at_end[:, 0] / p.c.max() - 1) < 0.1, 1]
        assert near.min() - 0.01 < p.loss.max() < near.max() + 0.01, name


def test_transfer_marks_the_best_rate_of_each_width():
    for ax, (name, runs) in zip(FIGURES["transfer"]().axes, TRIED.items(), strict=True):
        marked = sorted(line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1)
        best = [min((r.loss, r.learning_rate) for r in runs if r.width == w)[1] for w in (64, 128, 256)]
        assert marked == sorted(best) and ax.get_title() == name


@pytest.mark.parametrize("x, text", [(1e18, "$10^{18}$"), (3.2e18, r"$3.2\times 10^{18}$"),
                                     (640.0, r"$6.4\times 10^{2}$")])
def test_powers(x, text):
    assert plots.power(x) == text


def test_nothing_is_left_of_the_style():
    before = dict(mpl.rcParams)
    FIGURES["training"]()
    assert dict(mpl.rcParams) == before
