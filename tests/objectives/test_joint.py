"""Losses of joint embeddings against NumPy in float64 and, where it is installed, lightly; 8 devices against one."""

import jax
import numpy as np
import pytest
from experiments import CONFIGS
from test_losses import assert_same, unit

from sslx.config import UserError
from sslx.experiment import build
from sslx.objectives.barlow_twins import redundancy_reduction
from sslx.objectives.byol import prediction_error
from sslx.objectives.joint import negative_cosine
from sslx.objectives.vicreg import covariance, invariance, variance
from sslx.sharding import batch_sharding, make_mesh


def vicreg(a, b):
    return 25 * invariance(a, b) + 12.5 * (variance(a) + variance(b)) + covariance(a) + covariance(b)


def vicreg_by_the_paper(a, b):
    def terms(x):
        c = np.cov(x, rowvar=False)
        apart = np.square(c).sum() - np.square(np.diag(c)).sum()
        return 12.5 * np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean() + apart / len(c)

    return 25 * np.square(a - b).mean() + terms(a) + terms(b)


def barlow_by_the_paper(a, b):
    a, b = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (a, b))
    c = a.T @ b / len(a)
    return sum((1 - c[i, i]) ** 2 if i == j else 5e-3 * c[i, j] ** 2 for i, j in np.ndindex(*c.shape))


# (ours, the paper's, lightly's class and what it is made with) of two views [B, D].
LOSSES = {
    "vicreg": (vicreg, vicreg_by_the_paper, "VICRegLoss", {}),
    "barlow_twins": (lambda a, b: redundancy_reduction(a, b, 5e-3), barlow_by_the_paper, "BarlowTwinsLoss", {}),
    "byol": (prediction_error, lambda p, z: np.square(unit(p) - unit(z)).sum(1).mean(), None, {}),
    "simsiam": (negative_cosine, lambda p, z: -(unit(p) * unit(z)).sum(1).mean(), "NegativeCosineSimilarity", {}),
}
TO_THE_FIRST = ("byol", "simsiam")  # the second is a target and gets no gradient

every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def views(seed, B, D):
    return np.float32(np.random.default_rng(seed).normal(size=(2, B, D)) * np.linspace(0.5, 2, D))


@every_loss
@pytest.mark.parametrize("seed, B, D", [(0, 2, 3), (1, 7, 5), (2, 32, 8)])
def test_loss_is_that_of_the_paper(name, seed, B, D, one_device):
    ours, paper, *_ = LOSSES[name]
    a, b = views(seed, B, D)
    if name in TO_THE_FIRST:
        assert_same(lambda x: ours(x, b), lambda x: paper(x, np.float64(b)), a, seed)
        assert not jax.grad(ours, 1)(a, b).any()
    else:
        assert_same(lambda x: ours(x[0], x[1]), lambda x: paper(x[0], x[1]), np.stack([a, b]), seed)


@every_loss
@pytest.mark.parametrize("seed, B, D", [(0, 4, 3), (1, 32, 16)])
def test_loss_is_that_of_lightly(name, seed, B, D, one_device):
    torch, lightly = pytest.importorskip("torch"), pytest.importorskip("lightly.loss")
    ours, _, theirs, options = LOSSES[name]
    if theirs is None:
        pytest.skip("lightly has no class for it")
    arrays = views(seed, B, D)
    a, b = (torch.tensor(x, requires_grad=True) for x in arrays)
    value = getattr(lightly, theirs)(**options)(a, b.detach() if name in TO_THE_FIRST else b)
    value.backward()
    expected = [np.zeros_like(x) if y.grad is None else y.grad.numpy() for x, y in zip(arrays, (a, b), strict=True)]
    found, gradients = jax.value_and_grad(ours, (0, 1))(*arrays)
    np.testing.assert_allclose(found, value.item(), rtol=1e-5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * np.abs(expected[0]).max())


@every_loss
@pytest.mark.parametrize("shape", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=["8", "2x2x2"])
def test_loss_on_8_devices_is_that_of_one(name, shape, one_device):
    gradient = jax.jit(jax.value_and_grad(LOSSES[name][0], (0, 1)))
    arrays = views(0, 16, 5)
    expected = jax.device_get(gradient(*arrays))
    mesh = make_mesh(**shape)
    with jax.set_mesh(mesh):
        sharded = jax.device_get(gradient(*jax.device_put(tuple(arrays), batch_sharding(mesh))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), sharded, expected)


def test_second_view_of_another_size_is_refused():
    conf = CONFIGS["byol_fashion_mnist"].copy_and_resolve_references()
    conf.objective.second = dict(size=8)
    with pytest.raises(UserError, match="config.objective.second.size=8 must be config.objective.view.size=16"):
        build(conf)
