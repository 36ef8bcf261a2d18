"""Maps of networks that see where things are: their mean is what features are made of, and each place is its own."""

import jax
import numpy as np
import pytest

from sslx import config
from sslx.sharding import make_mesh

NETWORKS = [dict(name="resnet", stages=(1, 1), width=8, stem="small_stride2", dtype="float32"),
            dict(name="convnext", stages=(1, 1), width=8, stem=2, dtype="float32"),
            dict(name="vit", image_size=16, patch=4, width=8, depth=1, heads=2, pool="mean", dtype="float32"),
            dict(name="vit", image_size=16, patch=4, width=8, depth=1, heads=2, pool="cls", registers=2,
                 dtype="float32")]


@pytest.mark.parametrize("section", NETWORKS, ids=["resnet", "convnext", "vit", "vit-cls"])
def test_maps(section):
    model = config.build("models", section, "config.model")
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        variables = model.init(jax.random.key(0), images, train=True, method="encode")
        features, maps = map(np.asarray, model.apply(variables, images, train=False, method="maps"))
        np.testing.assert_array_equal(features, model.apply(variables, images, train=False, method="encode"))
        assert maps.shape == (2, 4, 4, features.shape[-1])
        alike = model.init(jax.random.key(0), images, train=True, method="maps")
        jax.tree.map(np.testing.assert_array_equal, variables, alike)  # whichever a run was begun by
        if section["name"] == "convnext":
            mean = maps.mean((1, 2))
            normed = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
            np.testing.assert_allclose(normed, features, atol=1e-3)
        elif section.get("pool", "mean") == "mean":
            np.testing.assert_allclose(maps.mean((1, 2)), features, rtol=1e-4, atol=1e-5)
        # What changes in a corner changes a place near it most.
        images[:, :4, 12:] = 1 - images[:, :4, 12:]
        moved = np.abs(np.asarray(model.apply(variables, images, train=False, method="maps")[1]) - maps).sum((0, 3))
    row, col = np.unravel_index(moved.argmax(), moved.shape)
    assert row < 2 <= col
