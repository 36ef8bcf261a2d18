"""What every objective promises, whatever it computes: a new file in sslx/objectives with a config is tested as it is.

Sharded is unsharded, in loss, gradient and aux; the loss falls; a step keeps the types of the state; features are
frozen; FLOPs do not depend on the mesh; micro-batches add up; a checkpoint moves between meshes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiments import BATCH, CONFIGS, MESHES, OBJECTIVES, abstract_state, experiment, first_batch

from sslx import state, train
from sslx.checkpoint import Checkpoints
from sslx.config import UserError
from sslx.objectives import Objective
from sslx.sharding import make_mesh, spec

STEPS = 15

@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Tiny programs that run a few times: most of the time would go into optimizing them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


every_config = pytest.mark.parametrize("name", CONFIGS)
every_mesh = pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)


def leaves(tree):
    """{path: array on the host}"""
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def difference(tree, reference):
    """The largest relative difference of a leaf, |x - r| / |r|, and its path; what is rounding only counts as zero."""
    ours, theirs = leaves(tree), leaves(reference)
    assert ours.keys() == theirs.keys()
    scale = 1e-7 * np.sqrt(sum(np.square(r, dtype=np.float64).sum() for r in theirs.values()))

    def relative(x, r):
        return np.linalg.norm(np.subtract(x, r, dtype=np.float64)) / max(np.linalg.norm(r), scale, 1e-30)

    return max(((relative(ours[path], theirs[path]), path) for path in ours), default=(0.0, "nothing"))


@functools.cache
def first_gradient(name, shape):
    """(params, loss, aux, metrics, gradient) of a config on a mesh, on the host.

    Zeros and ones that weights begin with would hide gradients, so all have noise added; and the objective has seen
    one batch before, so that its aux is what a step made of it.
    """
    built = experiment(name, shape)

    def jittered(path, x):
        key = jax.random.fold_in(jax.random.key(1), hash_of(path))
        return x + 0.05 * jax.random.normal(key, x.shape, out_sharding=jax.typeof(x).sharding)

    def gradient(batch):
        born = state.create(built.objective, built.optimizer.tx, 0, batch)
        params = jax.tree_util.tree_map_with_path(jittered, born.params)
        aux = built.objective.loss(params, born.aux, batch, jax.random.key(2))[1][0]
        grad_of = jax.value_and_grad(built.objective.loss, has_aux=True)
        (loss, (aux, metrics)), grads = grad_of(params, aux, batch, jax.random.key(3))
        return params, loss, aux, metrics, grads

    with jax.set_mesh(built.mesh):
        return jax.device_get(jax.jit(gradient)(first_batch(built)))


def hash_of(path):
    return sum(i * byte for i, byte in enumerate(jax.tree_util.keystr(path).encode(), 1)) % 2**31


def test_every_objective_has_a_config():
    assert {conf.objective.name for conf in CONFIGS.values()} == set(OBJECTIVES)


@every_config
@every_mesh
def test_sharded_is_unsharded(name, shape):
    params, loss, aux, metrics, grads = first_gradient(name, shape)
    params_1, loss_1, aux_1, metrics_1, grads_1 = first_gradient(name, (1, 1, 1))
    worst = dict(params=difference(params, params_1), aux=difference(aux, aux_1), grads=difference(grads, grads_1))
    np.testing.assert_allclose(loss, loss_1, rtol=1e-5)
    assert metrics["tokens"] == metrics_1["tokens"] > 0
    assert worst["params"][0] < 1e-6, worst
    assert worst["aux"][0] < 1e-5, worst
    assert worst["grads"][0] < 1e-4, worst


@pytest.mark.parametrize("name", ["causal_text", "mlm_text", "span_text", "moe_text"])
def test_sharded_over_context_is_unsharded(name):
    test_sharded_is_unsharded(name, (2, 1, 2, 2))


@pytest.mark.parametrize("name, shape", [("causal_text", (1, 2, 1, 4)), ("moe_text", (1, 1, 2, 4))])
def test_sharded_over_long_context_is_unsharded(name, shape):
    test_sharded_is_unsharded(name, shape)


@pytest.mark.parametrize("shape", [(2, 2, 1, 1, 2), (1, 1, 2, 1, 4)], ids=["2x2x1x1x2", "1x1x2x1x4"])
def test_sharded_over_experts_is_unsharded(shape):
    test_sharded_is_unsharded("moe_text", shape)


def test_context_that_does_not_divide_is_refused():
    """Patches and a class token are an odd number."""
    with pytest.raises(UserError, match="mesh.context=2 does not divide a sequence of"):
        first_gradient("dino_fashion_mnist", (1, 1, 1, 2))


@every_config
def test_gradient_reaches_every_parameter(name):
    *_, grads = first_gradient(name, (1, 1, 1))
    for path, gradient in leaves(grads).items():
        assert np.isfinite(gradient).all() and gradient.any(), path


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request):
    """(config name, experiment on 2x2x2, batch, state at step 0, state after STEPS on the batch, metrics, step)."""
    built = experiment(request.param, MESHES["2x2x2"])
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        start = abstract_state(built, batch)
        current = jax.jit(lambda batch: state.create(built.objective, built.optimizer.tx, 0, batch))(batch)
        step = train.train_step(built.objective, built.optimizer.tx, 0)
        metrics = []
        for _ in range(STEPS):
            current, measured = step(current, batch)
            metrics.append(jax.device_get(measured))
        yield request.param, built, batch, start, current, metrics, step


def test_loss_falls_on_a_fixed_batch(trained):
    """For the same draws and the same aux, the first: what aux carries (a teacher, a centre) moves the loss as well."""
    _, built, batch, _, current, metrics, _ = trained
    assert np.isfinite([m["grad_norm"] for m in metrics]).all()
    born = jax.jit(lambda batch: state.create(built.objective, built.optimizer.tx, 0, batch))(batch)
    loss = jax.jit(lambda params, key: built.objective.loss(params, born.aux, batch, key)[0])
    keys = [jax.random.key(i) for i in range(3)]
    before, after = ([float(loss(params, key)) for key in keys] for params in (born.params, current.params))
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
    alone = experiment(name)
    with jax.set_mesh(alone.mesh):
        batch_1 = first_batch(alone)
        unsharded = train.count_flops(alone.objective, abstract_state(alone, batch_1), batch_1)
    assert sharded == unsharded
    assert sharded.hw_total >= sharded.model_total > 0


def test_tokens_of_micro_batches_add_up(trained):
    """Tokens of a step are those of its rows, however it is cut."""
    _, built, batch, start, current, metrics, _ = trained

    @functools.partial(jax.jit, static_argnums=1)
    def tokens(current, accumulate):
        key = jax.random.key(0)
        return train.gradient(built.objective, current.params, current.aux, batch, key, accumulate)[2]["tokens"]

    assert tokens(current, 2) == metrics[0]["tokens"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)], ids=["1x1x1", "1x8x1"])
def test_checkpoint_moves_to_another_mesh(trained, tmp_path, shape):
    name, _, _, _, current, _, _ = trained
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(current)
    saved.close()
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
    built = experiment(name, MESHES["2x2x2"])
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)

        @functools.partial(jax.jit, static_argnums=1)
        def gradient(batch, accumulate):
            params, aux = built.objective.init(jax.random.key(0), batch)
            grads, _, metrics = train.gradient(built.objective, params, aux, batch, jax.random.key(1), accumulate)
            return grads, metrics

        (whole, metrics_1), (parts, metrics_2) = jax.device_get((gradient(batch, 1), gradient(batch, 2)))
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
    rng = np.random.default_rng(1)
    mesh = experiment_mesh(MESHES["8x1x1"])
    with jax.set_mesh(mesh):
        rows = {"x": rng.normal(size=(8, 5)).astype(np.float32), "y": rng.normal(size=(8, 3)).astype(np.float32)}
        batch = jax.device_put(rows, jax.sharding.NamedSharding(mesh, spec("batch")))
        current = jax.jit(lambda batch: state.create(objective, tx, 0, batch))(batch)
        params, opt_state = jax.tree.map(jnp.copy, (current.params, current.opt_state))
        step = train.train_step(objective, tx, 0)
        for _ in range(2):
            grads = jax.grad(lambda p: objective.loss(p, {"calls": 0}, batch, None)[0])(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            current, _ = step(current, batch)
        np.testing.assert_allclose(current.params["kernel"], params["kernel"], rtol=1e-6)
        assert (current.step, current.aux["calls"]) == (2, 2)
