"""muP and CompleteP: activations move alike at every width and depth, for every network and optimizer.

By default one network at few widths; -m slow takes all networks, from 32 to 512 wide and from 2 to 32 deep, and sweeps
the learning rate.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from coordinates import changes, changes_of, experiment, slopes
from experiments import CONFIGS, MESHES, PODS, config_module, first_batch
from experiments import experiment as experiment_on

from sslx import aot, mup, optim, state, train
from sslx.config import UserError
from sslx.experiment import build
from sslx.layers import Linear, Norm, cross_entropy
from sslx.models import transformer
from sslx.mup import Growth
from sslx.objectives import Objective
from sslx.sharding import make_mesh, spec

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
FLAT = 0.1  # d log change / d log size
TUNED = 16  # the width of the base
FEW, MANY = (32, 256), (32, 64, 128, 256, 512)
RATE = {"adamw": 2e-2, "lion": 3e-3, "sgd": 0.3, "lars": 1.0, "lamb": 2e-2}
LARGE_STEPS = {"optim.learning_rate": RATE["adamw"], "optim.warmup": 0, "optim.schedule": "constant",
               "optim.clip": None}
UNROLLED = {"model.heads": 2, "model.scan": False}
# An image is many rows: patches, pixels, crops; and in steps of a rate twice as large second-order terms show.
TWO = {"data.batch_size": 2, "optim.learning_rate": 1e-2}
# What is set of each network; widths of a ResNet are those of its last stage.
NETWORKS = {"causal_text": UNROLLED, "moe_text": UNROLLED, "span_text": TWO | UNROLLED, "mae_fashion_mnist": UNROLLED,
            "rotation_fashion_mnist": TWO | {"model.stages": (1, 1)},
            "simclr_fashion_mnist": TWO | {"model.stages": (1, 1)},
            # The teacher is the student: otherwise it hardly moves. Two images have no statistics.
            "dino_fashion_mnist": TWO | UNROLLED | {"objective.momentum": (0.0, 0.0), "objective.batch_norm": False}}


@pytest.fixture
def readouts_born_small(monkeypatch):
    """What a readout makes of changed features with the weights that it was born with vanishes as 1 / sqrt(width).

    It is no part of the limit, and hides it at narrow widths; the paper lets readouts begin at zero (D.2).
    """
    std = mup.Growth.std.fget
    monkeypatch.setattr(mup.Growth, "std", property(lambda g: std(g) if g.o >= g.i else 0.1 * std(g)))


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def over_widths(name, widths, parametrized, seeds=8):
    """Slopes of how far the activations of a network move."""
    def moved(width):
        scale = 2 if "model.stages" in NETWORKS[name] else 1
        fields = ["width"] + ["hidden"] * ("hidden" in CONFIGS[name].model)
        sizes = {f"model.{field}": width // scale for field in fields}
        base = {"model.base": {field: TUNED // scale for field in fields}} if parametrized else {}
        return changes_of(experiment(name, {**LARGE_STEPS, **NETWORKS[name], **sizes, **base}), seeds)

    return slopes({width: moved(width) for width in widths})


def steepest(found):
    return max(found.items(), key=lambda item: abs(item[1]))


def test_activations_move_alike_at_every_width(readouts_born_small):
    path, slope = steepest(over_widths("causal_text", FEW, True))
    assert abs(slope) < FLAT, path
    assert abs(steepest(over_widths("causal_text", FEW, False, seeds=1))[1]) > 5 * FLAT


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_of_every_network_move_alike_at_every_width(name, readouts_born_small):
    path, slope = steepest(over_widths(name, MANY, True, seeds=8))
    assert abs(slope) < FLAT, path
    assert abs(steepest(over_widths(name, MANY, False, seeds=1))[1]) > 5 * FLAT


def losses(width, parametrized, rates, steps=150):
    """Training losses, mean of the last 20 steps, of a language model at these learning rates."""
    fixed = {"model.width": width, "model.heads": 2, "model.norm": "rms", "model.tied": False}
    base = {"model.base": {"width": 32}} if parametrized else {}
    fixed |= {"optim.learning_rate": 1.0, "optim.steps": steps, "optim.warmup": steps // 10, "optim.weight_decay": 0.0}
    built = experiment("causal_text", fixed | base, rows=8, length=64)
    batches = [{name: np.asarray(x) for name, x in batch.items()} for batch, _ in built.batches(0, steps)]

    @jax.jit
    def run(rate, batches):
        params, aux = built.objective.init(KEY, jax.tree.map(lambda x: x[0], batches))

        def step(carry, batch):
            params, opt_state = carry
            (_, (_, metrics)), grads = jax.value_and_grad(built.objective.loss, has_aux=True)(params, aux, batch, KEY)
            updates, opt_state = built.optimizer.tx.update(grads, opt_state, params)
            return (jax.tree.map(lambda x, u: x + rate * u, params, updates), opt_state), metrics["loss"]

        return jax.lax.scan(step, (params, built.optimizer.tx.init(params)), batches)[1][-20:].mean()

    with jax.set_mesh(built.mesh):
        lying = jax.sharding.NamedSharding(built.mesh, spec(None, "batch"))
        stacked = jax.tree.map(lambda *x: jax.device_put(np.stack(x), lying), *batches)
        return [float(run(rate, stacked)) for rate in rates]


@pytest.mark.slow
def test_the_best_learning_rate_of_a_width_is_that_of_one_eight_times_as_wide():
    jax.config.update("jax_disable_most_optimizations", False)
    rates = 2.0 ** np.arange(-11, -2)
    table = {(width, parametrized): losses(width, parametrized, rates) for parametrized in (True, False)
             for width in (32, 256)}
    print("\n", rates, *table.items(), sep="\n")
    best = {key: int(np.argmin(np.nan_to_num(of_rates, nan=np.inf))) for key, of_rates in table.items()}
    assert abs(best[32, True] - best[256, True]) <= 1 < best[32, False] - best[256, False]
    assert table[256, True][best[32, True]] < table[32, True][best[32, True]]  # wider is better


class Tower(nn.Module):
    """Weights of every kind: into a width, within it, and out of it."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = Linear(self.width, (None, "embed"), name="first")(x)
        for i in range(2):
            h = Linear(2 * self.width, ("embed", "hidden"), name=f"up_{i}")(Norm(name=f"norm_{i}")(x))
            x = x + Linear(self.width, ("hidden", "embed"), name=f"down_{i}")(nn.gelu(h))
        return Linear(4, ("embed", None), name="last")(Norm(name="norm")(x))


BATCH = {"x": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32), "y": np.arange(16) % 4}


def tower(width) -> Objective:
    model = Tower(width)

    def loss(params, aux, batch, key):
        value = cross_entropy(model.apply({"params": params}, batch["x"]), batch["y"]).mean()
        return value, (aux, {"loss": value, "tokens": jnp.int32(16)})

    return Objective(lambda key, batch: (model.init(key, batch["x"])["params"], {}), loss, lambda *_: None)


@pytest.mark.parametrize("optimizer", RATE)
def test_with_every_optimizer(optimizer):
    def moved(width, parametrized):
        objective, growth = tower(width), None
        if parametrized:
            objective, growth = mup.parametrized(objective, tower(TUNED), BATCH)
        rate = RATE[optimizer]
        made = optim.make(steps=9, learning_rate=rate, optimizer=optimizer, schedule="constant", growth=growth)
        return changes(objective, made, BATCH, seeds=3)

    widths = (32, 512)
    path, slope = steepest(slopes({width: moved(width, True) for width in widths}))
    assert abs(slope) < FLAT, path
    assert abs(steepest(slopes({width: moved(width, False) for width in widths}))[1]) > 4 * FLAT


def over_depths(name, parametrized, depths=(4, 32), seeds=2, steps=LARGE_STEPS):
    def moved(depth):
        base = {"model.base": {"depth": 2}} if parametrized else {}
        return changes_of(experiment(name, {**steps, "model.scan": True, "model.depth": depth, **base}), seeds)

    return slopes({depth: moved(depth) for depth in depths})


def test_activations_move_alike_at_every_depth():
    path, slope = steepest(over_depths("causal_text", True))
    assert abs(slope) < FLAT, path
    assert abs(steepest(over_depths("causal_text", False))[1]) > 5 * FLAT


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [
    ("causal_text", LARGE_STEPS), ("span_text", LARGE_STEPS | TWO), ("mae_fashion_mnist", LARGE_STEPS)])
def test_depths_from_2_to_32(name, steps):
    path, slope = steepest(over_depths(name, True, (2, 4, 8, 16, 32), 8, steps))
    assert abs(slope) < FLAT, path
    assert abs(steepest(over_depths(name, False, (2, 4, 8, 16, 32), 2, steps))[1]) > FLAT


@pytest.fixture
def growths(monkeypatch):
    """What the optimizers that are made are told."""
    told, make = {}, optim.make

    @functools.wraps(make)
    def noting(*, growth, **options):
        told.update(growth or {})
        return make(growth=growth, **options)

    monkeypatch.setattr(optim, "make", noting)
    return told


@pytest.mark.parametrize("name", [name for name, conf in CONFIGS.items() if "width" in conf.model])
def test_growth_of_fan_in_and_fan_out_is_that_of_the_size(name, growths):
    """Of every parameter of every objective, against the shapes of the network and of its base."""
    def shapes(width, **changes):
        built = experiment(name, {"model.width": width, **changes})
        with jax.set_mesh(built.mesh):
            return state.abstract(built.objective, built.optimizer, 0, first_batch(built)).params

    width = CONFIGS[name].model.width
    small, large = shapes(width // 2), shapes(width, **{"model.base": {"width": width // 2}})
    is_growth = lambda x: isinstance(x, Growth)  # noqa: E731
    sizes = jax.tree.map(lambda g, x, y: (g.i * g.o, x.size / y.size), growths, large, small, is_leaf=is_growth)
    assert all(grown == size for grown, size in jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple)))
    found = {(g.i, g.o, g.r) for g in jax.tree.leaves(growths, is_leaf=is_growth)}
    assert found >= {(1, 2, 1), (2, 2, 1)}


def test_growth_is_told_of_every_weight(growths):
    """Grouped queries with as many keys and values as before, an MLP twice as wide as the residual stream grows."""
    conf = CONFIGS["causal_text"].copy_and_resolve_references()
    conf.mesh = dict(data=1)
    conf.model.update(width=128, heads=4, kv_heads=2, hidden=256, depth=6, scan=False, tied=False, norm="rms",
                      bias=False, qk_norm=True, base=dict(width=32, heads=2, hidden=128, depth=3))
    build(conf, jax.devices()[:1])
    block = growths["stack"]["block_5"]
    # K is 32 from 16, and two groups have keys and values of it.
    assert growths["tokens"]["embedding"] == growths["head"]["kernel"] == growths["norm"]["scale"] == Growth(1, 4, 1)
    assert block["attention"]["q"]["kernel"] == Growth(4, 4, 2) == block["attention"]["out"]["kernel"]
    assert block["attention"]["kv"]["kernel"] == Growth(4, 2, 2)
    assert block["mlp"]["up"]["kernel"] == Growth(4, 2, 2) and block["mlp"]["down"]["kernel"] == Growth(2, 4, 2)
    assert block["attention"]["q_norm"]["scale"] == Growth(1, 2, 2)


def test_what_makes_less_than_it_sums_is_born_smaller():
    objective, _ = mup.parametrized(tower(256), tower(64), BATCH)
    params = objective.init(jax.random.key(0), BATCH)[0]
    plain = tower(256).init(jax.random.key(0), BATCH)[0]
    np.testing.assert_allclose(params["last"]["kernel"], plain["last"]["kernel"] / 2, rtol=1e-6)
    for name in plain.keys() - {"last"}:
        jax.tree.map(np.testing.assert_array_equal, params[name], plain[name])


def scaled(params, factors):
    """Parameters, those whose path ends so times a factor."""
    def one(path, x):
        name = "/".join(key.key for key in path)
        return math.prod((f for end, f in factors.items() if name.endswith(end)), start=x)

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("query", ["q/kernel", "q_norm/scale"])
def test_a_network_in_mup_is_the_same_one_with_other_weights(query):
    """K is 32 from 8, the width 64 from 16, the depth 3 from 1."""
    options = dict(vocab_size=11, max_length=8, width=64, depth=3, heads=2, bias=False, qk_norm=query == "q_norm/scale",
                   dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 11, (2, 8))
    plain = transformer.make(**options)
    parametrized = transformer.make(**options, base=dict(width=16, depth=1))
    params = jax.jit(plain.init, static_argnums=2)(KEY, tokens, "causal")
    factors = {query: 0.5, "attention/out/kernel": 1 / 3, "mlp/down/kernel": 1 / 3}
    one, other = (jax.jit(model.apply, static_argnums=2) for model in (parametrized, plain))
    expected = other(scaled(params, factors), tokens, "causal") / 4
    np.testing.assert_allclose(one(params, tokens, "causal"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_rates_decay_and_epsilon_are_those_of_the_published_table(optimizer):
    """Against optax with hyper-parameters of its own for each weight (Dey et al. 2025, table 1)."""
    growth = {"kernel": Growth(4.0, 8.0, 2.0), "bias": Growth(1.0, 8.0, 2.0), "embedding": Growth(1.0, 4.0, 1.0)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=5).astype(np.float32) for name in growth}
    options = dict(optimizer=optimizer, schedule="constant", weight_decay=0.1)
    tx = optim.make(steps=3, learning_rate=1e-2, growth=growth, **options).tx
    opt_state, now = tx.init(params), params
    lone = {}
    for name, g in growth.items():
        own = dict(weight_decay=0.1 * g.i if name != "bias" else 0.0)
        lone[name] = (optax.adamw(1e-2 / g.i, 0.9, 0.999, eps=1e-8 / (g.o * g.r), **own) if optimizer == "adamw"
                      else optax.lion(1e-2 / g.i, 0.9, 0.999, **own))
    states, expected = {name: tx.init(params[name]) for name, tx in lone.items()}, dict(params)
    for _ in range(3):
        grads = {name: 1e-8 * rng.normal(size=5).astype(np.float32) for name in growth}  # as small as epsilon
        updates, opt_state = tx.update(grads, opt_state, now)
        now = optax.apply_updates(now, updates)
        for name in growth:
            update, states[name] = lone[name].update(grads[name], states[name], expected[name])
            expected[name] = expected[name] + update
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), now, expected)


def steps_of(built, n=3):
    """Parameters after a few steps, on the host."""
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        current = state.create(built.objective, built.optimizer, 0, batch)
        step = train.train_step(built.objective, built.optimizer, 0)
        for _ in range(n):
            current, _ = step(current, batch)
        return jax.device_get(current.params)


def test_a_network_that_is_its_own_base_trains_as_without_one():
    jax.tree.map(np.testing.assert_array_equal, steps_of(experiment_on("quickstart", base={})),
                 steps_of(experiment_on("quickstart")))


def test_it_does_not_depend_on_the_mesh():
    """Moved so far by a rate, not by a sign that rounding decides."""
    sharded, alone = (steps_of(experiment_on("quickstart", shape, base=dict(width=16, heads=1, depth=1)), 1)
                      for shape in (MESHES["2x2x2"], (1, 1, 1)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), sharded, alone)


@pytest.mark.parametrize("name, base, words", [
    ("causal_text", dict(widht=32), r"unknown key config\.model\.base\.widht: did you mean 'width'"),
    ("causal_text", dict(tied=False), r"unknown key config\.model\.base\.tied"),
    ("causal_text", dict(width=0), r"config\.model\.base\.width is 0; it takes a positive integer"),
    ("span_text", dict(width=33), r"model\.base\.width=33 does not divide into model\.base\.heads=2 heads"),
    ("simclr_fashion_mnist", dict(stages=(1, 1)), r"config\.model\.base\.stages=\(1, 1\) must be as many as"),
])
def test_a_base_that_cannot_be_is_refused(name, base, words):
    with pytest.raises(UserError, match=words):
        experiment(name, {"model.base": base})


def test_nothing_is_computed_for_a_network_that_no_machine_here_could_hold():
    """Llama-2-70B's shape, tuned at an eighth of its width."""
    conf = config_module(next(path for path in PODS if path.stem == "causal_70b")).get_config()
    conf.model.base = dict(width=1024, heads=8, kv_heads=1, hidden=3584, depth=20)
    step = aot.step_of(conf, jax.devices())
    assert step.current.params["stack"]["blocks"]["mlp"]["up"]["kernel"].shape == (80, 8192, 2, 28_672)
