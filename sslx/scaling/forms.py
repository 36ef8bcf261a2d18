"""Forms of scaling laws, as data: L = sum_k s_k exp(g_k), where g_k is the logarithm of a term.

Internal parameters theta are the logarithms of a form's parameters, exponents excepted. In most forms the terms are
linear in theta, so that a form is a table: which exponent multiplies which logarithm in which term.

K terms, P points, J parameters; leading dimensions of theta are a batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Terms = Callable[[Array], tuple[Array, Array]]


class Inputs(NamedTuple):
    """Natural logarithms, float[P], of parameters n, units seen d, FLOPs c, and units that are unique u."""

    n: Array
    d: Array
    c: Array
    u: Array

    def at(self, rows) -> "Inputs":
        return Inputs(*(x[rows] for x in self))

    def within(self, centre: "Inputs") -> "Inputs":
        """In units of `centre`."""
        return Inputs(*(x - x0 for x, x0 in zip(self, centre, strict=True)))


class Form(NamedTuple):
    """formula:    of the loss, with the paper.
    parameters: names: the amplitude of each term, then exponents, then what else there is.
    exponents:  {name: (low, high)} of the parameters that are exponents; others are positive.
    signs:      of the terms.
    slopes:     inputs -> float[K, P, len(exponents)], what an exponent multiplies in the logarithm of a term.
    terms:      inputs -> (theta[..., J] -> (g[..., K, P], dg/dtheta[..., K, P, J])).
    in_logs:    residuals are those of ln L, else of L.
    delta:      where the Huber function of residuals turns from squares to absolute values (Hoffmann et al. 2022).
    """

    formula: str
    parameters: tuple[str, ...]
    exponents: dict[str, tuple[float, float]]
    slopes: Callable[[Inputs], Array]
    terms: Callable[[Inputs], Terms]
    signs: tuple[float, ...] = (1.0, 1.0, 1.0)
    in_logs: bool = True
    delta: float = 1e-3

    def internal(self, values: dict[str, float]) -> Array:
        """theta of named values."""
        return np.array([values[p] if p in self.exponents else np.log(values[p]) for p in self.parameters])

    def named(self, theta: Array) -> dict[str, float]:
        """Named values of theta[J]."""
        return {p: float(x if p in self.exponents else np.exp(x)) for p, x in zip(self.parameters, theta, strict=True)}

    def on(self, x: Inputs) -> Callable[[Array], tuple[Array, Array]]:
        """theta[..., J] -> (ln L [..., P], its derivative [..., P, J]); -inf where a metric would be below zero."""
        terms, signs = self.terms(x), np.array(self.signs)[:, None]

        def log_loss(theta: Array) -> tuple[Array, Array]:
            g, dg = terms(theta)
            top = g.max(-2, keepdims=True)
            parts = signs * np.exp(g - top)
            total = parts.sum(-2, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                share = np.where(total > 0, parts / total, 0.0)
                value = np.where(total > 0, np.log(total), -np.inf) + top
            return value[..., 0, :], (share.swapaxes(-1, -2)[..., None, :] @ dg.swapaxes(-3, -2))[..., 0, :]

        return log_loss

    def log_loss(self, theta: Array, x: Inputs) -> Array:
        """ln L [..., P] of theta[..., J]."""
        return self.on(x)(theta)[0]

    def moved(self, theta: Array, centre: Inputs) -> Array:
        """theta for inputs in plain units, of one for inputs in units of `centre`: only amplitudes have units."""
        k = len(self.signs)
        at_centre = self.slopes(Inputs(*(np.atleast_1d(x) for x in centre)))[:, 0]
        moved = np.array(theta, float)
        moved[..., :k] -= theta[..., k:k + len(self.exponents)] @ at_centre.T
        return moved


def linear_terms(slopes: Callable[[Inputs], Array], x: Inputs) -> Terms:
    """g_k = ln amplitude_k + sum_e slopes_ke exponent_e."""
    table = slopes(x)
    k, p, e = table.shape
    flat = table.reshape(k * p, e).T
    derivative = np.concatenate([np.broadcast_to(np.eye(k)[:, None, :], (k, p, k)), table], -1)

    def terms(theta: Array) -> tuple[Array, Array]:
        return theta[..., :k, None] + (theta[..., k:] @ flat).reshape(*theta.shape[:-1], k, p), derivative

    return terms


def log_linear(*, formula: str, amplitudes: str, exponents: dict[str, tuple[float, float]],
               slopes: Callable[[Inputs], list[list[Any]]], **others: Any) -> Form:
    """A form whose terms are linear in theta: `slopes` of [term][exponent], float[P] or 0."""
    def table(x: Inputs) -> Array:
        return np.stack([np.stack([np.broadcast_to(s, x.n.shape) for s in row], -1) for row in slopes(x)])
    return Form(formula, (*amplitudes, *exponents), exponents, table, functools.partial(linear_terms, table), **others)


def data_constrained_terms(x: Inputs, theta: Array) -> tuple[Array, Array]:
    """Terms of Muennighoff et al. 2023: repeated data, and parameters beyond what the unique data feed, decay in worth.

    D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)),  N' likewise of U_N = min(N, N_opt(U)) with R_N.
    """
    ln_e, ln_a, ln_b, a, b, ln_rd, ln_rn = (theta[..., j, None] for j in range(7))
    optimal = (np.log(a) + ln_a - np.log(b) - ln_b + b * x.u) / a
    few = optimal < x.n  # parameters beyond those that the unique data would want
    fed = np.where(few, optimal, x.n)
    worth_d, by_rd, _ = saturated(x.u, x.d, ln_rd)
    worth_n, by_rn, by_fed = saturated(fed, x.n, ln_rn)
    zero = np.zeros_like(worth_n)
    by_fed = np.where(few, by_fed, 0.0)
    g = np.stack([ln_e + zero, ln_a - a * worth_n, ln_b - b * worth_d], -2)
    d_n = np.stack([zero, 1 - by_fed, by_fed, -worth_n - by_fed * (1 / a - optimal), -by_fed * (x.u - 1 / b),
                    zero, -a * by_rn], -1)
    d_d = np.stack([zero, zero, zero + 1, zero, -worth_d, -b * by_rd, zero], -1)
    d_e = np.stack([zero + 1, *[zero] * 6], -1)
    return g, np.stack([d_e, d_n, d_d], -3)


def saturated(unique: Array, total: Array, ln_r: Array) -> tuple[Array, Array, Array]:
    """(y, dy/d ln r, dy/d unique) of y = ln(U + U r (1 - exp(-(T/U - 1) / r))), U = exp(unique), T = exp(total)."""
    r, ratio = np.exp(ln_r), np.exp(np.clip(total - unique, 0.0, MOST))
    decayed = np.exp(-(ratio - 1) / r)
    worth = 1 - r * np.expm1(-(ratio - 1) / r)
    by_r = (worth - 1 - (ratio - 1) * decayed) / worth
    return unique + np.log(worth), by_r, 1 - ratio * decayed / worth


EXPONENT = (0.005, 2.5)
MOST = 50.0  # of the logarithm of a ratio, so that it is finite
FORMS = {
    "chinchilla": log_linear(
        formula="L = E + A/N^a + B/D^b (Hoffmann et al. 2022)", amplitudes="EAB",
        exponents=dict(a=EXPONENT, b=EXPONENT), slopes=lambda x: [[0, 0], [-x.n, 0], [0, -x.d]]),
    "tied": log_linear(
        formula="L = E + A/N^a + B/D^a", amplitudes="EAB",
        exponents=dict(a=EXPONENT), slopes=lambda x: [[0], [-x.n], [-x.d]]),
    "overtraining": log_linear(
        formula="L = E + (A M^eta + B M^-eta) C^-eta, M = D/N, least squares on L (Gadre et al. 2024)",
        amplitudes="EAB", exponents=dict(eta=EXPONENT),
        slopes=lambda x: [[0], [x.d - x.n - x.c], [x.n - x.d - x.c]], in_logs=False, delta=np.inf),
    "power": log_linear(
        formula="L = E + A/C^a", amplitudes="EA", exponents=dict(a=EXPONENT), slopes=lambda x: [[0], [-x.c]],
        signs=(1.0, 1.0)),
    "optimum": log_linear(
        formula="N_opt = k C^a, least squares on ln N", amplitudes="k", exponents=dict(a=EXPONENT),
        slopes=lambda x: [[x.c]], signs=(1.0,), delta=np.inf),
}
FORMS["data-constrained"] = FORMS["chinchilla"]._replace(
    formula="L = E + A/N'^a + B/D'^b with N', D' that saturate by R_N, R_D repetitions (Muennighoff et al. 2023)",
    parameters=(*"EABab", "R_D", "R_N"), terms=lambda x: functools.partial(data_constrained_terms, x))
RISING = log_linear(
    formula="metric = M - A/C^a", amplitudes="MA", exponents=dict(a=EXPONENT), slopes=lambda x: [[0], [-x.c]],
    signs=(1.0, -1.0))
