"""What every objective promises, whatever it computes: a new file in sslx/objectives with a config is tested as it is.

Sharded is unsharded, in loss, gradient and aux; the loss falls; a step keeps the types of the state; features are
frozen; FLOPs do not depend on the mesh; micro-batches add up; a checkpoint moves between meshes.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiments import (
    AXES,
    BATCH,
    CONFIGS,
    FILES,
    MESHES,
    OBJECTIVES,
    abstract_state,
    axes,
    config_module,
    experiment,
    first_batch,
    meshes,
)

from sslx import config, optim, state, train
from sslx.checkpoint import Checkpoints
from sslx.config import UserError
from sslx.experiment import build
from sslx.objectives import Objective
from sslx.sharding import make_mesh, spec

STEPS = 15
ALONE, MESH = (1, 1, 1, 1, 1), (2, 2, 2, 1, 1)

every_config = pytest.mark.parametrize("name", CONFIGS)
every_mesh = pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)

EVERY_AXIS = [(name, shape) for name, conf in CONFIGS.items() for shape in meshes(conf)]
LONE_AXIS = [(name, shape) for name in CONFIGS for shape in ((8,), (1, 8))]
LONG_AXIS = [("causal_text", (1, 2, 1, 4)), ("mlm_text", (2, 1, 2, 2)), ("span_text", (2, 1, 2, 2)),
             ("moe_text", (1, 1, 2, 4)), ("moe_text", (2, 2, 1, 1, 2)), ("moe_text", (1, 1, 2, 1, 4))]


def leaves(tree):
    """{path: array on the host}"""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def difference(tree, reference):
    """The largest relative difference of a leaf, |x - r| / |r|, and its path; what is rounding only counts as zero.

    A running mean, which is zero of features that are centred, is compared on the scale of their standard deviation.
    """
    ours, theirs = leaves(tree), leaves(reference)
    assert ours.keys() == theirs.keys()
    scale = 1e-7 * np.sqrt(sum(np.square(r, dtype=np.float64).sum() for r in theirs.values()))

    def size(path):
        deviation = np.sqrt(theirs[path.replace("['mean']", "['var']")]) if path.endswith("['mean']") else 0
        return max(np.linalg.norm(theirs[path]), np.linalg.norm(deviation), scale, 1e-30)

    def relative(path):
        return np.linalg.norm(np.subtract(ours[path], theirs[path], dtype=np.float64)) / size(path)

    return max(((relative(path), path) for path in ours), default=(0.0, "nothing"))


@functools.cache
def born(name, shape):
    """(experiment, batch, state at step 0) of a config on a mesh."""
    built = experiment(name, shape)
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        return built, batch, jax.jit(lambda batch: state.create(built.objective, built.optimizer, 0, batch))(batch)


def jittered(path, x):
    """Zeros and ones that weights begin with would hide gradients, so all have noise added."""
    noise = np.random.default_rng(list(jax.tree_util.keystr(path).encode())).normal(scale=0.05, size=x.shape)
    return jax.device_put(np.asarray(x) + noise.astype(x.dtype), x.sharding)


@functools.cache
def first_gradient(name, shape):
    """(params, loss, aux, metrics, gradient) of a config on a mesh, on the host.

    The objective has seen the batch before, so that its aux is what a step made of it.
    """
    built, batch, start = born(name, shape)

    @jax.jit
    def gradient(params, aux, batch, key):
        (loss, (new, metrics)), grads = jax.value_and_grad(built.objective.loss, has_aux=True)(params, aux, batch, key)
        return loss, train.lying_as(new, aux), metrics, grads

    with jax.set_mesh(built.mesh):
        params = jax.tree_util.tree_map_with_path(jittered, start.params)
        _, aux, *_ = gradient(params, start.aux, batch, jax.random.key(2))
        return jax.device_get((params, *gradient(params, aux, batch, jax.random.key(3))))


def test_every_objective_has_a_config():
    assert {conf.objective.name for conf in CONFIGS.values()} == set(OBJECTIVES)


def test_every_objective_is_tested_on_every_axis_it_supports():
    tested = {(name, axis) for name, shape in EVERY_AXIS for axis, n in zip(AXES, shape, strict=True) if n > 1}
    assert tested == {(name, axis) for name, conf in CONFIGS.items() for axis in axes(conf)}
    everywhere, text = {"data", "fsdp", "tensor"}, {"causal_lm", "masked_lm", "span_corruption"}
    for name in OBJECTIVES:
        of_objective = {axis for config, axis in tested if CONFIGS[config].objective.name == name}
        assert of_objective >= everywhere and (name not in text or "context" in of_objective), name
    assert any(axis == "expert" for _, axis in tested)


def mesh_id(part):
    return part if isinstance(part, str) else "x".join(map(str, part))


@pytest.mark.parametrize("name, shape", EVERY_AXIS, ids=mesh_id)
def test_sharded_is_unsharded(name, shape):
    params, loss, aux, metrics, grads = first_gradient(name, shape)
    params_1, loss_1, aux_1, metrics_1, grads_1 = first_gradient(name, ALONE)
    worst = dict(params=difference(params, params_1), aux=difference(aux, aux_1), grads=difference(grads, grads_1))
    np.testing.assert_allclose(loss, loss_1, rtol=1e-5)
    assert metrics["tokens"] == metrics_1["tokens"] > 0
    assert worst["params"][0] < 1e-6, worst
    assert worst["aux"][0] < 1e-5, worst
    assert worst["grads"][0] < 1e-4, worst


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", LONE_AXIS + LONG_AXIS, ids=mesh_id)
def test_sharded_over_more_devices_of_an_axis_is_unsharded(name, shape):
    test_sharded_is_unsharded(name, shape)


def test_context_that_does_not_divide_is_refused():
    """Patches and a class token are an odd number."""
    with pytest.raises(UserError, match="mesh.context=2 does not divide a sequence of"):
        born("dino_fashion_mnist", (1, 1, 1, 2))


@every_config
def test_gradient_reaches_every_parameter(name):
    *_, grads = first_gradient(name, ALONE)
    for path, gradient in leaves(grads).items():
        assert np.isfinite(gradient).all() and gradient.any(), path


def copied(tree):
    """The same arrays in other memory: a step takes that of its state."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), tree)


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request):
    """(config name, experiment on 2x2x2, batch, state at step 0, state after STEPS on the batch, metrics, step)."""
    built, batch, start = born(request.param, MESH)
    with jax.set_mesh(built.mesh):
        current = copied(start)
        step = train.train_step(built.objective, built.optimizer, 0)
        metrics = []
        for _ in range(STEPS):
            current, measured = step(current, batch)
            metrics.append(jax.device_get(measured))
        yield request.param, built, batch, start, current, metrics, step


def test_loss_falls_on_a_fixed_batch(trained):
    """For the same draws and the same aux, the first: what aux carries (a teacher, a centre) moves the loss as well."""
    _, _, batch, start, current, metrics, step = trained
    assert np.isfinite([m["grad_norm"] for m in metrics]).all()

    def loss(params, i):
        at_step = jax.device_put(np.int32(i), start.step.sharding)
        return float(step(copied(start._replace(params=params, step=at_step)), batch)[1]["loss"])

    before, after = ([loss(params, i) for i in range(3)] for params in (start.params, current.params))
    assert np.mean(after) < np.mean(before), (before, after)


def test_step_keeps_the_types_of_the_state(trained):
    """Shapes, dtypes and shardings: otherwise the second step is compiled anew, or the weights are whole somewhere."""
    *_, start, current, metrics, step = trained
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(current), strict=True):
        where = jax.tree_util.keystr(path)
        assert (new.shape, new.dtype) == (old.shape, old.dtype), where
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim), where
    assert step._cache_size() == 1
    assert current.step == STEPS
    assert state.exact(np.asarray(current.tokens)) == sum(int(m["tokens"]) for m in metrics)


def test_features_are_frozen(trained):
    """Float32 [B, D], finite, and a row's features do not depend on the other rows of its batch."""
    _, built, batch, _, current, _, _ = trained
    encode = jax.jit(built.objective.encode)

    def crowded(x):
        rows = np.asarray(x)
        return jax.device_put(np.concatenate([rows[:BATCH // 2], rows[:1].repeat(BATCH // 2, 0)]), x.sharding)

    features = encode(current.params, current.aux, batch)
    among_others = encode(current.params, current.aux, jax.tree.map(crowded, batch))
    assert features.ndim == 2 and len(features) == BATCH and features.dtype == jnp.float32
    features, among_others = np.asarray(features), np.asarray(among_others)
    assert np.isfinite(features).all() and features.std(0).max() > 0
    np.testing.assert_allclose(among_others[:BATCH // 2], features[:BATCH // 2], rtol=1e-5, atol=1e-6)


def test_flops_do_not_depend_on_the_mesh(trained):
    name, built, batch, start, *_ = trained
    sharded = train.count_flops(built.objective, start, batch)
    alone, batch_1, start_1 = born(name, ALONE)
    with jax.set_mesh(alone.mesh):
        unsharded = train.count_flops(alone.objective, start_1, batch_1)
    assert sharded == unsharded
    assert sharded.hw_total >= sharded.model_total > 0


@pytest.mark.parametrize("path", [path for path in FILES if ":digits" in path.read_text()], ids=lambda path: path.stem)
def test_the_variant_that_needs_nothing_installed_traces(path):
    conf = config_module(path).get_config("digits")
    conf.evals = {}
    built = build(conf, jax.devices()[:1])
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        assert train.count_flops(built.objective, abstract_state(built, batch), batch).model_total > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_config_derives_from_its_steps_a_sweep_does_too(path):
    """The fields of objective and optimizer that are shares of `steps` are of the type that says so."""
    sections = path.read_text().partition("config.run =")[0]
    derived = set(re.findall(r"(\w+)=[^,()=]*\bsteps\b", sections)) - {"steps"}
    makes = [config.load("objectives", config_module(path).get_config("").objective.name), optim.make]
    assert derived <= {name for make in makes for name in config.fields(make, config.Steps)}


def test_tokens_of_micro_batches_add_up(trained):
    """Tokens of a step are those of its rows, however it is cut."""
    _, built, batch, _, current, metrics, _ = trained

    @functools.partial(jax.jit, static_argnums=1)
    def tokens(current, accumulate):
        key = jax.random.key(0)
        return train.gradient(built.objective, current.params, current.aux, batch, key, accumulate)[2]["tokens"]

    assert tokens(current, 2) == metrics[0]["tokens"]


def test_checkpoint_moves_to_another_mesh(trained, tmp_path):
    name, _, _, _, current, _, _ = trained
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(current)
    saved.close()
    for shape in (ALONE, MESHES["1x8x1"]):
        other = experiment(name, shape)
        with jax.set_mesh(other.mesh):
            abstract = abstract_state(other, first_batch(other))
            opened = Checkpoints(tmp_path, keep=1)
            restored = opened.restore(STEPS, abstract)
            opened.close()
        jax.tree.map(lambda new, wanted: np.testing.assert_equal(new.sharding, wanted.sharding), restored, abstract)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(current))


def mean_over_rows() -> Objective:
    """Least squares with a linear map: a mean over rows without random numbers, that counts its calls in aux."""

    def init(key, batch):
        return {"kernel": jax.random.normal(key, (5, 3))}, {"calls": jnp.int32(0)}

    def loss(params, aux, batch, key):
        value = jnp.square(jnp.sin(batch["x"] @ params["kernel"]) - batch["y"]).mean()
        return value, ({"calls": aux["calls"] + 1}, {"loss": value, "tokens": jnp.int32(len(batch["x"]))})

    return Objective(init, loss, lambda params, aux, batch: batch["x"] @ params["kernel"])


@pytest.mark.parametrize("accumulate", [2, 4])
@every_mesh
def test_accumulation_is_the_gradient_of_the_whole_batch(accumulate, shape):
    """For a mean over rows. Aux passes through the micro-batches in turn."""
    rng = np.random.default_rng(0)
    rows = 8 * accumulate
    x, y = rng.normal(size=(rows, 5)).astype(np.float32), rng.normal(size=(rows, 3)).astype(np.float32)
    objective, mesh = mean_over_rows(), experiment_mesh(shape)
    with jax.set_mesh(mesh):
        batch = jax.device_put({"x": x, "y": y}, jax.sharding.NamedSharding(mesh, spec("batch")))
        params, aux = objective.init(jax.random.key(0), batch)

        @functools.partial(jax.jit, static_argnums=0)
        def gradient(n):
            return train.gradient(objective, params, aux, batch, jax.random.key(1), n)

        (whole, aux_1, metrics_1), (parts, aux_n, metrics_n) = jax.device_get((gradient(1), gradient(accumulate)))
        kernel = np.asarray(params["kernel"], np.float64)
    by_hand = x.T @ (2 * (np.sin(x @ kernel) - y) * np.cos(x @ kernel)) / y.size
    np.testing.assert_allclose(whole["kernel"], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts["kernel"], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics_n["loss"], metrics_1["loss"], rtol=1e-5)
    assert metrics_n["tokens"] == metrics_1["tokens"] == rows
    assert (aux_1["calls"], aux_n["calls"]) == (1, accumulate)


def experiment_mesh(shape):
    return make_mesh(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))


def test_accumulation_of_a_language_model_on_a_mesh():
    """Causal language modelling draws nothing, and all its rows have as many tokens."""
    name = next(name for name, conf in CONFIGS.items() if conf.objective.name == "causal_lm")
    _, _, _, metrics_1, whole = first_gradient(name, MESH)
    built, batch, start = born(name, MESH)

    @jax.jit
    def gradient(params, aux, batch):
        return train.gradient(built.objective, params, aux, batch, jax.random.key(1), 2)

    with jax.set_mesh(built.mesh):
        params = jax.tree_util.tree_map_with_path(jittered, start.params)
        parts, _, metrics_2 = jax.device_get(gradient(params, start.aux, batch))
    assert difference(parts, whole)[0] < 1e-4
    np.testing.assert_allclose(metrics_2["loss"], metrics_1["loss"], rtol=1e-5)
    assert metrics_2["tokens"] == metrics_1["tokens"]


@pytest.mark.parametrize("start", [0, 2**31 - 1, 2**32 - 1, 2**32, 2**53, 2**63 - 5])
@pytest.mark.parametrize("n", [0, 1, 2**20 + 1, 2**31 - 1])
def test_counter_is_exact_beyond_32_bits(start, n):
    counter = jnp.array([start >> 32, start & 0xFFFFFFFF], jnp.uint32)
    add = jax.jit(state.add_exactly)
    for times in range(1, 4):
        counter = add(counter, jnp.int32(n))
        assert state.exact(np.asarray(counter)) == start + times * n


def test_gradient_of_a_step_is_clipped_and_applied_as_optax_does():
    """The step is nothing but gradient, update and aux: compared with optax by hand over two steps."""
    objective, tx = mean_over_rows(), optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))
    optimizer = optim.make(steps=2, learning_rate=0.01, schedule="constant", clip=0.1)
    rng = np.random.default_rng(1)
    mesh = experiment_mesh(MESHES["8x1x1"])
    with jax.set_mesh(mesh):
        rows = {"x": rng.normal(size=(8, 5)).astype(np.float32), "y": rng.normal(size=(8, 3)).astype(np.float32)}
        batch = jax.device_put(rows, jax.sharding.NamedSharding(mesh, spec("batch")))
        current = jax.jit(lambda batch: state.create(objective, optimizer, 0, batch))(batch)
        params = jax.tree.map(jnp.copy, current.params)
        opt_state = tx.init(params)
        step = train.train_step(objective, optimizer, 0)
        for _ in range(2):
            grads = jax.grad(lambda p: objective.loss(p, {"calls": 0}, batch, None)[0])(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            current, _ = step(current, batch)
        np.testing.assert_allclose(current.params["kernel"], params["kernel"], rtol=1e-6)
        assert (current.step, current.aux["calls"]) == (2, 2)
