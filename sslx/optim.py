"""Learning-rate schedules, the optax chain, and what parameters are kept in."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sslx.config import Count, Nonnegative, Only, Positive, Share, Steps, UserError

Decay = Annotated[float, Only(lambda b: 0 <= b < 1, "a number from 0 to below 1")]  # of a moving mean
DECAYED = ("kernel", "embedding", "prototypes", "up", "down")  # not norms, biases, class and mask tokens


class Optimizer(NamedTuple):
    """tx:            the optax transformation, of float32.
    learning_rate: of a step.
    phase:         of the schedule, at a step.
    parameters:    dtype that matrices are kept in.
    """

    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    phase: Callable[[int], str]
    parameters: str = "float32"

    def init(self, params):
        """(parameters as they are kept, state) of float32 parameters."""
        kept = jax.tree.map(lambda x, matrix: x.astype(self.parameters) if matrix else x, params, decayed(params))
        return kept, self.tx.init(params)

    def update(self, grads, opt_state, params, key: jax.Array):
        """(parameters, state) after a step of float32 gradients; `key` is for rounding what is kept in less."""
        updates, opt_state = self.tx.update(grads, opt_state, optax.tree.cast(params, jnp.float32))
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
        return jax.tree.map(moved, params, updates, keys), opt_state


def make(*, steps: Count, learning_rate: Positive, optimizer: Literal["adamw", "lion", "sgd", "lars", "lamb"] = "adamw",
         schedule: Literal["cosine", "wsd", "constant"] = "cosine", warmup: Steps = 0, decay: Steps = 0,
         final: Share = 0.0, weight_decay: Nonnegative = 0.0,
         final_weight_decay: Nonnegative | None = None, layer_decay: Share = 1.0,
         freeze_prototypes: Steps = 0, b1: Decay = 0.9, b2: Decay = 0.999,
         momentum: Decay = 0.9, clip: Positive | None = None, moments: Literal["float32", "bfloat16"] = "float32",
         parameters: Literal["float32", "bfloat16"] = "float32", growth: dict[str, Any] | None = None) -> Optimizer:
    """An optimizer over `steps` steps.

    schedule:   linear warm-up over `warmup` steps, then "cosine" to `final` x learning_rate; or "wsd": constant,
                then linear to `final` x learning_rate over the last `decay` steps; or "constant".
    final_weight_decay: to which weight decay moves along half a cosine (DINO).
    layer_decay: of the learning rate, from each block to the one before it (`layer_factors`; Clark et al. 2020).
    freeze_prototypes: steps in which prototypes stay as they were drawn, while their moments come to know them.
    b1, b2:     of adamw, lion and lamb; `momentum` of sgd and lars.
    clip:       of the global norm of the gradient.
    moments:    dtype of the mean of gradients (of adamw, lion, and the momentum of sgd).
    parameters: dtype that matrices and embeddings are kept in. "bfloat16" without a copy in float32: what an update
                leads to is rounded at random. Norms, biases, tokens, teachers and second moments stay float32.
    growth:     of each parameter against the base at which all this was tuned: what muP multiplies (sslx/mup.py).
    """
    if warmup + decay > steps:
        raise UserError(f"optim.warmup={warmup} and optim.decay={decay} do not fit into optim.steps={steps}")
    low = final * learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), final),
        "wsd": optax.join_schedules([optax.constant_schedule(learning_rate),
                                     optax.linear_schedule(learning_rate, low, max(decay, 1))],
                                    [steps - warmup - decay]),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, max(warmup, 1)), after], [warmup])

    def grown(before: Callable, tx: optax.GradientTransformation, after: Callable) -> optax.GradientTransformation:
        """`tx` of gradients times `before`, its updates times `after`: of a parameter's `Growth`, and if it decays."""
        if growth is None:
            return tx
        factors = (jax.tree.map(factor, growth, decayed(growth)) for factor in (before, after))
        return optax.chain(multiplied(next(factors)), tx, multiplied(next(factors)))

    pull: Any = weight_decay
    if final_weight_decay is not None:
        def pull(step):
            return weight_decay + (final_weight_decay - weight_decay) * (1 - jnp.cos(jnp.pi * step / steps)) / 2

    decays = optax.add_decayed_weights(pull, decayed)
    tx = {
        # Adam makes of gradients k times as large what it makes of these with an epsilon of 1 / k.
        "adamw": lambda: optax.chain(grown(lambda g, _: g.o * g.r, optax.scale_by_adam(b1, b2, mu_dtype=moments),
                                           lambda g, _: 1 / g.i), decays, optax.scale_by_learning_rate(rate)),
        "lion": lambda: optax.chain(grown(lambda g, _: 1, optax.scale_by_lion(b1, b2, mu_dtype=moments),
                                          lambda g, _: 1 / g.i), decays, optax.scale_by_learning_rate(rate)),
        "sgd": lambda: grown(lambda g, _: g.o * g.r / g.i,
                             optax.chain(decays, optax.sgd(rate, momentum, accumulator_dtype=moments)),
                             lambda g, _: 1),
        "lars": lambda: grown(lambda g, _: 1,
                              optax.lars(rate, pull, decayed, trust_ratio_mask=decayed, momentum=momentum),
                              lambda g, matrix: min(g.i, g.o) ** -0.5 if matrix else g.o * g.r),
        # Scaled to the size of its parameter, an update forgets what its gradient was multiplied by.
        "lamb": lambda: grown(lambda g, _: g.o * g.r,
                              optax.chain(optax.scale_by_adam(b1, b2, 1e-6, mu_dtype=moments), decays,
                                          optax.masked(optax.scale_by_trust_ratio(), decayed),
                                          optax.scale_by_learning_rate(rate)),
                              lambda g, matrix: min(g.i, g.o) ** -0.5 if matrix else 1 / g.i),
    }[optimizer]()

    def phase(step: int) -> str:
        if step < warmup:
            return "warmup"
        if schedule == "constant" or (schedule == "wsd" and step < steps - decay):
            return "stable"
        return "decay" if step < steps else "annealed"

    if layer_decay != 1:
        slow = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates,
                                                               layer_factors(updates, layer_decay)))
        tx = optax.chain(tx, slow)
    if freeze_prototypes:
        held = optax.scale_by_schedule(lambda step: jnp.where(step < freeze_prototypes, 0.0, 1.0))
        tx = optax.chain(tx, optax.masked(held, lambda params: named(params, ("prototypes",))))
    tx = tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)
    return Optimizer(tx, rate, phase, parameters)


FIRST = ("embed", "tokens", "positions", "position_embedding", "cls", "registers", "mask", "stem", "stem_norm")


def layer_factors(params: Any, decay: float) -> Any:
    """decay^(L + 1 - l) for each parameter, l its block's place among the L of its stack; broadcasts against it.

    What comes before the blocks is at l = 0, what comes after them, and heads, at L + 1.
    """
    def layer(path):
        """(the stack that a parameter belongs to, the name of its block), or None."""
        names = [key.key for key in path]
        for i, name in enumerate(names):
            if found := re.fullmatch(r"block_(\d+)|blocks|stage(\d+)_(\d+)|reduce(\d+)(?:_norm)?", name):
                place = tuple(int(n) for n in found.groups() if n)
                return tuple(names[:i]), (*place, 0) if name.startswith("reduce") else place
        return None

    leaves = jax.tree_util.tree_leaves_with_path(params)
    places: dict[Any, dict[Any, int]] = {}
    for path, x in leaves:
        if found := layer(path):
            stack, block = found
            places.setdefault(stack, {})[block] = x.shape[0] if not block else 1
    of_network = {stack[:-1] if stack[-1] == "stack" else stack: sum(blocks.values())
                  for stack, blocks in places.items()}

    def factor(path, x):
        if found := layer(path):
            stack, block = found
            L = sum(places[stack].values())
            if not block:
                return decay ** jnp.arange(L, 0, -1.0).reshape(-1, *(1,) * (x.ndim - 1))
            return decay ** (L - sorted(places[stack]).index(block))
        names = tuple(key.key for key in path)
        for network, L in of_network.items():
            if names[:len(network)] == network and names[len(network)] in FIRST:
                return decay ** (L + 1)
        return 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def multiplied(factors: Any) -> optax.GradientTransformation:
    """Updates times a number for each parameter."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def moved(x: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    """x + update, summed in float32 and kept in the dtype of x."""
    total = x.astype(jnp.float32) + update
    return total if x.dtype == jnp.float32 else stochastically_rounded(total, key)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 as bfloat16, one of the two neighbours of x, drawn so that the mean is x (Gupta et al. 2015).

    So that updates below half of a weight's last bit are not lost (Zamirai et al. 2020).
    """
    # The upper half of a float32 is a bfloat16. The lower half is the chance, of 2^16, that the sum carries over.
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def decayed(params):
    """Which parameters weight decay pulls on, and `parameters` is about: matrices and embeddings, by name."""
    return named(params, DECAYED)


def named(params, names: tuple[str, ...]):
    """Which parameters have one of these names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)
