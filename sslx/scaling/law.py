"""A fitted law: what loss it expects of a size and an amount of data, how sure it is, and what is optimal."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sslx.config import UserError
from sslx.scaling.forms import FORMS, RISING, Array, Form, Inputs

CONFIDENCE = 0.90
Z = 1.6449  # of a normal distribution within which CONFIDENCE lies


class Flops(NamedTuple):
    """C = k(N) N D: k interpolated in ln N between the sizes that were run, constant beyond them."""

    ln_n: Array
    ln_k: Array

    def of(self, n: Any, d: Any) -> Array:
        return np.exp(np.interp(np.log(n), self.ln_n, self.ln_k)) * n * d


class Member(NamedTuple):
    """One form of the average: its share, and theta[B, J], resamples for inputs in units of `centre`."""

    form: str
    share: float
    centre: Inputs
    thetas: Array


class Law(NamedTuple):
    """form:      name in FORMS.
    params:    {name: value}.
    members:   what intervals are made of.
    drift:     how wrong earlier extrapolations were: of loss - E, for a factor e of compute beyond the fit.
    misfit:    how far all points of a budget or a class of sizes lie from the law, of the loss, beyond their noise.
    fall:      -d ln L / d ln C of the best run of each budget.
    doubt:     that the law's floor is one: 1 if the budgets span a decade or less, 0 from two decades on.
    c_max:     FLOPs of the largest budget that was fitted.
    flops:     FLOPs of a size and an amount of data.
    counted:   what N is, of runs: "n_params" or "n_params_nonembedding".
    report:    what else the fit found: objective, n_points, starts, intervals, exponents, backtest, warnings.
    """

    form: str
    params: dict[str, float]
    members: tuple[Member, ...]
    drift: float
    misfit: float
    fall: float
    doubt: float
    c_max: float
    flops: Flops
    counted: str | None
    report: dict[str, Any]

    @property
    def shape(self) -> Form:
        return form_of(self.form, self.params)

    def inputs(self, n: Any, d: Any, unique: Any = None) -> Inputs:
        n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
        u = d if unique is None else np.minimum(unique, d)
        return Inputs(*(np.log(np.atleast_1d(x)) for x in (n, d, self.flops.of(n, d), u)))

    def loss(self, n: Any, d: Any, unique: Any = None) -> Array:
        """float[P], the loss that is expected of n parameters after d units, `unique` of them different."""
        return np.exp(self.shape.log_loss(self.shape.internal(self.params), self.inputs(n, d, unique)))

    def interval(self, n: Any, d: Any, unique: Any = None) -> tuple[Array, Array]:
        """(low, high) of the loss, float[P] each, with a confidence of CONFIDENCE.

        Quantiles of resamples, averaged over forms; and apart from these, by Pythagoras, what back-tests ask for. Over
        few decades every curve bends as if to a floor: as far as there is `doubt`, the loss may go on as it fell.
        """
        x, loss = self.inputs(n, d, unique), self.loss(n, d, unique)
        draws, shares = [], []
        for member in self.members:
            draws.append(form_of(member.form, self.params).log_loss(member.thetas, x.within(member.centre)))
            shares.append(np.full(len(member.thetas), member.share / len(member.thetas)))
        low, high = quantiles(np.concatenate(draws), np.concatenate(shares))
        beyond = np.maximum(x.c - math.log(self.c_max), 0.0)
        back = np.exp(-beyond / 2)  # of N and of D, to the largest budget of the fit
        floor = next(iter(self.params.values())) if len(self.shape.signs) > 1 else 0.0
        wide = np.hypot(self.misfit, self.drift * beyond * np.abs(loss - floor) / loss)
        centre = np.log(loss)
        fell = np.log(self.loss(np.multiply(n, back), np.multiply(d, back), unique) / loss)
        unbent = self.doubt * np.maximum(self.fall * beyond - fell, 0.0)
        return (np.exp(centre - np.hypot(np.maximum(centre - low, 0.0), wide) - unbent),
                np.exp(centre + np.hypot(np.maximum(high - centre, 0.0), wide)))

    def optimum(self, c: float) -> tuple[float, float]:
        """(N, D) of the least loss for c FLOPs, of all sizes. Raises UserError for a form without N and D."""
        if not {"A", "B"} <= self.params.keys():
            raise UserError(f"a law of the form {self.form!r} knows compute only, and has no best size")
        low, high = math.log(1.0), math.log(c / 6)
        for _ in range(4):
            grid = np.exp(np.linspace(low, high, 201))
            d = c / self.flops.of(grid, 1.0)
            best = int(np.clip(self.loss(grid, d).argmin(), 1, len(grid) - 2))
            low, high = math.log(grid[best - 1]), math.log(grid[best + 1])
        return float(grid[best]), float(d[best])

    def predictions(self, wanted: list[tuple[float, ...]]) -> list[dict[str, float]]:
        """[{n, d, loss, lo, hi}] of (n, d) or (n, d, unique)."""
        found = []
        for n, d, *unique in wanted:
            low, high = self.interval(n, d, *unique)
            found.append(dict(n=n, d=d, loss=float(self.loss(n, d, *unique)[0]), lo=float(low[0]), hi=float(high[0])))
        return found

    def as_json(self, predictions: Sequence[dict[str, float]] = ()) -> dict[str, Any]:
        """What a file keeps of the law; `backtest.law` is what intervals of new predictions need."""
        kept = dict(drift=self.drift, misfit=self.misfit, fall=self.fall, doubt=self.doubt, c_max=self.c_max,
                    counted=self.counted, flops=[np.round(x, 6).tolist() for x in self.flops],
                    members=[dict(form=m.form, share=m.share, centre=[float(x) for x in m.centre],
                                  thetas=np.round(m.thetas, 7).tolist())
                             for m in self.members])
        report = self.report | dict(backtest=self.report["backtest"] | dict(law=kept), predictions=list(predictions))
        warnings = report.pop("warnings")
        return dict(form=self.form, params=self.params) | report | dict(warnings=warnings)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Law":
        """The law of `as_json`. Raises UserError if it is none."""
        try:
            kept = found["backtest"]["law"]
            members = tuple(Member(m["form"], m["share"], Inputs(*map(np.array, m["centre"])), np.array(m["thetas"]))
                            for m in kept["members"])
            report = {k: v for k, v in found.items() if k not in ("form", "params", "predictions")}
            report["backtest"] = {k: v for k, v in report["backtest"].items() if k != "law"}
            return cls(found["form"], found["params"], members, kept["drift"], kept["misfit"], kept["fall"],
                       kept["doubt"], kept["c_max"], Flops(*map(np.array, kept["flops"])), kept["counted"], report)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no law as `python -m sslx.scaling.fit --json` writes one: {error!r}") from error


def form_of(name: str, params: dict[str, float]) -> Form:
    """The form of a name; of a metric that rises, as its parameters tell."""
    return RISING if "M" in params else FORMS[name]


def quantiles(draws: Array, shares: Array) -> tuple[Array, Array]:
    """(low, high) of each column of draws[B, P], whose rows have shares[B], with CONFIDENCE between them."""
    order = draws.argsort(0)
    below = shares[order].cumsum(0) / shares.sum()
    tail = (1 - CONFIDENCE) / 2
    at = [(below < q).sum(0).clip(max=len(draws) - 1) for q in (tail, 1 - tail)]
    ordered = np.take_along_axis(draws, order, 0)
    low, high = (np.take_along_axis(ordered, a[None], 0)[0] for a in at)
    return low, high
