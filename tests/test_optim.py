"""Schedules at their corners, what decays, and that optimizers descend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sslx import optim
from sslx.config import UserError


@pytest.mark.parametrize("schedule, decay, expected", [
    ("cosine", 0, {0: 0.0, 5: 1.0, 10: 2.0, 55: 1.1, 100: 0.2, 200: 0.2}),
    ("wsd", 20, {0: 0.0, 5: 1.0, 10: 2.0, 50: 2.0, 80: 2.0, 90: 1.1, 100: 0.2, 200: 0.2}),
    ("wsd", 0, {0: 0.0, 10: 2.0, 89: 2.0}),
    ("constant", 0, {0: 0.0, 5: 1.0, 10: 2.0, 100: 2.0}),
])
def test_learning_rate(schedule, decay, expected):
    rate = optim.make(steps=100, learning_rate=2.0, schedule=schedule, warmup=10, decay=decay, final=0.1).learning_rate
    assert {step: pytest.approx(float(rate(step)), rel=1e-6) for step in expected} == expected


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_warmup_the_first_step_has_the_full_rate(schedule):
    assert optim.make(steps=10, learning_rate=0.5, schedule=schedule).learning_rate(0) == 0.5


@pytest.mark.parametrize("schedule, decay, expected", [
    ("cosine", 0, {0: "warmup", 9: "warmup", 10: "decay", 99: "decay", 100: "annealed"}),
    ("wsd", 20, {9: "warmup", 10: "stable", 79: "stable", 80: "decay", 99: "decay", 100: "annealed"}),
    ("constant", 0, {9: "warmup", 10: "stable", 100: "stable"}),
])
def test_phase(schedule, decay, expected):
    phase = optim.make(steps=100, learning_rate=1.0, schedule=schedule, warmup=10, decay=decay).phase
    assert {step: phase(step) for step in expected} == expected


def test_a_schedule_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"optim.warmup=60 and optim.decay=50 do not fit into optim.steps=100"):
        optim.make(steps=100, learning_rate=1.0, schedule="wsd", warmup=60, decay=50)


PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)},
          "tokens": {"embedding": jnp.ones((5, 2))}, "cls": jnp.ones(2), "mask_token": jnp.ones(2),
          "head": {"prototypes": jnp.ones((2, 4))}}
DECAYED = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}, "tokens": {"embedding": True},
           "cls": False, "mask_token": False, "head": {"prototypes": True}}


def test_matrices_decay_and_vectors_do_not():
    assert optim.decayed(PARAMS) == DECAYED


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_without_a_gradient_only_what_decays_shrinks_by_rate_times_decay(optimizer):
    tx = optim.make(steps=10, learning_rate=0.1, optimizer=optimizer, schedule="constant", weight_decay=0.5).tx
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    for update, decays in zip(jax.tree.leaves(updates), jax.tree.leaves(DECAYED), strict=True):
        np.testing.assert_allclose(update, -0.05 if decays else 0.0, rtol=1e-6)


@pytest.mark.parametrize("optimizer, rate", [("adamw", 0.1), ("lion", 0.03), ("sgd", 0.05)])
def test_optimizers_descend(optimizer, rate):
    tx = optim.make(steps=60, learning_rate=rate, optimizer=optimizer, warmup=5).tx
    target = jax.tree.map(lambda x: 0.5 * x, PARAMS)

    def distance(params):
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        return sum(jnp.square(a - b).sum() for a, b in pairs)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(distance)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(60):
        params, state = step(params, state)
    assert distance(params) < 0.05 * distance(PARAMS)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_lars_moves_matrices_in_proportion_to_their_norm_and_vectors_by_their_gradient(size):
    tx = optim.make(steps=10, learning_rate=2.0, optimizer="lars", schedule="constant", momentum=0.0).tx
    updates, _ = tx.update(jax.tree.map(lambda x: size * x, PARAMS), tx.init(PARAMS), PARAMS)
    kernel, bias = updates["dense"]["kernel"], updates["dense"]["bias"]
    trust = 0.001
    np.testing.assert_allclose(np.linalg.norm(kernel), 2.0 * trust * np.sqrt(6), rtol=1e-5)
    np.testing.assert_allclose(bias, -2.0 * size, rtol=1e-5)


def test_clip_bounds_the_global_norm_and_leaves_small_gradients():
    tx = optim.make(steps=10, learning_rate=1.0, optimizer="sgd", schedule="constant", momentum=0.0, clip=1.0).tx
    for size, expected in ((100.0, 1.0), (0.01, 0.01 * np.sqrt(34))):
        grads = jax.tree.map(lambda x, size=size: size * x, PARAMS)
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(optax.global_norm(updates), expected, rtol=1e-5)


def test_rounding_takes_one_of_the_two_neighbours_and_is_right_in_the_mean():
    draws, exact = 1000, np.float32([0.0, -0.0, 1.0, -3.0, 2.0**-100])
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=2000) * 10.0 ** rng.uniform(-20, 20, 2000), exact]).astype(np.float32)
    rounded = optim.stochastically_rounded(jnp.broadcast_to(x, (draws, len(x))), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded, np.float64)
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # in magnitude
    above = np.where(x == below, x, (below.view(np.uint32) + 0x10000).view(np.float32))
    assert ((rounded == below) | (rounded == above)).all()
    between = x != below
    gap = (above.astype(np.float64) - below)[between]
    up = (x.astype(np.float64) - below)[between] / gap  # the chance of `above`
    error = ((rounded.mean(0) - x)[between] / gap) / np.sqrt(up * (1 - up) / draws)
    assert between.sum() == 2000 and abs(error).max() < 5  # of 2000 normal numbers
    assert abs(error.mean()) < 4 / np.sqrt(2000) and abs(error.std() - 1) < 4 / np.sqrt(4000)


def test_what_is_not_finite_stays_so():
    x = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    rounded = np.asarray(optim.stochastically_rounded(jnp.broadcast_to(x, (100, 5)), jax.random.key(0)), np.float32)
    np.testing.assert_array_equal(rounded, np.broadcast_to(x, (100, 5)))


def test_updates_below_the_last_bit_of_a_weight_add_up():
    """200 times 1e-4, to weights of 1 whose neighbour is at 1 + 2^-7: nearest rounding leaves them."""
    steps, rate, n = 200, 1e-4, 4096
    optimizer = optim.make(steps=steps, learning_rate=rate, optimizer="sgd", schedule="constant", momentum=0.0,
                           parameters="bfloat16")
    wide = {"kernel": jnp.ones(n), "bias": jnp.ones(n)}
    grads = jax.tree.map(lambda x: -x, wide)

    @jax.jit
    def run(params, opt_state):
        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(lambda now, key: (optimizer.update(grads, now[1], now[0], key), None),
                            (params, opt_state), keys)[0][0]

    params, opt_state = optimizer.init(wide)
    assert (optax.apply_updates(params, jax.tree.map(lambda g: -rate * g, grads))["kernel"] == 1).all()
    moved = jax.tree.map(np.float64, run(params, opt_state))
    chance, gap = rate * 2**7, 2**-7  # of each step, and its size
    spread = gap * np.sqrt(steps * chance * (1 - chance))
    np.testing.assert_allclose(moved["bias"], 1 + steps * rate, rtol=1e-5)
    assert abs(moved["kernel"].mean() - (1 + steps * rate)) < 4 * spread / np.sqrt(n)
    np.testing.assert_allclose(moved["kernel"].std(), spread, rtol=0.1)  # every weight for itself


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "lars", "lamb"])
def test_matrices_are_kept_in_bfloat16_and_the_rest_in_float32(optimizer):
    made = optim.make(steps=10, learning_rate=0.1, optimizer=optimizer, weight_decay=0.1, parameters="bfloat16")
    born = made.init(PARAMS)
    after = jax.jit(made.update)(PARAMS, born[1], born[0], jax.random.key(0))
    for params, opt_state in (born, after):
        dtypes = jax.tree.map(lambda x: x.dtype == jnp.bfloat16, params)
        assert dtypes == DECAYED
        assert {x.dtype for x in jax.tree.leaves(opt_state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_weight_decay_moves_along_half_a_cosine():
    tx = optim.make(steps=4, learning_rate=1.0, schedule="constant", weight_decay=0.2, final_weight_decay=0.6).tx
    params, current = {"kernel": jnp.ones((2, 2))}, None
    current, pulled = tx.init(params), []
    for _ in range(5):
        updates, current = tx.update(jax.tree.map(jnp.zeros_like, params), current, params)
        pulled.append(float(-updates["kernel"][0, 0]))
    np.testing.assert_allclose(pulled, [0.2, 0.4 - 0.2 / np.sqrt(2), 0.4, 0.4 + 0.2 / np.sqrt(2), 0.6], rtol=1e-5)


def test_lamb_is_that_of_optax():
    tx = optim.make(steps=10, learning_rate=0.1, optimizer="lamb", schedule="constant", weight_decay=0.5).tx
    reference = optax.lamb(0.1, weight_decay=0.5)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    ours, theirs = tx.init(params), reference.init(params)
    for i in range(3):
        grads = {"kernel": jnp.sin(jnp.arange(6.0).reshape(2, 3) + i)}
        (a, ours), (b, theirs) = tx.update(grads, ours, params), reference.update(grads, theirs, params)
        np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-5)


def test_layer_decay_slows_what_comes_first():
    unrolled = {"encoder": {"embed": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}, "cls": jnp.ones(2),
                            "stack": {f"block_{i}": {"mlp": {"kernel": jnp.ones((2, 2))}} for i in range(12)}},
                "head": {"embed": {"kernel": jnp.ones((2, 2))}}}
    factors = optim.layer_factors(unrolled, 0.5)
    assert [factors["encoder"]["stack"][f"block_{i}"]["mlp"]["kernel"] for i in range(12)] == \
        [0.5 ** (12 - i) for i in range(12)]
    assert factors["encoder"]["embed"]["kernel"] == factors["encoder"]["cls"] == 0.5**13
    assert factors["encoder"]["norm"]["scale"] == factors["head"]["embed"]["kernel"] == 1
    scanned = {"encoder": unrolled["encoder"] | {"stack": {"blocks": {"mlp": {"kernel": jnp.ones((12, 2, 2))}}}}}
    of_blocks = optim.layer_factors(scanned, 0.5)["encoder"]["stack"]["blocks"]["mlp"]["kernel"]
    np.testing.assert_allclose(of_blocks.reshape(-1), [0.5 ** (12 - i) for i in range(12)])
    stages = {"encoder": {name: {"kernel": jnp.ones((2, 2))} for name in ("stem", "stage0_0", "stage0_1", "stage1_0")}}
    found = optim.layer_factors(stages, 0.5)["encoder"]
    assert [found[name]["kernel"] for name in stages["encoder"]] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]


def test_layer_decay_multiplies_updates():
    params = {"encoder": {"stack": {f"block_{i}": {"kernel": jnp.ones((2, 2))} for i in range(2)}}}
    tx = optim.make(steps=10, learning_rate=0.1, optimizer="sgd", schedule="constant", momentum=0.0, layer_decay=0.5).tx
    updates, _ = tx.update(params, tx.init(params), params)
    assert [float(u[0, 0]) for u in jax.tree.leaves(updates)] == pytest.approx([-0.025, -0.05])


def test_frozen_prototypes_start_with_moments_of_what_they_missed():
    tx = optim.make(steps=10, learning_rate=0.1, schedule="constant", weight_decay=0.5, freeze_prototypes=3).tx
    params = {"head": {"prototypes": jnp.ones((2, 4)), "kernel": jnp.ones((2, 4))}}
    current, moves = tx.init(params), []
    for _ in range(5):
        updates, current = tx.update(params, current, params)
        moves.append({name: float(u[0, 0]) for name, u in updates["head"].items()})
    assert [m["prototypes"] for m in moves[:3]] == [0, 0, 0]
    assert [m["prototypes"] for m in moves[3:]] == [m["kernel"] for m in moves[3:]] != [0, 0]


def test_layer_decay_of_other_networks():
    """Reductions are of the stage they lead to; tables of a text network come before its blocks."""
    names = ("stem", "stage0_0", "reduce1", "reduce1_norm", "stage1_0", "norm")
    found = optim.layer_factors({"encoder": {name: {"kernel": jnp.ones((2, 2))} for name in names}}, 0.5)["encoder"]
    assert [found[name]["kernel"] for name in names] == [1 / 8, 1 / 4, 1 / 2, 1 / 2, 1 / 2, 1]
    text = {"tokens": {"embedding": jnp.ones((4, 2))}, "stack": {"blocks": {"kernel": jnp.ones((3, 2, 2))}},
            "norm": {"scale": jnp.ones(2)}}
    found = optim.layer_factors(text, 0.5)
    assert found["tokens"]["embedding"] == 1 / 16 and found["norm"]["scale"] == 1
    np.testing.assert_allclose(found["stack"]["blocks"]["kernel"].reshape(-1), [1 / 8, 1 / 4, 1 / 2])
