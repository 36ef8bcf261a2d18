"""The same shapes here: configs, and what one step of each does."""

import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from cases import CASES, DINO, INPUTS, LARGE, PIXELS

from sslx import bench, experiment, flops, platforms, state, train
from sslx.data import pipeline
from sslx.views.image import augment


def sections(name: str, data: pathlib.Path) -> tuple[dict, dict, dict]:
    """(model, objective, rows)."""
    case = CASES[name]
    size, shape = case.size, dict(width=case.width, depth=case.depth, heads=case.heads, norm="layer", scan=False)
    text = dict(name="synthetic", n=4096, modality="text", length=size, vocab_size=case.vocabulary)
    images = dict(name="synthetic", n=4096, modality="image", size=size if name in LARGE else PIXELS)
    transformer = dict(shape, name="transformer", vocab_size=case.vocabulary, max_length=size)
    vit = dict(shape, name="vit", image_size=size, patch=16 if name in LARGE else 8)
    still = dict(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    match name:
        case "gpt" | "gpt2":
            return transformer, dict(name="causal_lm"), text
        case "llama":
            llama = dict(norm="rms", mlp="swiglu", position="rope", bias=False, tied=False, kv_heads=case.heads // 2,
                         hidden=11 * case.width // 4, remat="full", loss_chunks=4)
            return transformer | llama, dict(name="causal_lm"), text
        case "bert":
            return transformer, dict(name="masked_lm"), text
        case "t5":
            model = dict(shape, name="encdec", norm="rms", vocab_size=case.vocabulary)
            return model, dict(name="span_corruption"), text
        case "mae" | "mae_l":
            decoder = dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
            return vit, dict(decoder, name="mae", view=still), images
        case "simclr":
            model = dict(name="resnet", stages=(2, 2, 2, 2), width=64, stem="imagenet")
            return model, dict(name="simclr", view=dict(size=size), hidden=512, features=128), images
        case "simclr_50":
            model = dict(name="resnet", stages=(3, 4, 6, 3), width=64, stem="imagenet", bottleneck=True)
            return model, dict(name="simclr", view=still, hidden=2048, features=128), images
        case "dino":
            head = dict(n_prototypes=DINO["prototypes"], hidden=DINO["hidden"], bottleneck=DINO["bottleneck"])
            crops = dict(global_view=dict(size=size, scale=(0.4, 1.0)), n_local=DINO["n_local"],
                         local_view=dict(size=DINO["local_size"], scale=(0.05, 0.4)))
            return dict(vit, pool="cls"), dict(head, **crops, name="dino", steps=1000), images
        case "tokens" | "rows":
            return dict(transformer, vocab_size=384), dict(name="causal_lm"), dict(
                name="tokens", path=str(data / "tokens"), length=size)
        case "jpeg":
            view = dict(size=size, scale=(0.2, 1.0), flip=0.5, jitter=0.0, blur=0.0)
            return vit, dict(name="mae", view=view), dict(name="folder", path=str(data / "images"), size=256)
    raise KeyError(name)


def config(name: str, dtype: str, data: pathlib.Path) -> ml_collections.ConfigDict:
    model, objective, rows = sections(name, data)
    model = model if name in INPUTS else dict(model, dtype=dtype)
    return ml_collections.ConfigDict(dict(
        mesh=dict(data=1), model=model, objective=objective, evals={}, run=dict(steps=1000),
        data=dict(batch_size=CASES[name].batch, train=rows), optim=dict(steps=1000, learning_rate=1e-3)))


def made(name: str, dtype: str, data: pathlib.Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(a function that takes one step, one that says the FLOPs of its mathematics and of this device in a second)."""
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
        # To draw noise for a large one on the host costs more than such a step.
        current, metrics = fn(current, first if name in LARGE else next(batches)[0])
        metrics["loss"].block_until_ready()

    def limits() -> list[float]:
        counted = train.count_flops(built.objective, current, first)
        device = jax.devices()[0]
        return [counted.model_total, flops.sheet_flops(device, dtype) or flops.ceiling(device, dtype)]

    return step, limits
