"""Objectives: a method of self-supervised learning is a tuple of pure functions on the global batch.

An objective knows nothing of loops, hosts, files or meshes. Its loss is written for the global
batch; sharding is carried by the types of the arrays. One file per method, each with a
`make(model, info, ...)` and the mathematics of its loss as a pure function on arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Batch = Mapping[str, jax.Array]
Params = Any
Aux = Any
Metrics = dict[str, jax.Array]


class Objective(NamedTuple):
    """init:   (key, batch) -> (params, aux): params are trained, aux is carried without a gradient
            (teacher, queue, centre, batch statistics, counters).
    loss:   (params, aux, batch, key) -> (loss, (aux, metrics)); metrics holds `loss` and `tokens`
            (corpus units seen before any masking: tokens, patches of the image grid).
    encode: (params, aux, batch) -> features float32[B, D], frozen, for evaluations.
    show:   (params, aux, batch, key) -> {caption: images [N, H, W, C] in [0, 1] or tokens [N, T]},
            what a person looks at in the report, in the order of
            the captions' names; None if there is nothing to see.
    project: (params, aux, batch) -> what the loss compares of each example, float32 [B, D], with the batch statistics
            of training; None if it compares something else.
    embed:  (params, aux, batch) -> {"image", "text"}: unit vectors [B, D] of the two sides of a pair; None if there
            are no pairs.
    reads:  fields of examples beside the inputs that the loss takes: "label", or "index", the place in the source.
    of_batch: if the loss of an example depends on the others of its batch, as with negatives: losses of batches of
            different sizes then do not compare.
    """

    init: Callable[[jax.Array, Batch], tuple[Params, Aux]]
    loss: Callable[[Params, Aux, Batch, jax.Array], tuple[jax.Array, tuple[Aux, Metrics]]]
    encode: Callable[[Params, Aux, Batch], jax.Array]
    show: Callable[[Params, Aux, Batch, jax.Array], dict[str, jax.Array]] | None = None
    reads: tuple[str, ...] = ()
    project: Callable[[Params, Aux, Batch], jax.Array] | None = None
    embed: Callable[[Params, Aux, Batch], dict[str, jax.Array]] | None = None
    of_batch: bool = False


def combine(objectives: Mapping[str, tuple[float, Objective]]) -> Objective:
    """The weighted sum of objectives on the same batch, each with parameters and aux of its own.

    loss = sum_i w_i loss_i. Features are those of the first. Metrics are `<name>/<metric>`.
    """
    first = next(iter(objectives))

    def init(key, batch):
        parts = {n: o.init(jax.random.fold_in(key, i), batch) for i, (n, (_, o)) in enumerate(objectives.items())}
        return {n: p for n, (p, _) in parts.items()}, {n: a for n, (_, a) in parts.items()}

    def loss(params, aux, batch, key):
        total, carried, metrics = 0.0, {}, {}
        for i, (name, (weight, objective)) in enumerate(objectives.items()):
            value, (carried[name], m) = objective.loss(params[name], aux[name], batch, jax.random.fold_in(key, i))
            total = total + weight * value
            metrics |= {f"{name}/{k}": v for k, v in m.items()}
        return total, (carried, metrics | {"loss": total, "tokens": metrics[f"{first}/tokens"]})

    def encode(params, aux, batch):
        return objectives[first][1].encode(params[first], aux[first], batch)

    return Objective(init, loss, encode, reads=tuple({name for _, o in objectives.values() for name in o.reads}),
                     of_batch=any(o.of_batch for _, o in objectives.values()))
