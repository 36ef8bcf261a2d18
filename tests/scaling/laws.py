"""Laws and points that are known exactly."""

import numpy as np

from sslx.scaling.forms import FORMS, Inputs
from sslx.scaling.law import Flops, Law, Member
from sslx.scaling.points import Points

CHINCHILLA = dict(E=1.8172, A=482.01, B=2085.43, a=0.3478, b=0.3659)  # Besiroglu et al. 2024
FOLDS = [dict(extrapolation=4.0, error=0.01, noise=0.01, relative=0.002),
         dict(extrapolation=16.0, error=-0.03, noise=0.01, relative=-0.006),
         dict(extrapolation=4.0, error=0.01, noise=0.01, relative=0.001)]


def law(form: str = "chinchilla", c_max: float = 1e20, k: float = 6.0, drift: float = 0.0, **more: float) -> Law:
    """A law with known parameters, C = k N D, and an interval of about 1 % of A/N^a + B/D^b."""
    params = CHINCHILLA | more
    theta = FORMS[form].internal(params)
    thetas = np.tile(theta, (41, 1))
    thetas[:, 1:3] += np.linspace(-0.01, 0.01, 41)[:, None]
    report = dict(warnings=["what the fit warned of"],
                  intervals={name: [v * 0.9, v * 1.1] for name, v in params.items()},
                  exponents=dict(a=0.513, b=0.487, intervals=dict(a=[0.5, 0.52], b=[0.48, 0.5])),
                  backtest=dict(folds=FOLDS, failed=False), objective=1e-4, n_points=24, starts={})
    return Law(form, params, (Member(form, 1.0, Inputs(*np.zeros(4)), thetas),), drift, 0.0, 0.0, 0.0, c_max,
               Flops(np.log([1e7, 1e10]), np.log([k, k])), None, report)


def points(of: Law, budgets: int = 4, sizes: int = 6, noise: float = 0.0) -> Points:
    """An isoFLOP grid up to the law's largest budget."""
    draw = np.random.default_rng(0)
    c = np.repeat(of.c_max / 4.0 ** np.arange(budgets)[::-1], sizes)
    n = np.concatenate([of.optimum(x)[0] * np.geomspace(0.3, 3, sizes) for x in c[::sizes]])
    d = c / of.flops.of(n, 1.0)
    loss = of.loss(n, d) * np.exp(noise * draw.normal(size=len(n)))
    return Points(n, d, c, d, loss, np.ones(len(n)), np.arange(len(n)), "heldout/loss")
