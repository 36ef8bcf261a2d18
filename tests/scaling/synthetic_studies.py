"""Synthetic scaling studies whose truth is known: isoFLOP grids of a random law with noise, some misspecified."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sslx.scaling.points import Points

KINDS = ("law", "kink", "drift")
NOISE = 0.003  # of the loss


class Study(NamedTuple):
    """points; params, the true ones; loss, without noise, of (n, d); best, (n, d) of c FLOPs."""

    points: Points
    params: dict[str, float]
    loss: Callable
    best: Callable


def study(seed: int, kind: str = "law", noise: float = NOISE, budgets: int = 5, sizes: int = 6) -> Study:
    """Budgets from 1e17 FLOPs, sqrt(10) apart, and sizes from 1/4 to 4 times the best.

    "kink":  beyond one of the inner budgets the exponent of the excess loss is 18 to 47 % larger or smaller.
    "drift": large models are ever less well tuned, by .5 to 3 % of the loss for each factor e in size.
    """
    draw = np.random.default_rng([seed, KINDS.index(kind)])
    uniform = draw.uniform
    p = dict(E=uniform(1.5, 2.2), A=uniform(300, 500), B=uniform(400, 2000), a=uniform(0.28, 0.4), b=uniform(0.28, 0.4))
    c = 1e17 * 10 ** (np.arange(budgets) / 2)
    turn, change = np.exp(uniform(*np.log(c[[1, -2]]))), draw.choice([-1, 1]) * uniform(0.03, 0.08)
    untuned = uniform(0.005, 0.03)

    def best(flops):
        n = (p["a"] * p["A"] / p["b"] / p["B"] * (flops / 6) ** p["b"]) ** (1 / (p["a"] + p["b"]))
        return n, flops / 6 / n

    def loss(n, d):
        excess = p["A"] * n ** -p["a"] + p["B"] * d ** -p["b"]
        if kind == "kink":
            excess = excess * (1 + (6 * n * d / turn) ** 2) ** (change / 2)
        return (p["E"] + excess) * (1 + (kind == "drift") * untuned * np.log1p(n / best(c[2])[0]))

    n = (best(c)[0][:, None] * np.geomspace(1 / 4, 4, sizes)).ravel()
    flops = np.repeat(c, sizes)
    d = flops / 6 / n
    measured = loss(n, d) * np.exp(noise * draw.normal(size=len(n)))
    points = Points(n, d, flops, d, measured, np.ones(len(n)), np.arange(len(n)), "loss")
    return Study(points, p, loss, best)
