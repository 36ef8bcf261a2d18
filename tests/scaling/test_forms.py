"""Forms: their derivatives, and that units and named parameters are kept apart."""

import numpy as np
import pytest

from sslx.scaling.forms import FORMS, RISING, Inputs

ALL = FORMS | {"rising": RISING}


def inputs(points: int = 7) -> Inputs:
    draw = np.random.default_rng(0)
    n, d, c = (draw.normal(size=points) for _ in range(3))
    return Inputs(n, d, c, np.minimum(d, draw.normal(size=points)))


def thetas(form) -> np.ndarray:
    draw = np.random.default_rng(1)
    values = [{p: draw.uniform(0.3, 0.6) for p in form.parameters} for _ in range(3)]
    return np.array([form.internal(v | ({"M": 20.0} if "M" in v else {})) for v in values])


@pytest.mark.parametrize("name", ALL)
def test_derivatives(name):
    form, x, step = ALL[name], inputs(), 1e-6
    theta = thetas(form)
    _, derivative = form.on(x)(theta)
    for j, e in enumerate(np.eye(theta.shape[1]) * step):
        numerical = (form.log_loss(theta + e, x) - form.log_loss(theta - e, x)) / (2 * step)
        np.testing.assert_allclose(derivative[..., j], numerical, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_units_change_amplitudes_only(name):
    form, x = ALL[name], inputs()
    centre = Inputs(*map(np.array, (1.3, 0.7, 2.1, 0.7)))
    theta = thetas(form)
    moved = form.moved(theta, centre)
    np.testing.assert_allclose(form.log_loss(moved, x), form.log_loss(theta, x.within(centre)), rtol=1e-12)
    k = len(form.signs)
    np.testing.assert_array_equal(moved[:, k:], theta[:, k:])


@pytest.mark.parametrize("name", ALL)
def test_named(name):
    form = ALL[name]
    theta = thetas(form)[0]
    np.testing.assert_allclose(form.internal(form.named(theta)), theta)


def test_formulas():
    n, d, c, u = 3e8, 2e10, 5e19, 4e9
    x = Inputs(*(np.log([v]) for v in (n, d, c, u)))

    def loss(name, **values):
        form = ALL[name]
        return np.exp(form.log_loss(form.internal(values), x)[0])

    base = dict(E=1.7, A=400.0, B=900.0)
    assert loss("chinchilla", **base, a=0.34, b=0.28) == pytest.approx(1.7 + 400 / n**0.34 + 900 / d**0.28)
    assert loss("tied", **base, a=0.3) == pytest.approx(1.7 + 400 / n**0.3 + 900 / d**0.3)
    m = d / n
    assert loss("overtraining", **base, eta=0.15) == pytest.approx(1.7 + (400 * m**0.15 + 900 * m**-0.15) * c**-0.15)
    assert loss("power", E=1.7, A=40.0, a=0.1) == pytest.approx(1.7 + 40 / c**0.1)
    assert loss("rising", M=0.9, A=40.0, a=0.1) == pytest.approx(0.9 - 40 / c**0.1)
    assert loss("optimum", k=0.3, a=0.5) == pytest.approx(0.3 * c**0.5)
    d_worth = u * (1 + 15 * (1 - np.exp(-(d / u - 1) / 15)))
    fed = (0.34 * 400 * u**0.28 / (0.28 * 900)) ** (1 / 0.34)  # N for which u is the right amount of data
    assert fed < n
    n_worth = fed * (1 + 5 * (1 - np.exp(-(n / fed - 1) / 5)))
    assert loss("data-constrained", **base, a=0.34, b=0.28, R_D=15.0, R_N=5.0) == pytest.approx(
        1.7 + 400 / n_worth**0.34 + 900 / d_worth**0.28)
