"""Layers against plain NumPy, and the identities that hold between their variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx import convolution, flops, kernels, layers
from sslx.config import UserError
from sslx.sharding import batch_sharding, make_mesh, spec

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


PREFIX = np.array([0, 4])
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])


def sees(mask, packed, b, t, s):
    """Whether query t of row b may look at key s."""
    by_mask = {"bidirectional": True, "causal": s <= t, "prefix": s <= t or s < PREFIX[b]}[mask]
    return by_mask and (not packed or SEGMENTS[b, t] == SEGMENTS[b, s])


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("G, R, parts", [(2, 1, 1), (1, 3, 1), (2, 2, 1), (2, 1, 3), (2, 2, 2)])
def test_attention(mask, packed, G, R, parts, monkeypatch):
    monkeypatch.setattr(kernels, "causal_parts", lambda platform, T: parts)
    B, T, K = 2, 6, 4
    q, bias = normal(B, T, G, R, K), normal(G, R, T, T, seed=3)
    k, v = normal(B, T, G, K, seed=1), normal(B, T, G, K, seed=2)
    expected = np.empty((B, T, G, R, K))
    for b, t, g, r in np.ndindex(B, T, G, R):
        keys = [s for s in range(T) if sees(mask, packed, b, t, s)]
        expected[b, t, g, r] = softmax(k[b, keys, g] @ q[b, t, g, r] / 2 + bias[g, r, t, keys]) @ v[b, keys, g]
    got = layers.attention(q, k, v, mask=mask, prefix_B=jnp.asarray(PREFIX) if mask == "prefix" else None,
                           segments=(SEGMENTS, SEGMENTS) if packed else None, bias_GRTS=bias)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_causal_parts_leave_out_hidden_products_and_change_no_result(monkeypatch):
    q, k, v = normal(2, 8, 2, 3, 4), normal(2, 8, 2, 4, seed=1), normal(2, 8, 2, 4, seed=2)
    found = {}
    for parts in (1, 4):
        monkeypatch.setattr(kernels, "causal_parts", lambda platform, T, parts=parts: parts)
        gradient = jax.value_and_grad(lambda *qkv: jnp.square(layers.attention(*qkv, mask="causal")).sum(), (0, 1, 2))
        found[parts] = gradient(q, k, v), flops.count(gradient, q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *(found[n][0] for n in (1, 4)))
    whole, cut = found[1][1], found[4][1]
    assert (cut.model_total, cut.full_total) == (whole.model_total, whole.full_total)
    assert cut.hw_total == whole.hw_total * 5 // 8


@pytest.mark.parametrize("middle", [(), (2,), (2, 3)])
def test_rope_turns_complex_numbers(middle):
    x, positions = normal(2, 5, *middle, 8), np.array([[0, 1, 2, 3, 4], [7, 0, 3, 100, 2]])
    z = x[..., :4] + 1j * x[..., 4:]
    angle = positions.reshape(2, 5, *(1 for _ in middle), 1) * 10_000.0 ** (-np.arange(4) / 4)
    turned = z * np.exp(1j * angle)
    got = layers.rope(jnp.asarray(x), positions)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-4)


def test_rope_products_depend_on_distance_alone():
    q, k = normal(1, 1, 8), normal(1, 1, 8, seed=1)

    def product(t, s):
        turned_q, turned_k = (layers.rope(jnp.asarray(x), np.array([[at]])) for x, at in ((q, t), (k, s)))
        return float((turned_q * turned_k).sum())

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(kind):
    x, g, b = 3 + 2 * normal(2, 3, 8), normal(8, seed=1), normal(8, seed=2)
    params = {"scale": g, "bias": b} if kind == "layer" else {"scale": g}
    if kind == "layer":
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * g + b
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * g
    norm = layers.Norm(kind)
    np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, norm.init(KEY, x)["params"]) == dict.fromkeys(params, (8,))
    half = norm.apply({"params": params}, jnp.bfloat16(x))
    assert half.dtype == jnp.bfloat16 and np.abs(np.float32(half) - expected).max() < 0.1


@pytest.mark.parametrize("shape", [(16, 3), (4, 2, 2, 3)])
def test_batch_norm_trains_on_the_batch_and_judges_by_the_running_statistics(shape):
    x, axes = 1 + 2 * normal(*shape), tuple(range(len(shape) - 1))
    stats = {"mean": normal(3, seed=1), "var": np.exp(normal(3, seed=2))}
    params = {"scale": normal(3, seed=3), "bias": normal(3, seed=4)}
    variables = {"params": params, "batch_stats": stats}
    norm = layers.BatchNorm()
    y, moved = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean(axes), x.var(axes)
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, value in (("mean", mean), ("var", var)):
        np.testing.assert_allclose(moved["batch_stats"][name], 0.9 * stats[name] + 0.1 * value, rtol=1e-4)
    still = norm.apply(variables, x, train=False)
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(still, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_is_born_with_the_statistics_of_its_first_batch():
    x = 1 + 2 * normal(16, 3)
    stats = layers.BatchNorm().init(KEY, x, train=True)["batch_stats"]
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], x.var(0), rtol=1e-4)


def test_batch_norm_of_a_batch_over_eight_devices_is_that_of_one():
    x = normal(16, 2, 3) + np.arange(16)[:, None, None]  # every device has another mean
    norm = layers.BatchNorm()

    def loss(x):
        y, stats = norm.apply(norm.init(KEY, x, train=True), x, train=True, mutable=["batch_stats"])
        return (y**3).sum(), (y, stats)

    results = []
    for n in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:n])
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, batch_sharding(mesh))
            results.append(jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(sharded)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


@pytest.mark.parametrize("n_in, features, axes", [(1, 5, ("embed", "hidden")), (1, (2, 3), ("embed", None, "hidden")),
                                                  (2, 5, ("heads", None, "embed"))])
def test_linear(n_in, features, axes):
    x = normal(2, 3, 4, 6)
    linear = layers.Linear(features, axes, n_in)
    params = linear.init(KEY, x)["params"] | {"bias": normal(*np.atleast_1d(features), seed=1)}
    expected = np.tensordot(x, params["kernel"], n_in) + params["bias"]
    np.testing.assert_allclose(linear.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_initial_kernels_have_variance_one_over_fan_in():
    for n_in, shape, scale in ((1, (64, 200), 1.0), (2, (8, 16, 200), 0.5)):
        kernel = layers.fan_in(n_in, scale)(KEY, shape, jnp.float32, None)
        fan = np.prod(shape[:n_in])
        assert float(kernel.std()) == pytest.approx(scale / np.sqrt(fan), rel=0.03)


def test_a_width_that_the_mesh_does_not_divide_is_named():
    words = r"kernel \(4, 6\) has 6 along 'hidden'"
    with jax.set_mesh(make_mesh(fsdp=2, tensor=4)), pytest.raises(UserError, match=words):
        layers.Linear(6, ("embed", "hidden")).init(KEY, normal(8, 4))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("size, kernel, stride", [(8, 7, 2), (8, 3, 1), (7, 3, 2), (8, 1, 2), (5, 1, 1),
                                                  (1, 3, 1), (2, 3, 1), (2, 7, 1), (3, 3, 2), (1, 3, 2)])
def test_conv_is_that_of_xla(size, kernel, stride, devices, monkeypatch):
    """Value and gradients; of the kernel's, which is summed over parts of the images, some are of one image."""
    monkeypatch.setattr(convolution, "CACHED", 20_000)
    conv = layers.Conv(4, kernel, stride)
    layout = dict(padding=[(kernel // 2, kernel // 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def of_xla(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), **layout)

    def value_and_gradients(f, x, w, d):
        y, back = jax.vjp(f, x, w)
        return y, *back(d)

    with jax.set_mesh(make_mesh(devices=jax.devices()[:devices])):
        x = jax.device_put(normal(4, size, size + 1, 3), spec("batch"))
        w = conv.init(KEY, x)["params"]["kernel"]
        d = jax.device_put(normal(*of_xla(np.asarray(x), np.asarray(w)).shape, seed=1), spec("batch"))
        ours = jax.jit(functools.partial(value_and_gradients, lambda x, w: conv.apply({"params": {"kernel": w}}, x)))
        found = jax.device_get(ours(x, w, d))
    for ours, theirs in zip(found, value_and_gradients(of_xla, *jax.device_get((x, w, d))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_mlp(kind):
    x = normal(2, 3, 4)
    mlp = layers.Mlp(5, kind, True, 1.0, jnp.float32)
    params = jax.tree.map(lambda w: normal(*w.shape, seed=w.size), mlp.init(KEY, x)["params"])
    h = np.tensordot(x, params["up"]["kernel"], 1) + params["up"]["bias"]
    if kind == "gelu":
        h = h * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    else:
        h = h[..., 0, :] / (1 + np.exp(-h[..., 0, :])) * h[..., 1, :]
    expected = h @ params["down"]["kernel"] + params["down"]["bias"]
    np.testing.assert_allclose(mlp.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def stack(scan=True, remat="none", kv_heads=2, memory=None):
    block = dict(heads=4, kv_heads=kv_heads, hidden=24, norm="rms", mlp="swiglu", qk_norm=True, rope=True)
    module = layers.Stack(3, block, scan, remat)
    x, positions = jax.device_put(normal(2, 5, 16), spec("batch")), jnp.arange(5)[None]

    def apply(params):
        return module.apply({"params": params}, x, memory, mask="causal", positions=positions)

    return apply, lambda: module.init(KEY, x, memory, mask="causal", positions=positions)["params"]


def unrolled(params):
    return {f"block_{i}": jax.tree.map(lambda w, i=i: w[i], params["blocks"]) for i in range(3)}


@pytest.mark.parametrize("memory", [None, normal(2, 7, 16, seed=5)], ids=["self", "cross"])
def test_scanned_and_unrolled_stacks_are_one_function(memory):
    (scanned, init), (looped, init_looped) = stack(memory=memory), stack(scan=False, memory=memory)
    params = init()
    assert jax.tree.map(jnp.shape, unrolled(params)) == jax.tree.map(jnp.shape, init_looped())
    np.testing.assert_allclose(scanned(params), looped(unrolled(params)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_neither_loss_nor_gradient(scan, remat):
    (plain, init), (saving, _) = stack(scan), stack(scan, remat)
    params = init()

    def grads(apply):
        return jax.jit(jax.value_and_grad(lambda p: (apply(p) ** 3).sum()))(params)

    assert "remat" in str(jax.make_jaxpr(saving)(params)) and "remat" not in str(jax.make_jaxpr(plain)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), grads(plain), grads(saving))


def test_grouped_queries_are_heads_that_share_keys_and_values():
    grouped, init = stack(kv_heads=2)
    full, init_full = stack(kv_heads=4)
    params = init()

    def shared(path, w):
        names = [p.key for p in path]
        if "q" in names:  # [depth, D, G, R, K] -> [depth, D, G R, 1, K]
            return np.asarray(w).reshape(*w.shape[:-3], 4, 1, w.shape[-1])
        if "kv" in names:  # [depth, D, G, 2, K] -> [depth, D, G R, 2, K]
            return np.repeat(np.asarray(w), 2, w.ndim - 3)
        if names[-2:] == ["out", "kernel"]:  # [depth, G, R, K, D] -> [depth, G R, 1, K, D]
            return np.asarray(w).reshape(3, 4, 1, *w.shape[-2:])
        return w

    params_full = jax.tree_util.tree_map_with_path(shared, params)
    assert jax.tree.map(jnp.shape, params_full) == jax.tree.map(jnp.shape, init_full())
    np.testing.assert_allclose(grouped(params), full(params_full), rtol=1e-4, atol=1e-5)


def test_an_embedding_looks_up_and_scores_with_one_table():
    embed, table = layers.Embed(7, 4), normal(7, 4)
    ids = np.array([[0, 6, 3], [2, 2, 1]])
    np.testing.assert_array_equal(embed.apply({"params": {"embedding": table}}, ids), table[ids])
    np.testing.assert_allclose(layers.scores(table[ids], table), table[ids] @ table.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [2, 3, 12])
def test_a_loss_in_chunks_is_the_loss(chunks):
    x, table, targets = normal(2, 8, 4), normal(12, 4, seed=1), np.random.default_rng(2).integers(0, 12, (2, 8))
    weights = normal(2, 8, seed=3)

    def loss(x, table, chunks):
        return (layers.nll(x, table, targets, chunks) * weights).sum()

    whole, parts = (jax.value_and_grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(table), n) for n in (1, chunks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), parts, whole)


def test_chunks_that_do_not_divide_are_named():
    with pytest.raises(UserError, match="model.loss_chunks=3"):
        layers.nll(normal(2, 8, 4), normal(7, 4), np.zeros((2, 8), int), 3)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_needed_pairs_are_those_that_are_visible(mask, window):
    seen = layers.visible(mask, np.arange(6), 6, window)
    assert layers.needed_pairs(mask, np.arange(6), 6, window) == (36 if seen is None else int(seen.sum()))
    for t, s in np.ndindex(6, 6):
        expected = (mask == "bidirectional" or s <= t) and (window is None or abs(t - s) < window)
        assert (seen is None or bool(seen[0, t, s])) == expected


def mixture(capacity, shared=0, balance=0.0):
    return layers.Experts(n=4, top_k=2, hidden=6, capacity=capacity, shared=shared, balance=balance, out_scale=1.0,
                          dtype=jnp.float32)


@pytest.mark.parametrize("capacity, shared", [(2.0, 0), (1.0, 0), (0.5, 2)])
def test_experts_take_the_tokens_that_chose_them_until_they_are_full(capacity, shared):
    B, T, D, E = 2, 8, 5, 4
    x, experts = normal(B, T, D), mixture(capacity, shared)
    params = experts.init(KEY, x)["params"]
    router, up, down = (np.asarray(p) for p in (params["router"]["kernel"], params["up"], params["down"]))

    def swiglu(x, up, down):
        gate, value = x @ up[:, 0], x @ up[:, 1]
        return (gate / (1 + np.exp(-gate)) * value) @ down

    places = min(T, int(np.ceil(capacity * 2 * T / E)))
    expected, dropped = np.zeros((B, T, D)), 0
    for b in range(B):
        p = softmax(x[b] @ router)
        order = np.argsort(-p, 1)[:, :2]
        taken = dict.fromkeys(range(E), 0)
        for k in range(2):
            for t in range(T):
                e = order[t, k]
                taken[e] += 1
                if taken[e] > places:
                    dropped += 1
                    continue
                expected[b, t] += p[t, e] / p[t, order[t]].sum() * swiglu(x[b, t], up[e], down[e])
    if shared:
        mlp = jax.tree.map(np.asarray, params["shared"])
        expected += swiglu(x, mlp["up"]["kernel"], mlp["down"]["kernel"])
    assert (dropped > 0) == (capacity < 2)
    np.testing.assert_allclose(experts.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)


def test_balance_adds_a_gradient_and_leaves_the_value():
    """That of balance * n sum f P, the shares of choices f being constants."""
    x = normal(2, 8, 5)
    params = mixture(2.0).init(KEY, x)["params"]

    def loss(params, balance):
        return jnp.square(mixture(2.0, balance=balance).apply({"params": params}, x)).sum()

    def penalty(router):
        p = jax.nn.softmax(x @ router)
        chosen = jax.nn.one_hot(jax.lax.top_k(p, 2)[1], 4).sum((0, 1, 2)) / (2 * 8 * 2)
        return 0.3 * 4 * (chosen * p.mean((0, 1))).sum()

    (plain, g_plain), (balanced, g_balanced) = (jax.value_and_grad(loss)(params, b) for b in (0.0, 0.3))
    assert plain == balanced
    added = g_balanced["router"]["kernel"] - g_plain["router"]["kernel"]
    np.testing.assert_allclose(added, jax.grad(penalty)(params["router"]["kernel"]), rtol=1e-3, atol=1e-5)
