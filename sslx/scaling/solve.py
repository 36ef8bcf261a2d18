"""Fits a form to points: a grid over exponents with least squares inside, then Newton steps on the Huber objective.

Everything is batched: starts, resamples and back-tests are rows of one array.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from sslx.scaling.forms import Array, Form, Inputs

GRID = 12     # exponents tried on each axis
R_GRID = np.log([0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
RANGE_R = np.log([1e-2, 1e4])
TINY_E = 1e-6  # of the smallest loss: what an amplitude is at least


class Box(NamedTuple):
    """Bounds of theta, float[J] each; equal ones hold a parameter fast."""

    low: Array
    high: Array


def box(form: Form, loss: Array, fixed: dict[str, float]) -> Box:
    """Bounds of theta for inputs in units of their centre, where every term is of the order of the loss."""
    low, high = np.empty(len(form.parameters)), np.empty(len(form.parameters))
    for j, name in enumerate(form.parameters):
        if name in fixed:
            low[j] = high[j] = form.internal(fixed | {p: 1.0 for p in form.parameters if p not in fixed})[j]
        elif name in form.exponents:
            low[j], high[j] = form.exponents[name]
        elif j < len(form.signs):
            low[j], high[j] = np.log(TINY_E * loss.min()), np.log(1e3 * loss.max())
        else:
            low[j], high[j] = RANGE_R
    return Box(low, high)


def starts(form: Form, x: Inputs, loss: Array, weights: Array, bounds: Box, n: int) -> Array:
    """theta[n, J]: the n best of a grid over exponents, amplitudes by non-negative least squares on L / loss."""
    k, names = len(form.signs), list(form.exponents)
    axes = [np.unique(np.clip(np.geomspace(0.04, 1.6, GRID), bounds.low[k + i], bounds.high[k + i]))
            for i in range(len(names))]
    root = np.sqrt(weights)
    table = form.slopes(x)
    found = []
    for exponents in itertools.product(*axes):
        columns = np.array(form.signs)[:, None] * np.exp(table @ np.array(exponents)) / loss
        amplitudes, residual = nnls((columns * root).T, root)
        found.append((residual, [*np.log(np.maximum(amplitudes, 1e-300)), *exponents]))
    found.sort(key=lambda f: f[0])
    thetas = np.array([theta for _, theta in found[:n]])
    rest = len(form.parameters) - thetas.shape[1]
    if rest:
        grid = np.array(list(itertools.product(R_GRID, repeat=rest)))
        thetas = np.array([[*theta, *r] for theta in thetas[:max(1, n // len(grid))] for r in grid])
    return np.clip(thetas, np.maximum(bounds.low, np.log(1e-3 * loss.min()) if k else 0), bounds.high)


def residuals(form: Form, x: Inputs, loss: Array) -> Callable[[Array], tuple[Array, Array]]:
    """theta[..., J] -> (residual[..., P], its derivative[..., P, J])."""
    log_loss, target = form.on(x), np.log(loss)

    def of(theta: Array) -> tuple[Array, Array]:
        value, derivative = log_loss(theta)
        if form.in_logs:
            return value - target, derivative
        return np.exp(value) - loss, np.exp(value)[..., None] * derivative

    return of


def huber(residual: Array, delta: float) -> Array:
    """Half the square near 0, delta (|r| - delta/2) beyond delta."""
    size = np.abs(residual)
    inner = np.minimum(size, delta)
    with np.errstate(invalid="ignore"):  # infinity, where a saturating metric would be below zero
        return inner * (size - 0.5 * inner)


def minimize(form: Form, x: Inputs, loss: Array, weights: Array, theta: Array, bounds: Box, steps: int = 300,
             tolerance: float = 1e-13) -> tuple[Array, Array]:
    """(theta[B, J], objective[B]) at minima of sum_p weights[B, P] huber(residual), from theta[B, J].

    Steps are Newton's with the curvature of the points within delta, damped by that of a parabola above the Huber
    function (iteratively reweighted squares), which always descends.
    """
    theta = np.clip(theta, bounds.low, bounds.high)
    weights = np.broadcast_to(weights, (len(theta), len(loss)))
    damping, residual = np.ones(len(theta)), residuals(form, x, loss)
    r, jac = residual(theta)
    value = (weights * huber(r, form.delta)).sum(-1)
    value = np.where(np.isfinite(value), value, np.inf)
    busy = np.arange(len(theta))
    free = bounds.low < bounds.high
    for _ in range(steps):
        size = np.abs(r[busy])
        w, j = weights[busy], jac[busy]
        reweighted = w * np.minimum(1.0, form.delta / np.maximum(size, 1e-300))
        near = w * (size <= form.delta)
        gradient = ((reweighted * r[busy])[:, None, :] @ j)[:, 0]
        total = near + damping[busy, None] * reweighted
        hessian = (j * total[..., None]).swapaxes(-1, -2) @ j
        held = ~free | ((theta[busy] <= bounds.low) & (gradient > 0)) | ((theta[busy] >= bounds.high) & (gradient < 0))
        gradient = np.where(held, 0.0, gradient)
        hessian = np.where(held[:, None, :] | held[:, :, None], 0.0, hessian)
        diagonal = np.einsum("bjj->bj", hessian)
        ridge = 1e-12 * diagonal.max(-1, keepdims=True) + 1e-300
        diagonal += np.where(held, 1.0, ridge + 1e-6 * damping[busy, None] * diagonal)
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -1.0, 1.0)
        tried = np.clip(theta[busy] - step, bounds.low, bounds.high)
        r_new, jac_new = residual(tried)
        new = (w * huber(r_new, form.delta)).sum(-1)
        better = new <= value[busy]
        gain = np.where(better, value[busy] - new, np.inf)
        take = busy[better]
        theta[take], r[take], jac[take] = tried[better], r_new[better], jac_new[better]
        settled = (better & (gain <= tolerance * value[busy])) | (damping[busy] > 1e12)
        value[take] = new[better]
        damping[busy] = np.where(better, np.maximum(damping[busy] / 5, 1e-10), damping[busy] * 4)
        busy = busy[~settled]
        if not len(busy):
            break
    return theta, value
