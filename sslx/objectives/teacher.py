"""Teachers: towers whose parameters follow those of a student as a moving average, without a gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sslx.objectives.joint import Embeds


class Teacher(NamedTuple):
    """A tower that follows one with the same parts, or more: theta <- m theta + (1 - m) student (Tarvainen 2017).

    m moves along half a cosine between the two of `momentum` over `steps` steps. Carried are
    {"params", "stats", "step"}.
    """

    tower: Embeds
    steps: int
    momentum: tuple[float, float]

    def begin(self, params, stats):
        """A copy of the student."""
        return {"params": jax.tree.map(jnp.copy, self.tower.of(params)), "stats": self.tower.of(stats),
                "step": jnp.int32(0)}

    def __call__(self, carried, params, images):
        """(what it makes of the images, carried on)

        It first follows `params`, those that the last step left, so that the average is part of this step.
        """
        followed = self.follow(carried, params)
        with jax.named_scope("teacher"):
            made, stats = self.tower(followed["params"], carried["stats"], images)
        return jax.lax.stop_gradient(made), followed | {"stats": stats}

    def follow(self, carried, params):
        """What is carried, a step on, whose student's parameters are `params`."""
        momentum = cosine(carried["step"], self.steps, *self.momentum)
        followed = moving_average(carried["params"], self.tower.of(params), momentum)
        return carried | {"params": followed, "step": carried["step"] + 1}

    @staticmethod
    def judged(params, aux):
        """That the teacher's features are evaluated, for `joint.objective`."""
        return aux["teacher"]["params"]["encoder"], aux["teacher"]["stats"]["encoder"]


def moving_average(old, new, momentum):
    """m old + (1 - m) new, leaf by leaf, without a gradient."""
    return jax.tree.map(lambda o, n: momentum * o + (1 - momentum) * jax.lax.stop_gradient(n), old, new)


def cosine(step, steps: int, first: float, last: float):
    """From `first` to `last` along half a cosine over `steps` steps."""
    progress = jnp.minimum(step / steps, 1.0)
    return last + (first - last) * (1 + jnp.cos(jnp.pi * progress)) / 2


def linear(step, steps: int, first: float, last: float):
    """From `first` to `last` along a line over `steps` steps; `last` if there are none."""
    return first + (last - first) * jnp.minimum(step / steps, 1.0) if steps else jnp.float32(last)
