"""Crops say where they lie, and VICRegL compares the places that they show."""

import jax
import numpy as np
import pytest
from experiments import CONFIGS, experiment, first_batch

from sslx import config
from sslx.objectives.crops import Crops
from sslx.objectives.vicreg import regularized
from sslx.objectives.vicregl import Expanders, local_criterion
from sslx.views import interleave, separate
from sslx.views.image import augmentation, centres

SIDE, SIZE, KEY = 64, 8, jax.random.key(3)


@pytest.mark.parametrize("n_small", [None, 0, 3])
def test_crops_lie_where_they_say(n_small):
    """Of images whose pixels are their rows and columns; which pixels of a view round to .1."""
    place_HW = np.moveaxis(np.indices((SIDE, SIDE)) + 0.5, 0, -1) / SIDE
    images = np.broadcast_to(np.concatenate([place_HW, place_HW[..., :1]], -1), (8, SIDE, SIDE, 3))
    still = dict(size=SIZE, jitter=0.0, grayscale=0.0, blur=0.0)
    large = [augmentation(scale=(0.1, 0.3), **still), augmentation(scale=(0.3, 0.5), **still)]
    crops = Crops(large) if n_small is None else Crops(large, augmentation(scale=(0.1, 0.2), **still), n_small)
    shown = separate(crops(KEY, images)[0], 2)
    for crop, box in zip(shown, crops.where(KEY, images), strict=True):
        lie = np.asarray(centres(box, SIZE, SIZE))
        inside = ((lie > 8) & (lie < SIDE - 8)).all(-1)
        assert inside.sum() > 100
        np.testing.assert_allclose(np.asarray(crop)[inside][:, :2] * SIDE, lie[inside], atol=0.1)


def test_vicregl_is_of_the_places_that_its_crops_show():
    built, options = experiment("vicregl_fashion_mnist"), CONFIGS["vicregl_fashion_mnist"].objective
    model = config.build("models", CONFIGS["vicregl_fashion_mnist"].model, "config.model")
    view = augmentation(**options.view)
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        params, aux = built.objective.init(jax.random.key(0), batch)
        value = built.objective.loss(params, aux, batch, KEY)[0]
        keys = [jax.random.fold_in(jax.random.split(KEY)[0], v) for v in range(2)]
        images = interleave([view(key, batch["image"]) for key in keys])
        seen = model.apply({"params": params["encoder"], **aux["stats"]["encoder"]}, images, train=True, method="maps",
                           mutable=["batch_stats"])[0]
        expander = Expanders(options.features, options.local_features, model.dtype)
        (whole_a, whole_b), (a, b) = (separate(x, 2) for x in expander.apply(
            {"params": params["expander"], **aux["stats"]["expander"]}, seen, train=True, mutable=["batch_stats"])[0])
        rows, cols = seen[1].shape[1:3]
        lie = [centres(view.where(key, batch["image"]), rows, cols).reshape(len(a), -1, 2) for key in keys]
        expected = (0.75 * regularized(whole_a, whole_b, (25.0, 25.0, 1.0))
                    + 0.25 * local_criterion(a, b, *lie, options.matches, (25.0, 25.0, 1.0)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
