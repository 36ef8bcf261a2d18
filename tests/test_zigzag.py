"""Zigzag: a permutation that shares causal attention evenly, and that nothing outside a stack can see."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from sslx import kernels, layers, zigzag
from sslx.sharding import make_mesh, residual, spec

MESHES = [dict(context=2), dict(context=4, tensor=2), dict(fsdp=2, context=2, tensor=2), dict(context=2, tensor=3)]


def mesh_of(**shape):
    return make_mesh(devices=jax.devices()[:int(np.prod(list(shape.values())))], data=1, **shape)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_there_and_back(shape):
    x = normal(2, 48, 3)
    with jax.set_mesh(mesh_of(**shape)):
        placed, times = jax.device_put(x, residual(48)), zigzag.times(48)
        assert not np.array_equal(times, np.arange(48))
        there = jax.jit(zigzag.scatter)(placed)
        back = jax.jit(zigzag.collect)(there)
        np.testing.assert_array_equal(there, x[:, times])
        np.testing.assert_array_equal(back, x)
        assert jax.typeof(there) == jax.typeof(back) == jax.typeof(placed)
        np.testing.assert_array_equal(zigzag.arrange(x), x[:, times])
        np.testing.assert_array_equal(zigzag.restore(x[:, times]), x)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("move", [zigzag.scatter, zigzag.collect])
def test_every_token_is_sent_once(shape, move):
    """By two exchanges of the halves of what the devices have, in the gradient as well."""
    with jax.set_mesh(mesh_of(**shape)):
        x = jax.device_put(normal(2, 48, 3), residual(48))
        half = "f32[{},{},3]".format(2 // shape.get("fsdp", 1), 48 // shape["context"] // shape.get("tensor", 1) // 2)
        for fn in (move, lambda x: jax.vjp(move, x)[1](x)):
            program = jax.jit(fn).lower(x).compile().as_text()
            moved = re.findall(r"= (\S+?)(?:\{\S*)? (all-\w+|reduce-scatter|collective-permute)\(", program)
            assert moved == [(half, "collective-permute")] * 2


@pytest.mark.parametrize("T, C, tensor", [(64, 2, 1), (64, 4, 1), (96, 4, 2)])
def test_every_device_has_as_many_visible_pairs(T, C, tensor):
    """By the times that lie on it and the mask of plain attention."""
    with jax.set_mesh(mesh_of(context=C, tensor=tensor)):
        times_1T1 = jax.device_put(np.arange(T)[None, :, None], residual(T))
        there = layers.gather_time(zigzag.scatter(times_1T1))
        pairs = [int(layers.visible("causal", np.asarray(part.data).ravel(), T).sum())
                 for part in there.addressable_shards]
        assert pairs == [T * (T + 1) // 2 // C] * (C * tensor)


def computed_blocks(times_T, heads=2):
    """How many blocks splash computes on each device of `context`: (forward, backward)."""
    attend = kernels.splash_kernel(times_T, len(times_T), heads, causal=True, window=None)
    C = jax.sharding.get_mesh().shape["context"]
    return [[np.count_nonzero(part) for part in np.split(np.asarray(info.block_mask[0]), C)]
            for info in (attend.fwd_mask_info, attend.dkv_mask_info)]


@pytest.mark.parametrize("T, C, zigzagged, contiguous", [
    (4096, 2, [5, 5], [3, 7]), (4096, 4, [5] * 4, [1, 2, 3, 4]), (8192, 4, [9] * 4, [3, 7, 11, 15])])
def test_splash_computes_as_many_blocks_on_every_device(T, C, zigzagged, contiguous):
    """Of at most 1024 x 1024 pairs, and of half that where T = 4096 is cut into eight pieces."""
    with jax.set_mesh(mesh_of(context=C)):
        assert computed_blocks(zigzag.times(T)) == [zigzagged] * 2
        assert computed_blocks(np.arange(T, dtype=np.int32)) == [contiguous] * 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T, C", [(512, 2), (1024, 4), (256, 2)])
def test_splash_of_queries_in_zigzag_is_plain_attention(monkeypatch, T, C, packed):
    """Interpreted, with its gradients; the pieces of T = 256 are half of the narrowest block."""
    G, R, K = 2, 2, 128
    q, y_bar = normal(1, T, G, R, K), normal(1, T, G, R, K, seed=1)
    k, v = normal(1, T, G, K, seed=2), normal(1, T, G, K, seed=3)
    ids = np.arange(T, dtype=np.int32)[None] // (T // 3) if packed else None

    def grads(attend, q, k, v, y_bar):
        y, pullback = jax.vjp(attend, q, k, v)
        return y, *pullback(y_bar)

    plain = functools.partial(layers.attention, mask="causal", segments=(ids, ids) if packed else None)
    cut = (spec("batch", "sequence", "heads"), *[spec("batch", None, "heads")] * 2, spec("batch", "sequence", "heads"))
    with jax.set_mesh(mesh_of()):
        given = jax.device_put((q, k, v, y_bar), cut)
        y, q_bar, k_bar, v_bar = jax.device_get(jax.jit(functools.partial(grads, plain))(*given))

    interpreted = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", interpreted)
    with jax.set_mesh(mesh_of(context=C, tensor=2)):
        times = zigzag.times(T)
        splash = functools.partial(kernels.splash, times_T=times, causal=True, window=None,
                                   segments=(ids[:, times], ids) if packed else None)
        given = jax.device_put((q[:, times], k, v, y_bar[:, times]), cut)
        got = jax.jit(functools.partial(grads, splash))(*given)
    for ours, theirs in zip(got, (y[:, times], q_bar[:, times], k_bar, v_bar), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def stack(shape, packed, **block):
    """(output, gradients) of a causal stack on a mesh, and whether its tokens change places."""
    B, T, D = 2, 48, 24
    module = layers.Stack(2, dict(heads=6, hidden=24, norm="rms", mlp="swiglu", rope=True) | block)
    positions, masking = np.arange(T)[None], {}
    if packed:
        ids = np.cumsum(np.random.default_rng(4).random((B, T)) < 0.2, 1)
        positions = np.array([[t - np.searchsorted(row, row[t]) for t in range(T)] for row in ids])
        masking["segments"] = (ids, ids)

    def fn(x, y_bar):
        params = module.init(jax.random.key(0), x, mask="causal", positions=positions, **masking)["params"]

        def apply(params, x):
            return module.apply({"params": params}, x, mask="causal", positions=positions, **masking)

        y, pullback = jax.vjp(apply, params, x)
        return y, pullback(y_bar)

    with jax.set_mesh(mesh_of(**shape)):
        x, y_bar = (jax.device_put(normal(B, T, D, seed=seed), spec("batch", "sequence")) for seed in (0, 1))
        program = jax.jit(fn).lower(x, y_bar)
        return jax.device_get(program.compile()(x, y_bar)), "collective_permute" in program.as_text()


@pytest.mark.parametrize("shape, packed, block", [
    (dict(context=2), True, dict(kv_heads=2)), (dict(context=4, tensor=2), False, dict(kv_heads=2)),
    (dict(fsdp=2, context=2, tensor=2), True, {}),
    (dict(context=4), False, dict(experts=dict(n=4, top_k=2, capacity=0.6, shared=1, balance=0.1)))], ids=str)
def test_a_stack_is_that_of_one_device(shape, packed, block):
    (results, moved), (expected, moved_1) = stack(shape, packed, **block), stack({}, packed, **block)
    assert moved and not moved_1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
                 results, expected)


def test_a_window_has_even_parts_as_it_is():
    assert not stack(dict(context=2), False, window=6)[1]
