"""The same shapes here: configs, and what one step of each does."""

import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from cases import BERT_VOCABULARY, CASES, DINO, HEADS, INPUTS, PIXELS, T5_VOCABULARY, WIDTH

from sslx import bench, experiment, flops, platforms, state, train
from sslx.data import pipeline
from sslx.views.image import augment

TEXT = dict(width=WIDTH, heads=HEADS, norm="layer", mlp="gelu", scan=False)
VIT = dict(name="vit", patch=8, width=WIDTH, depth=12, heads=HEADS, norm="layer", scan=False)


def sections(name: str, data: pathlib.Path) -> tuple[dict, dict, dict]:
    """(model, objective, rows)."""
    size = CASES[name].size
    text = dict(name="synthetic", n=4096, modality="text", length=size)
    images = dict(name="synthetic", n=4096, modality="image", size=PIXELS)
    small = dict(TEXT, name="transformer", depth=6, max_length=size)
    match name:
        case "gpt":
            return dict(small, vocab_size=256), dict(name="causal_lm"), dict(text, vocab_size=256)
        case "bert":
            return dict(small, vocab_size=BERT_VOCABULARY), dict(name="masked_lm"), dict(
                text, vocab_size=BERT_VOCABULARY)
        case "t5":
            model = dict(TEXT, name="encdec", depth=6, norm="rms", vocab_size=T5_VOCABULARY)
            return model, dict(name="span_corruption"), dict(text, vocab_size=T5_VOCABULARY)
        case "mae":
            view = dict(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
            decoder = dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
            return dict(VIT, image_size=size), dict(decoder, name="mae", view=view), images
        case "simclr":
            model = dict(name="resnet", stages=(2, 2, 2, 2), width=64, stem="imagenet")
            return model, dict(name="simclr", view=dict(size=size), hidden=512, features=128), images
        case "dino":
            head = dict(n_prototypes=DINO["prototypes"], hidden=DINO["hidden"], bottleneck=DINO["bottleneck"])
            crops = dict(global_view=dict(size=size, scale=(0.4, 1.0)), n_local=DINO["n_local"],
                         local_view=dict(size=DINO["local_size"], scale=(0.05, 0.4)))
            return dict(VIT, image_size=size, pool="cls"), dict(head, **crops, name="dino", steps=1000), images
        case "tokens" | "rows":
            return dict(small, vocab_size=384), dict(name="causal_lm"), dict(name="tokens", path=str(data / "tokens"),
                                                                             length=size)
        case "jpeg":
            view = dict(size=size, scale=(0.2, 1.0), flip=0.5, jitter=0.0, blur=0.0)
            return dict(VIT, image_size=size), dict(name="mae", view=view), dict(
                name="folder", path=str(data / "images"), size=256)
    raise KeyError(name)


def config(name: str, dtype: str, data: pathlib.Path) -> ml_collections.ConfigDict:
    model, objective, rows = sections(name, data)
    model = model if name in INPUTS else dict(model, dtype=dtype)
    return ml_collections.ConfigDict(dict(
        mesh=dict(data=1), model=model, objective=objective, evals={}, run=dict(steps=1000),
        data=dict(batch_size=CASES[name].batch, train=rows), optim=dict(steps=1000, learning_rate=1e-3)))


def made(name: str, dtype: str, data: pathlib.Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(a function that takes one step, one that says the FLOPs of its mathematics and what a product does here a s)."""
    print(platforms.prepare(), file=sys.stderr)
    platforms.enable_compilation_cache()
    built = experiment.build(config(name, dtype, data), jax.devices()[:1])
    jax.set_mesh(built.mesh)
    if name == "rows":
        stream, rows = pipeline.stream(built.source, seed=0), np.arange(CASES[name].batch)
        steps = itertools.count()
        return lambda: pipeline.read(stream, CASES[name].batch, rows, next(steps)), list
    batches = built.batches(0, bench.NO_END)
    if name == "tokens":
        return lambda: jax.block_until_ready(next(batches)[0]), list
    if name == "jpeg":
        view = jax.jit(lambda images, i: augment(jax.random.key(i), images, **sections(name, data)[1]["view"]))
        return lambda: view(next(batches)[0]["image"], 0).block_until_ready(), list
    first = next(batches)[0]
    current = state.create(built.objective, built.optimizer, 0, first)
    fn = train.step_of(built)

    def step() -> None:
        nonlocal current
        current, metrics = fn(current, next(batches)[0])
        metrics["loss"].block_until_ready()

    def limits() -> list[float]:
        counted = train.count_flops(built.objective, current, first)
        return [counted.model_total, flops.ceiling(jax.devices()[0], dtype)]

    return step, limits
