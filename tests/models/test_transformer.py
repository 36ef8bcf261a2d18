"""The transformer over tokens: who can influence whom, by gradients, and the identities of its positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.config import UserError
from sslx.models import transformer
from sslx.sharding import make_mesh

KEY, T = jax.random.key(0), 8


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def tiny(**options):
    defaults = dict(vocab_size=16, max_length=16, width=16, depth=2, heads=2, hidden=16, dtype="float32", tied=False)
    model = transformer.make(**(defaults | options))
    return model, model.init(KEY, jnp.arange(T)[None], "causal")["params"]


def influence(model, params, mask, **options):
    """bool [T, T]: whether the logits at t have a gradient on the embedding of the token at s."""
    tokens = jnp.arange(T)[None]  # distinct, so that row s of the table is the token at s alone

    def at(table, t):
        logits = model.apply({"params": params | {"tokens": {"embedding": table}}}, tokens, mask, **options)
        return (logits * (jnp.arange(T) == t)[:, None] * jnp.arange(logits.shape[-1])).sum()

    gradient = jax.jit(jax.grad(at))
    return np.stack([np.abs(gradient(params["tokens"]["embedding"], t)).max(-1)[:T] > 0 for t in range(T)])



@pytest.mark.parametrize("mask, options, expected", [
    ("causal", {}, lambda t, s: s <= t),
    ("bidirectional", {}, lambda t, s: True),
    ("prefix", dict(prefix_B=np.array([3])), lambda t, s: s <= t or s < 3),
    ("causal", dict(segment_ids=np.array([[0, 0, 0, 1, 1, 2, 2, 2]])), lambda t, s: s <= t and group(t) == group(s)),
    ("bidirectional", dict(segment_ids=np.array([[0, 0, 0, 1, 1, 2, 2, 2]])), lambda t, s: group(t) == group(s)),
], ids=["causal", "bidirectional", "prefix", "causal-packed", "bidirectional-packed"])
def test_a_logit_depends_on_exactly_the_tokens_that_its_mask_shows(mask, options, expected):
    seen = influence(*tiny(position="rope", norm="rms", mlp="swiglu"), mask, **jax.tree.map(jnp.asarray, options))
    assert seen.tolist() == [[expected(t, s) for s in range(T)] for t in range(T)]


def group(t):
    return (t > 2) + (t > 4)


@pytest.mark.parametrize("options", [
    dict(scan=False), dict(position="learned"), dict(kv_heads=1, qk_norm=True, position="rope"), dict(remat="full"),
], ids=str)
def test_every_variant_is_causal(options):
    assert influence(*tiny(**options), "causal").tolist() == np.tri(T, dtype=bool).tolist()


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_packed_documents_are_what_they_are_alone(position, mask):
    model, params = tiny(position=position)
    first, second = np.array([[3, 1, 4, 1, 5]]), np.array([[9, 2, 6]])
    packed = model.apply({"params": params}, np.concatenate([first, second], 1), mask,
                         segment_ids=np.array([[0] * 5 + [1] * 3]), positions=np.array([[0, 1, 2, 3, 4, 0, 1, 2]]))
    alone = [model.apply({"params": params}, document, mask) for document in (first, second)]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), rtol=1e-4, atol=1e-5)


def test_rotary_positions_are_relative_and_learned_ones_are_not():
    tokens, positions = np.array([[3, 1, 4, 1, 5]]), np.arange(5)[None]
    for position, same in (("rope", True), ("learned", False)):
        model, params = tiny(position=position)
        here, there = (model.apply({"params": params}, tokens, "causal", positions=p)
                       for p in (positions, positions + 6))
        assert np.allclose(here, there, atol=1e-4) == same


def test_without_positions_order_does_not_matter():
    model, params = tiny(position="none")
    tokens, order = np.array([[3, 1, 4, 1, 5]]), np.array([4, 2, 0, 3, 1])
    logits = model.apply({"params": params}, tokens, "bidirectional")
    shuffled = model.apply({"params": params}, tokens[:, order], "bidirectional")
    np.testing.assert_allclose(shuffled, np.asarray(logits)[:, order], rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding():
    model, params = tiny(tied=True)
    assert "head" not in params
    tokens = np.arange(T)[None]
    hidden = model.apply({"params": params}, tokens, "causal", method="hidden")
    logits = model.apply({"params": params}, tokens, "causal")
    np.testing.assert_allclose(logits, hidden @ params["tokens"]["embedding"].T, rtol=1e-4, atol=1e-5)


def test_gpt2_small_has_its_published_size():
    gpt2 = transformer.make(vocab_size=50257, max_length=1024, width=768, depth=12, heads=12)
    params = jax.eval_shape(lambda: gpt2.init(KEY, jnp.zeros((1, 8), int), "causal"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 124_439_808


@pytest.mark.parametrize("heads, message", [
    (dict(heads=4), "model.width=18 does not divide into model.heads=4 heads"),
    (dict(heads=6, kv_heads=4), "model.heads=6 heads do not divide into model.kv_heads=4 groups"),
    (dict(heads=2, position="rope"), "model.width=18 over model.heads=2 is odd"),
])
def test_heads_that_do_not_fit_are_named(heads, message):
    with pytest.raises(UserError, match=message):
        transformer.make(vocab_size=8, max_length=8, width=18, depth=1, **heads)
