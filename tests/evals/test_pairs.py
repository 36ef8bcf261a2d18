"""Retrieval and zero-shot classification of embeddings that are known."""

import jax
import ml_collections
import numpy as np
import pytest
from experiments import CONFIGS

from sslx.config import UserError
from sslx.data import Info, Source, captions, tokenize
from sslx.data.arrays import Arrays
from sslx.evals import Subject, retrieval, zero_shot
from sslx.experiment import build

ENCODER = tokenize.load("bytes")
N, NAMES = 50, ("cat", "dog", "fish")


def subject(noise: float):
    """Pairs whose embeddings are a function of their index in the first pixel, and of the first byte of a text."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(256, 8))
    label = np.arange(N) % 3
    tokens, segments = captions.padded([chr(32 + i) for i in range(N)], ENCODER, 4)
    image = np.zeros((N, 1, 1, 1), np.uint8)
    image[:, 0, 0, 0] = 32 + np.arange(N)
    info = Info("pairs", "image_text", "f", shape=(1, 1, 1), classes=NAMES, num_classes=3,
                encode=lambda texts: captions.padded(texts, ENCODER, 4))
    shift = noise * rng.normal(size=(256, 8))

    def embed(batch):
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        return {"image": unit(places[batch["image"][:, 0, 0, 0]]),
                "text": unit((places + shift)[batch["tokens"][:, 0]])}

    source = Source(Arrays(image=image, tokens=tokens, segment_ids=segments, label=label), info)
    return Subject(lambda batch: batch, None, {"retrieval": source, "test": source}, 16, embed=embed), embed, source


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_retrieval_counts_who_is_nearer(noise):
    judged, embed, source = subject(noise)
    found = retrieval.make(k=(1, 5, 10))(judged)
    rows = source.examples.fields
    pairs = embed(rows)
    cosines = pairs["image"] @ pairs["text"].T
    for k in (1, 5, 10):
        by_image = [i in np.argsort(-cosines[i])[:k] for i in range(N)]
        by_text = [i in np.argsort(-cosines[:, i])[:k] for i in range(N)]
        assert found[f"retrieval/text_at_{k}"] == pytest.approx(np.mean(by_image))
        assert found[f"retrieval/image_at_{k}"] == pytest.approx(np.mean(by_text))
        assert found[f"retrieval/chance_at_{k}"] == k / N
    assert (found["retrieval/text_at_1"] == 1) == (noise == 0)


@pytest.mark.parametrize("towers", [("text",), ("image",), ("image", "text")])
@pytest.mark.parametrize("value", [1.0, np.nan])
def test_towers_that_tell_nothing_apart_find_no_pairs(towers, value):
    judged, embed, _ = subject(0.0)
    judged.embed = lambda batch: {side: np.full_like(x, value) if side in towers else x
                                  for side, x in embed(batch).items()}
    found = retrieval.make(k=(1, 10))(judged)
    for k in (1, 10):
        assert found[f"retrieval/text_at_{k}"] <= k / N and found[f"retrieval/image_at_{k}"] <= k / N


def test_pairs_of_one_caption_share_its_place():
    judged, embed, source = subject(0.0)
    fields = source.examples.fields
    fields["tokens"][:] = fields["tokens"][np.arange(N) // 2 * 2]  # two of each
    fields["image"][:] = fields["image"][np.arange(N) // 2 * 2]
    found = retrieval.make(k=(1, 2))(judged)
    assert all(found[f"retrieval/{side}_at_{k}"] == 1 for side in ("text", "image") for k in (1, 2))


@pytest.mark.parametrize("templates", [("{}",), ("{}", "the {}"), ("{} there", "some {}", "no {}")])
def test_zero_shot_is_the_nearest_class(templates):
    judged, embed, source = subject(0.3)
    found = zero_shot.make(templates=templates)(judged)["zero_shot/accuracy"]
    text = 0
    for template in templates:
        tokens, _ = captions.padded([template.format(name) for name in NAMES], ENCODER, 4)
        text = text + embed({"image": np.zeros((3, 1, 1, 1), np.uint8), "tokens": tokens})["text"]
    image = embed(source.examples.fields)["image"]
    cosines = image @ text.T / np.linalg.norm(text, axis=1)
    assert found == pytest.approx((cosines.argmax(1) == np.arange(N) % 3).mean())


def test_a_template_without_a_name_is_an_error():
    with pytest.raises(UserError, match="no {} where"):
        zero_shot.make(templates=("a photo",))


@pytest.mark.parametrize("changes, words", [
    ({"model.text.base": dict(width=16)}, "config.model.text.base: two towers are not offered in muP"),
    ({"model.text.dtype": "float32"}, "unknown key config.model.text.dtype"),
    ({"model.image": dict(name="transformer", vocab_size=8, max_length=8, width=8, depth=1, heads=1)},
     "config.model.image.name='transformer' is no network of images")])
def test_towers_that_cannot_be(changes, words):
    conf = CONFIGS["clip_openmoji"].copy_and_resolve_references().to_dict()
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = conf
        for parent in parents:
            section = section[parent]
        section[last] = value
    with pytest.raises(UserError, match=words):
        build(ml_collections.ConfigDict(conf | dict(mesh=dict(data=1))), jax.devices()[:1])


def test_pairs_are_asked_of_objectives_that_have_them():
    conf = CONFIGS["simclr_fashion_mnist"].copy_and_resolve_references()
    conf.mesh, conf.evals = dict(data=1), dict(batch_size=16, retrieval=dict(source=dict(name="digits", split="test")))
    with pytest.raises(UserError, match="evals.retrieval is of pairs of images and captions"):
        build(conf, jax.devices()[:1])
