"""Guards: steps that go wrong, and devices that compute wrong.

A bad step has a loss or gradient that is not finite, or is far above those before it. Devices are checked for silent
corruption by the bits of the state: the same step computed twice, and the same weights on two devices, must agree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sslx.config import UserError
from sslx.sharding import AXES, replicate, spec_of

WINDOW = 128  # sound steps that a spike is judged by
FEWEST = 16   # below which none is


class Diverged(UserError):
    """A step is bad, and the run may not go on."""

    status = 3


class BadStep(Exception):
    """A step that the run rolls back from, and why."""

    def __init__(self, step: int, why: str):
        super().__init__(step, why)
        self.step, self.why = step, why


class Met:
    """The bad steps that a run has met, also before it was resumed at `step`, and the steps that it passes over."""

    def __init__(self, events: list[dict[str, Any]], step: int, most: int):
        self.most, self.over = most, set[int]()
        self.steps = [e["step"] for e in events if e["event"] == "skipped" and e["step"] <= step]
        for event in events:
            if event["event"] == "rolled back":
                self.bad(event["bad_step"])
                self.pass_over(event["bad_step"], event["step"])

    def bad(self, step: int) -> None:
        self.steps.append(step)

    def too_many(self, step: int) -> bool:
        """Whether more than `most` of the last WINDOW steps were bad."""
        return sum(step - WINDOW < s <= step for s in self.steps) > self.most

    def pass_over(self, bad: int, saved: int) -> list[int]:
        """A bad step and the one before, if it comes after the checkpoint, use no batch from now on: [first, last]."""
        first = max(bad - 1, saved + 1)
        self.over |= {first, bad}
        return [first, bad]

    def passed_over(self, step: int) -> int:
        """How many steps up to `step` used none."""
        return sum(s <= step for s in self.over)


class Corrupted(UserError):
    """A device computed something else than it should have."""

    status = 5


def no_history() -> jax.Array:
    """float32 [2, WINDOW]: loss and norm of the gradient of the newest sound steps, NaN where there was none."""
    return jnp.full((2, WINDOW), jnp.nan, jnp.float32)


def judge(recent_2W: jax.Array, loss: jax.Array, grad_norm: jax.Array, spike: float | None):
    """(bad, limits [2], history with the step if it is sound) of a step.

    Bad is what is not finite or, with `spike`, above the limit: mean + `spike` standard deviations of the history.
    """
    values_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    known_W = jnp.isfinite(recent_2W[0])
    n = known_W.sum()
    mean_2 = jnp.where(known_W, recent_2W, 0).sum(1) / jnp.maximum(n, 1)
    var_2 = jnp.where(known_W, jnp.square(recent_2W - mean_2[:, None]), 0).sum(1) / jnp.maximum(n, 1)
    far_2 = jnp.inf if spike is None else mean_2 + spike * jnp.sqrt(var_2)
    limits_2 = jnp.where(n >= FEWEST, far_2, jnp.full(2, jnp.inf))
    bad = ~(jnp.isfinite(values_2) & (values_2 <= limits_2)).all()
    shifted_2W = jnp.concatenate([recent_2W[:, 1:], values_2[:, None]], 1)
    return bad, limits_2, jnp.where(bad, recent_2W, shifted_2W)


def reason(step: int, loss: float, grad_norm: float, limits_2: np.ndarray) -> str:
    """What is wrong with a bad step."""
    for what, value, limit in zip(("loss", "gradient"), (loss, grad_norm), limits_2, strict=True):
        if not np.isfinite(value):
            return f"the {what} of step {step} is not finite"
        if value > limit:
            norm = "" if what == "loss" else "'s norm"
            return f"the {what}{norm} of step {step} is {value:.4g}, above {limit:.4g} (run.spike)"
    raise AssertionError(f"step {step} is not bad: {loss} {grad_norm} {limits_2}")


def checksums(tree) -> dict[str, np.ndarray]:
    """{path: uint32 [devices]} of the bits that each device of the mesh holds of a leaf, on the host.

    sum_i (2 i + 1) bits_i modulo 2^32: no flip of one bit keeps it.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    return dict(zip(map(jax.tree_util.keystr, paths), np.asarray(of_devices(leaves)).T, strict=True))


@jax.jit
def of_devices(leaves: tuple[jax.Array, ...]) -> jax.Array:
    """uint32 [devices, leaves], whole on every device."""
    def of_device(*parts):
        return jnp.stack([checksum(part) for part in parts])[None]

    specs = tuple(spec_of(x) for x in leaves)
    return replicate(jax.shard_map(of_device, in_specs=specs, out_specs=P(AXES), check_vma=False)(*leaves))


def checksum(x: jax.Array) -> jax.Array:
    """uint32 of the bits of an array on one device."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = (x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)).ravel()
    return (bits.astype(jnp.uint32) * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)


def check_replicas(step: int, tree) -> None:
    """Raises Corrupted if devices that hold the same part of an array hold different bits."""
    found = checksums(tree)
    mesh = jax.sharding.get_mesh()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name, parts = jax.tree_util.keystr(path), x.sharding.devices_indices_map(x.shape)
        sums: dict[str, dict[int, str]] = {}
        for device, value in zip(mesh.devices.flat, found[name].tolist(), strict=True):
            sums.setdefault(str(parts[device]), {}).setdefault(value, str(device))
        for same in sums.values():
            if len(same) > 1:
                raise Corrupted(f"params{name} differ between replicas after step {step}: {' and '.join(same.values())}"
                                " hold other bits of the same part. A device or a link is faulty: leave it out."
                                " The same command goes on from the newest checkpoint")


def check_again(step: int, first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    """Raises Corrupted if two computations of a step gave different bits."""
    for name, sums_D in first.items():
        if (sums_D != second[name]).any():
            device = jax.sharding.get_mesh().devices.flat[int(np.flatnonzero(sums_D != second[name])[0])]
            raise Corrupted(f"step {step}, computed twice, gives other bits in {name} on {device}. The device is"
                            " faulty: leave it out. The same command goes on from the newest checkpoint")
