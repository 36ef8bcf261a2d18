"""Losses against plain NumPy in float64: values, and slopes by central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.config import UserError
from sslx.layers import cross_entropy
from sslx.objectives.causal_lm import following, next_token_loss
from sslx.objectives.dino import self_distillation
from sslx.objectives.mae import per_patch, reconstruction_loss
from sslx.objectives.masked_lm import masked_token_loss
from sslx.objectives.simclr import nt_xent
from sslx.objectives.teacher import cosine
from sslx.sharding import batch_sharding, make_mesh


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def assert_same(loss, reference, x, seed):
    """The loss of the array `x` is that of the reference, and so is its slope along random directions."""
    step, rng = 1e-5, np.random.default_rng(seed)
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(x))
    x = np.float64(np.float32(x))
    np.testing.assert_allclose(value, reference(x), rtol=1e-5, atol=1e-6)
    for direction in rng.normal(size=(4, *x.shape)):
        slope = (reference(x + step * direction) - reference(x - step * direction)) / (2 * step)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        np.testing.assert_allclose(np.vdot(gradient, direction), slope, atol=1e-5 * scale + 1e-8)


def nll(logits, target):
    return np.log(np.exp(logits).sum()) - logits[target]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


SIZES = [(0, 1, 2, 3), (1, 3, 7, 11), (2, 8, 16, 5)]


@pytest.mark.parametrize("seed, B, T, V", SIZES)
def test_cross_entropy(seed, B, T, V):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, V, (B, T))
    weights = rng.normal(size=(B, T))
    assert_same(lambda x: (cross_entropy(x, targets) * weights).sum(),
                lambda x: sum(weights[i] * nll(x[i], targets[i]) for i in np.ndindex(B, T)),
                3 * rng.normal(size=(B, T, V)), seed)


def test_cross_entropy_of_huge_and_of_half_precision_logits_is_finite_and_float32():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert cross_entropy(logits, jnp.array([0]))[0] == 0
    assert cross_entropy(logits, jnp.array([1]))[0] == 2e4
    assert cross_entropy(logits.astype(jnp.bfloat16), jnp.array([1])).dtype == jnp.float32


@pytest.mark.parametrize("seed, B, T, V", SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_next_token_loss(seed, B, T, V, packed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T))
    segments = np.sort(rng.integers(0, 3, (B, T)), 1) if packed else None

    def reference(x):
        terms = [nll(x[b, t], tokens[b, t + 1]) for b in range(B) for t in range(T - 1)
                 if not packed or segments[b, t] == segments[b, t + 1]]
        return np.mean(terms) if terms else 0.0

    assert_same(lambda x: next_token_loss(cross_entropy(x, following(tokens)), segments), reference,
                rng.normal(size=(B, T, V)), seed)


def test_next_token_loss_of_documents_of_one_token_is_zero():
    assert next_token_loss(jnp.ones((1, 3)), jnp.arange(3)[None]) == 0


@pytest.mark.parametrize("seed, B, K, V", SIZES)
def test_masked_token_loss(seed, B, K, V):
    rng = np.random.default_rng(seed)
    targets, weights = rng.integers(0, V, (B, K)), (rng.uniform(size=(B, K)) < 0.6).astype(np.float32)
    weights[0, 0] = 1
    assert_same(lambda x: masked_token_loss(cross_entropy(x, targets), weights),
                lambda x: np.mean([nll(x[i], targets[i]) for i in np.ndindex(B, K) if weights[i]]),
                rng.normal(size=(B, K, V)), seed)
    assert masked_token_loss(jnp.ones((B, K)), 0 * weights) == 0


@pytest.mark.parametrize("seed, B, N, P", SIZES)
def test_reconstruction_loss_looks_at_hidden_patches_only(seed, B, N, P):
    rng = np.random.default_rng(seed)
    target, mask = rng.normal(size=(B, N, P)), (rng.uniform(size=(B, N)) < 0.6).astype(np.float32)
    mask[0, 0] = 1
    predicted = rng.normal(size=(B, N, P))
    assert_same(lambda x: reconstruction_loss(x, jnp.float32(target), mask),
                lambda x: np.square(x - np.float32(target))[mask > 0].mean(), predicted, seed)
    gradient = jax.grad(reconstruction_loss)(jnp.float32(predicted), jnp.float32(target), mask)
    assert (np.abs(gradient).max(-1) > 0).tolist() == (mask > 0).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_normalized_patches_have_mean_zero_and_sample_variance_one(seed):
    patches = np.random.default_rng(seed).uniform(size=(2, 5, 12)).astype(np.float32)
    patches[0, 0] = 0.5  # a flat patch has no variance to divide by
    mean, std = per_patch(jnp.asarray(patches))
    np.testing.assert_allclose(mean[..., 0], patches.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(std[..., 0], np.sqrt(np.var(np.float64(patches), -1, ddof=1) + 1e-6), rtol=1e-5)
    assert np.isfinite((patches - mean) / std).all()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nt_xent_by_loops(a, b, temperature):
    """Chen et al. 2020, algorithm 1, term by term."""
    z = np.concatenate([a, b])
    n, terms = len(z), []
    for i in range(n):
        others = [np.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i]
        terms.append(-np.log(np.exp(z[i] @ z[(i + n // 2) % n] / temperature) / np.sum(others)))
    return np.mean(terms)


@pytest.mark.parametrize("seed, B, D", [(0, 1, 2), (1, 2, 3), (2, 9, 4)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("parts", ["whole", "halves", "single"])
def test_nt_xent(seed, B, D, temperature, parts):
    chunks = dict(whole=1, halves=2, single=2 * B)[parts]
    a, b = unit(np.random.default_rng(seed).normal(size=(2, B, D)))
    assert_same(lambda x: nt_xent(x[0], x[1], temperature, chunks), lambda x: nt_xent_by_loops(*x, temperature),
                np.stack([a, b]), seed)


@pytest.mark.parametrize("shape", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=["8", "2x2x2"])
def test_nt_xent_in_chunks_on_8_devices_is_that_of_one(shape):
    a, b = np.float32(unit(np.random.default_rng(0).normal(size=(2, 16, 5))))
    gradient = jax.jit(jax.value_and_grad(nt_xent, (0, 1)), static_argnums=(2, 3))
    expected = jax.device_get(gradient(a, b, 0.1, 1))
    mesh = make_mesh(**shape)
    with jax.set_mesh(mesh):
        sharded = jax.device_get(gradient(*jax.device_put((a, b), batch_sharding(mesh)), 0.1, 4))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), sharded, expected)


def test_nt_xent_in_chunks_never_holds_all_pairs():
    """All products of a device's 2 x 64 rows with 1024 candidates are 512 KiB, those with a 16th of them 32 KiB."""
    def temporaries(chunks):
        mesh = make_mesh()
        with jax.set_mesh(mesh):
            x = jax.ShapeDtypeStruct((512, 4), jnp.float32, sharding=batch_sharding(mesh))
            gradient = jax.jit(jax.value_and_grad(lambda a, b: nt_xent(a, b, 0.1, chunks), (0, 1)))
            return gradient.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 64 * 1024 * 4
    assert temporaries(1) > logits > 3 * temporaries(16)


@pytest.mark.parametrize("chunks", [0, 3, -2])
def test_chunks_that_do_not_divide_the_views_are_named(chunks):
    with pytest.raises(UserError, match=f"config.objective.chunks={chunks} does not divide the 16 views"):
        nt_xent(jnp.ones((8, 2)), jnp.ones((8, 2)), 0.1, chunks)


def test_nt_xent_knows_neither_the_order_of_the_views_nor_of_the_images():
    rng = np.random.default_rng(0)
    a, b = jnp.float32(unit(rng.normal(size=(2, 8, 5))))
    order = rng.permutation(8)
    value = nt_xent(a, b, 0.2)
    np.testing.assert_allclose(nt_xent(b, a, 0.2), value, rtol=1e-6)
    np.testing.assert_allclose(nt_xent(a[order], b[order], 0.2), value, rtol=1e-6)
    assert abs(nt_xent(a, b[order], 0.2) - value) > 1e-3  # other pairs are another loss


@pytest.mark.parametrize("seed, B, K, V", [(0, 1, 3, 2), (1, 4, 7, 5), (2, 3, 5, 2)])
def test_self_distillation(seed, B, K, V):
    rng = np.random.default_rng(seed)
    teacher, centre = np.float32(rng.normal(size=(2, B, K))), np.float32(rng.normal(size=K))

    def reference(student):
        terms = [-softmax((np.float64(teacher[g, b]) - centre) / 0.3) @ np.log(softmax(student[v, b] / 0.2))
                 for g in range(2) for v in range(V) if v != g for b in range(B)]
        return np.mean(terms)

    assert_same(lambda x: self_distillation(list(x), list(teacher), centre, 0.2, 0.3), reference,
                rng.normal(size=(V, B, K)), seed)
    to_teacher = jax.grad(lambda t: self_distillation([t[0], t[1]], [t[0], t[1]], centre, 0.2, 0.3))
    to_student = jax.grad(lambda s: self_distillation([s[0], s[1]], list(teacher), centre, 0.2, 0.3))
    np.testing.assert_array_equal(to_teacher(jnp.asarray(teacher)), to_student(jnp.asarray(teacher)))


def test_cosine_goes_from_the_first_to_the_last_value_and_stays():
    steps = np.array([0, 5, 10, 20])
    np.testing.assert_allclose(cosine(steps, 10, 0.9, 1.0), [0.9, 0.95, 1.0, 1.0], rtol=1e-6)
    inner = np.diff(cosine(np.arange(11), 10, 0.9, 1.0))
    assert (inner > 0).all() and inner.argmax() in (4, 5)
