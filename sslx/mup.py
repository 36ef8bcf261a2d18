"""Maximal update parametrization: what was tuned on a small network holds for a wide and deep one.

Widths follow muP (Yang et al. 2022, "Tensor Programs V"), depth CompleteP (Dey et al. 2025). `config.model.base` has
the sizes at which `config.optim` was tuned. Against them a weight's fan-in has grown by i, its fan-out by o, and the
stack it is in by r; vectors that are looked up or added (embeddings, positions, biases, norms) have a fan-in of 1.

    | everywhere              | times                        |
    |-------------------------|------------------------------|
    | standard deviation      | min(1, sqrt(o / i)), on top of the 1 / sqrt(fan-in) that all kernels are born with
    | logits of a token table | 1 / (growth of the width)
    | q k^T / sqrt(K)         | 1 / sqrt(growth of K)
    | residual branches       | 1 / r, and born for the base's depth: 1 / sqrt(2 base depth)

    | optimizer    | learning rate            | epsilon     |
    |--------------|--------------------------|-------------|
    | adamw        | 1 / i                    | 1 / (o r)   |
    | lion         | 1 / i                    |             |
    | sgd          | o r / i                  |             |
    | lars         | 1 / sqrt(min(i, o)), vectors o r |     |
    | lamb         | 1 / sqrt(min(i, o)), vectors 1 / i |   |

All come from one condition: a step moves a weight by a spectral norm of order sqrt(fan-out / fan-in), and a stack's
blocks by 1 / depth each (Yang, Simon & Bernstein 2023). An update of adamw or lion is i o entries of size 1 that
align; sgd's has the size of its gradient, which is that of the features behind it, 1 / (o r); lars gives it the norm of
the weight, at birth sqrt(o) min(1, sqrt(o / i)). What a step decays is not scaled: learning rate x weight decay is the
base's for all weights, which is the same as a decay that grows by i.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from sslx.objectives import Objective
from sslx.sharding import batch_sharding, make_mesh


class Fans(NamedTuple):
    """What a weight sums over, and what it makes; how deep its stack is, and that of the base (1 outside of stacks)."""

    fan_in: int
    fan_out: int
    depth: int = 1
    base_depth: int = 1


@dataclasses.dataclass(frozen=True)
class Growth:
    """A weight's fan-in and fan-out, and the depth of its stack, over those of the base: i, o and r."""

    i: float
    o: float
    r: float

    @property
    def std(self) -> float:
        """Of the weight at birth, over 1 / sqrt(fan-in): smaller if there is less to make than to sum over."""
        return min(1.0, math.sqrt(self.o / self.i))


# Who asks what of the weights that are made: `layers.weight` tells and is told here.
stack: ContextVar[tuple[int, int]] = ContextVar("stack", default=(1, 1))
noted: ContextVar[list[tuple[str, Fans]] | None] = ContextVar("noted", default=None)
base: ContextVar[Iterator[tuple[str, Fans]] | None] = ContextVar("base", default=None)


@contextlib.contextmanager
def during(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def grown(fans: Fans, base: Fans) -> Growth:
    return Growth(fans.fan_in / base.fan_in, fans.fan_out / base.fan_out, fans.depth / fans.base_depth)


def born(init: Callable, path: str, fans: Fans) -> Callable:
    """`init` of a weight, smaller where the base, whose weights are made in the same order, says so."""
    if (weights := base.get()) is None:
        return init
    of_base, base_fans = next(weights)
    assert of_base == path, f"{path} is made where the base makes {of_base}"
    std = grown(fans, base_fans).std
    return lambda *shape: std * init(*shape)


def measured(objective: Objective, batch: Any) -> tuple[Any, list[tuple[str, Fans]]]:
    """(a tree as that of the parameters, all weights by path in the order they are made) of their `Fans`.

    Nothing is computed: each weight stands as an abstract array whose last dimensions are its fans.
    """
    alone = make_mesh(devices=jax.local_devices()[:1])  # whatever mesh there is around
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(alone)), batch)
    weights: list[tuple[str, Fans]] = []
    with jax.set_mesh(alone), during(noted, weights):
        params, _ = jax.eval_shape(lambda rows: objective.init(jax.random.key(0), rows), rows)
    return jax.tree.map(lambda x: Fans(*x.shape[-len(Fans._fields):]), params), weights


def parametrized(objective: Objective, narrow: Objective, batch: Any) -> tuple[Objective, Any]:
    """(the objective, whose weights are born in muP, `Growth` of each of its parameters).

    narrow: the objective on the network with the widths of the base, and the depth of the network itself.
    batch:  shapes and dtypes.
    """
    fans, _ = measured(objective, batch)
    base_fans, base_weights = measured(narrow, batch)

    def init(key, batch):
        with during(base, iter(base_weights)):
            return objective.init(key, batch)

    is_fans = lambda x: isinstance(x, Fans)  # noqa: E731
    return objective._replace(init=init), jax.tree.map(grown, fans, base_fans, is_leaf=is_fans)
