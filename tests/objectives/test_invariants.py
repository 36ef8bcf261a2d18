"""What must hold of the objectives whatever their numbers: who sees what, and who gets a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import CONFIGS, abstract_state, experiment, first_batch

from sslx import config, hlo, state
from sslx.experiment import build
from sslx.layers import cross_entropy
from sslx.objectives import combine
from sslx.objectives.teacher import cosine, moving_average
from sslx.views.image import patchify
from sslx.views.tokens import bert_corrupt, mask_positions, random_keep


@functools.cache
def born(name, **model):
    """(experiment, batch, state at step 0) of a config on one device."""
    built = experiment(name, **model)
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        return built, batch, jax.jit(lambda b: state.create(built.objective, built.optimizer, 0, b))(batch)


def largest(tree) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.fixture
def dino():
    built, batch, start = born("dino_fashion_mnist")
    with jax.set_mesh(built.mesh):
        yield built, batch, start


def test_dino_teacher_and_centre_get_no_gradient(dino):
    built, batch, start = dino

    @jax.jit
    def gradient(teacher, centre):
        def loss(teacher, centre):
            aux = start.aux | {"teacher": start.aux["teacher"] | {"params": teacher}, "centre": centre}
            return built.objective.loss(start.params, aux, batch, jax.random.key(0))[0]

        return jax.grad(loss, argnums=(0, 1))(teacher, centre)

    assert largest(gradient(start.aux["teacher"]["params"], start.aux["centre"] + 0.1)) == 0


def test_dino_teacher_is_the_moving_average_of_the_student(dino):
    built, batch, start = dino
    student = jax.tree.map(lambda x: x + 1.0, start.params)
    aux = jax.jit(built.objective.loss)(student, start.aux, batch, jax.random.key(0))[1][0]
    first = built.config["objective"]["momentum"][0]
    for new, old in zip(*(jax.tree.leaves(x["teacher"]["params"]) for x in (aux, start.aux)), strict=True):
        np.testing.assert_allclose(new, old + (1 - first), atol=1e-5)
    assert aux["teacher"]["step"] == 1 and largest(aux["centre"]) > 0


def test_moving_average_passes_no_gradient_from_the_new():
    assert jax.grad(lambda new: moving_average(jnp.float32(1), new, 0.9))(jnp.float32(2)) == 0
    assert moving_average(1.0, 2.0, 0.75) == 1.25


@pytest.mark.parametrize(("step", "expected"), [(0, 0.99), (50, 0.995), (100, 1.0), (300, 1.0)])
def test_momentum_follows_half_a_cosine(step, expected):
    np.testing.assert_allclose(cosine(step, 100, 0.99, 1.0), expected, rtol=1e-6)


def test_mae_sees_hidden_patches_nowhere_but_in_its_target():
    """The gradient of the prediction alone with respect to the pixels of hidden patches is zero."""
    built, batch, start = born("mae_fashion_mnist", patch=4)
    with jax.set_mesh(built.mesh):
        model = config.build("models", built.config["model"], "config.model")
        images = batch["image"].astype(jnp.float32) / 255
        n = model.grid[0] * model.grid[1]
        keep, _, mask = random_keep(jax.random.key(0), len(images), n, n // 4)

        @jax.jit
        def gradient(images):
            def energy(images):
                encoded = model.apply({"params": start.params["encoder"]}, images, keep)
                return (encoded * jax.random.normal(jax.random.key(1), encoded.shape)).sum()

            return jax.grad(energy)(images)

        influence = np.asarray(jnp.abs(patchify(gradient(images), model.patch)).max(-1))
    mask = np.asarray(mask)
    assert influence[mask == 1].max() == 0 and influence[mask == 0].min() > 0


def test_masked_tokens_are_unseen_where_the_mask_replaces_them():
    """With replace=1, changing the true ids at the chosen positions changes nothing that the network sees."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (4, 32)), jnp.int32)
    positions, weights = mask_positions(jax.random.key(0), tokens, rate=0.25)
    chosen = np.zeros(tokens.shape, bool)
    np.put_along_axis(chosen, np.asarray(positions), True, 1)
    other = jnp.where(chosen, (tokens + 7) % 256, tokens)
    options = dict(mask_id=257, vocab_size=256, replace=1.0, random=0.0)
    one, two = (bert_corrupt(jax.random.key(1), t, positions, weights, **options) for t in (tokens, other))
    np.testing.assert_array_equal(one, two)
    assert (np.asarray(one)[chosen] == 257).all() and (np.asarray(one)[~chosen] == np.asarray(tokens)[~chosen]).all()


def test_masking_is_drawn_anew_at_every_step():
    built, batch, start = born("mlm_text")
    with jax.set_mesh(built.mesh):
        loss = jax.jit(lambda key: built.objective.loss(start.params, start.aux, batch, key)[0])
        keys = [jax.random.fold_in(jax.random.key(0), step) for step in (0, 0, 1)]
        first, again, other = (float(loss(key)) for key in keys)
    assert first == again != other


def test_causal_loss_of_an_untrained_network_is_that_of_guessing():
    """About ln V: a head that saw its target would be far below, a wrong shift far above."""
    built, batch, start = born("quickstart")
    with jax.set_mesh(built.mesh):
        loss, (_, metrics) = jax.jit(built.objective.loss)(start.params, start.aux, batch, jax.random.key(0))
    assert abs(float(loss) - np.log(built.config["model"]["vocab_size"])) < 0.3
    assert metrics["tokens"] == batch["tokens"].size


def test_combined_objectives_are_their_weighted_sum():
    built, batch, _ = born("quickstart")
    other, *_ = born("mlm_text")
    both = combine({"causal": (0.25, built.objective), "masked": (2.0, other.objective)})
    with jax.set_mesh(built.mesh):
        params, aux = jax.jit(both.init)(jax.random.key(0), batch)
        (loss, (aux, metrics)), grads = jax.jit(jax.value_and_grad(both.loss, has_aux=True))(
            params, aux, batch, jax.random.key(1))
    np.testing.assert_allclose(loss, 0.25 * metrics["causal/loss"] + 2 * metrics["masked/loss"], rtol=1e-6)
    assert metrics["tokens"] == batch["tokens"].size and set(params) == set(aux) == {"causal", "masked"}
    contrast = experiment("simclr_fashion_mnist").objective
    assert not both.of_batch and combine({"causal": (1.0, built.objective), "contrast": (1.0, contrast)}).of_batch
    assert largest(grads["causal"]) > 0 and largest(grads["masked"]) > 0


def test_whole_batch_normalization_is_global():
    """SimCLR on 8 devices carries the batch statistics of one: those of the global batch, not of a shard."""
    carried = []
    for shape in ((1, 1, 1), (8, 1, 1)):
        built = experiment("simclr_fashion_mnist", shape)
        with jax.set_mesh(built.mesh):
            batch = first_batch(built)

            def aux_after_a_loss(batch, objective=built.objective):
                params, aux = objective.init(jax.random.key(0), batch)
                return objective.loss(params, aux, batch, jax.random.key(1))[1][0]

            carried.append(jax.device_get(jax.jit(aux_after_a_loss)(batch)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *carried)


def moved(built):
    """{(kind, shape of a device's part)} of what collectives move in the gradient of an experiment."""
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        start = abstract_state(built, batch)
        gradient = jax.jit(jax.value_and_grad(built.objective.loss, has_aux=True))
        text = gradient.lower(start.params, start.aux, batch, jax.random.key(0)).compile().as_text()
    parts = [part.ops for part in hlo.parse(text).computations.values()]
    return {(kind, ops[operand].shapes[0].dims) for ops in parts for op in ops.values() for operand in op.operands
            if (kind := op.opcode.removesuffix("-start")) in hlo.COLLECTIVES}


@pytest.mark.parametrize("name, features", [("simclr_fashion_mnist", {("all-gather", (4, 16))}),
                                            ("rotation_fashion_mnist", set()), ("dino_fashion_mnist", set())])
def test_all_views_of_an_image_are_made_where_it_is(name, features):
    """On 8 devices gradients and statistics are summed, SimCLR's features (2 views of 2 rows) gathered; that is all."""
    collectives = moved(experiment(name, (8, 1, 1)))
    assert {part for part in collectives if part[0] != "all-reduce"} == features
    assert any(kind == "all-reduce" for kind, _ in collectives)


def test_prototypes_over_tensor_are_never_together():
    """Of the 96 logits of a row 24 are on a device: over rows their centre is summed, and the weights' gradient."""
    conf = CONFIGS["dino_fashion_mnist"].copy_and_resolve_references()
    conf.mesh, conf.objective.n_prototypes = dict(data=2, tensor=4), 96
    collectives = moved(build(conf))
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    of_prototypes = {dims for _, dims in collectives if {24, 96} & set(dims)}
    weights = (conf.objective.bottleneck, 24)
    assert (24,) in of_prototypes and of_prototypes <= {(24,), weights, weights[::-1]}


def test_cross_entropy_of_a_certain_guess_is_zero():
    logits = jnp.full((2, 5), -1e4).at[jnp.arange(2), jnp.array([3, 1])].set(1e4)
    assert (cross_entropy(logits, jnp.array([3, 1])) == 0).all()


@pytest.mark.parametrize("name", ["causal_text", "mlm_text", "span_text"])
def test_features_of_text_do_not_depend_on_its_padding(name):
    built, batch, start = born(name)
    encode = jax.jit(built.objective.encode)
    place_T = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)
    inside = jnp.broadcast_to(place_T < 40, batch["tokens"].shape)
    padded = {"tokens": jnp.where(inside, batch["tokens"], built.source.info.special["pad"]),
              "segment_ids": inside.astype(jnp.int32), "positions": jnp.broadcast_to(place_T, inside.shape)}
    with jax.set_mesh(built.mesh):
        alone = encode(start.params, start.aux, {"tokens": batch["tokens"][:, :40]})
        np.testing.assert_allclose(encode(start.params, start.aux, padded), alone, atol=1e-5)
