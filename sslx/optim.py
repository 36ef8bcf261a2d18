"""Learning-rate schedules and the optax chain."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import optax

from sslx.config import UserError

DECAYED = ("kernel", "embedding", "prototypes", "up", "down")  # not norms, biases, class and mask tokens


class Optimizer(NamedTuple):
    """The optax transformation, the learning rate of a step, and the phase of its schedule."""

    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    phase: Callable[[int], str]


def make(*, steps: int, learning_rate: float, optimizer: Literal["adamw", "lion", "sgd", "lars"] = "adamw",
         schedule: Literal["cosine", "wsd", "constant"] = "cosine", warmup: int = 0, decay: int = 0,
         final: float = 0.0, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999, momentum: float = 0.9,
         clip: float | None = None, moments: Literal["float32", "bfloat16"] = "float32") -> Optimizer:
    """An optimizer over `steps` steps.

    schedule: linear warm-up over `warmup` steps, then "cosine" to `final` x learning_rate; or "wsd": constant,
              then linear to `final` x learning_rate over the last `decay` steps; or "constant".
    b1, b2:   of adamw and lion; `momentum` of sgd and lars.
    clip:     of the global norm of the gradient.
    moments:  dtype of the mean of gradients (of adamw, lion, and the momentum of sgd).
    """
    if warmup + decay > steps:
        raise UserError(f"optim.warmup={warmup} and optim.decay={decay} do not fit into run.steps={steps}")
    low = final * learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), final),
        "wsd": optax.join_schedules([optax.constant_schedule(learning_rate),
                                     optax.linear_schedule(learning_rate, low, max(decay, 1))],
                                    [steps - warmup - decay]),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, max(warmup, 1)), after], [warmup])
    tx = {
        "adamw": lambda: optax.adamw(rate, b1, b2, mu_dtype=moments, weight_decay=weight_decay, mask=decayed),
        "lion": lambda: optax.lion(rate, b1, b2, mu_dtype=moments, weight_decay=weight_decay, mask=decayed),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(weight_decay, decayed),
                                   optax.sgd(rate, momentum, accumulator_dtype=moments)),
        "lars": lambda: optax.lars(rate, weight_decay, decayed, trust_ratio_mask=decayed, momentum=momentum),
    }[optimizer]()

    def phase(step: int) -> str:
        if step < warmup:
            return "warmup"
        if schedule == "constant" or (schedule == "wsd" and step < steps - decay):
            return "stable"
        return "decay" if step < steps else "annealed"

    return Optimizer(tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx), rate, phase)


def decayed(params):
    """Which parameters weight decay pulls on: matrices and embeddings, by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
