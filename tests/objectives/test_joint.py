"""Losses of joint embeddings against NumPy in float64 and, where they are installed, lightly and transformers."""

import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import CONFIGS
from test_losses import assert_same, nll, softmax, unit

from sslx.config import UserError
from sslx.experiment import build
from sslx.models import heads
from sslx.objectives.assignment import centred, sinkhorn, swapped_prediction
from sslx.objectives.barlow_twins import redundancy_reduction
from sslx.objectives.byol import prediction_error
from sslx.objectives.clip import inverse_temperature, symmetric_info_nce
from sslx.objectives.contrast import info_nce
from sslx.objectives.deepcluster import cluster_prediction
from sslx.objectives.dino import self_distillation
from sslx.objectives.joint import mean_cosine
from sslx.objectives.lejepa import alike, sigreg
from sslx.objectives.masked_distillation import gram_anchoring, koleo, masked_prediction
from sslx.objectives.moco import queue_contrast
from sslx.objectives.siglip import sigmoid_contrast
from sslx.objectives.simclr import nt_xent
from sslx.objectives.simsiam import negative_cosine
from sslx.objectives.sup_con import supervised_contrast
from sslx.objectives.vicreg import covariance, invariance, variance
from sslx.objectives.vicregl import local_criterion
from sslx.objectives.w_mse import whitened
from sslx.sharding import batch_sharding, make_mesh


def constant(name, *shape):
    """Numbers that a loss takes beside its views."""
    return np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32)


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


def simclr_by_the_paper(a, b):
    z = unit(np.concatenate([a, b]))
    return np.mean([nll(np.where(np.arange(len(z)) == i, -np.inf, z @ z[i]) / 0.5, (i + len(a)) % len(z))
                    for i in range(len(z))])


def info_nce_by_the_paper(a, b):
    return np.mean([nll(unit(b) @ q / 0.2, i) for i, q in enumerate(unit(a))])


def queue_of(a):
    return unit(np.float64(constant("queue", 24, a.shape[1])))


def moco(q, k):
    q, k = heads.unit(q), heads.unit(k)
    return queue_contrast(q, k, jax.nn.logsumexp(q @ jnp.float32(queue_of(q)).T / 0.1, 1), 0.1)


def moco_by_the_paper(q, k):
    return np.mean([nll(np.concatenate([[x @ y], queue_of(q) @ x]) / 0.1, 0)
                    for x, y in zip(unit(q), unit(k), strict=True)])


def moco_of_lightly(losses, torch):
    def loss(q, k):
        criterion = losses.NTXentLoss(temperature=0.1, memory_bank_size=(24, q.shape[1]))
        bank = torch.tensor(np.float32(queue_of(q)))
        criterion.memory_bank.bank = bank if criterion.memory_bank.bank.shape == bank.shape else bank.T
        return criterion(q, k)

    return loss


def w_mse_by_the_paper(a, b):
    def white(x):
        x = x - x.mean(0)
        return np.linalg.solve(np.linalg.cholesky(x.T @ x / (len(x) - 1)), x.T).T

    return np.square(unit(white(a)) - unit(white(b))).sum(1).mean()


def directions(D):
    return unit(constant("directions", 32, D)).T


def sigreg_by_the_paper(a, b):
    def statistic(x):
        t = np.linspace(-3, 3, 33)
        cf = np.exp(1j * (x @ directions(x.shape[1]))[..., None] * t).mean(0)
        weight = np.exp(-t**2 / 2)
        return len(x) * np.trapezoid(np.abs(cf - weight) ** 2 * weight, t).mean()

    return (statistic(a) + statistic(b)) / 2


def lejepa_of_lightly(losses, torch):
    def loss(a, b):
        criterion = losses.lejepa_loss.SIGReg(num_vectors=32)
        criterion._generate_unit_vectors = lambda device, dtype, n: torch.tensor(directions(n))
        return criterion(torch.stack([a, b]))

    return loss


def three(a, b):
    """Two global views and a local one."""
    return [a, b, a / 2 - b]


def alike_by_the_paper(a, b):
    return np.mean([np.square(x - (a + b) / 2) for x in three(a, b)])


def alike_of_lightly(losses, torch):
    invariance = losses.lejepa_loss.lejepa_invariance_loss
    return lambda a, b: invariance(all_proj=torch.stack(three(a, b)), global_proj=torch.stack([a, b]))


def centroids(D):
    return unit(constant("centroids", 6, D))


def clusters(a, b):
    logits = [heads.unit(x) @ jnp.float32(centroids(a.shape[1])).T / 0.1 for x in (a, b)]
    return cluster_prediction(logits, labels(len(a)) % 6)


def clusters_by_the_paper(a, b):
    return np.mean([nll(centroids(a.shape[1]) @ x / 0.1, labels(len(a))[i] % 6)
                    for view in (a, b) for i, x in enumerate(unit(view))])


def sinkhorn_by_the_paper(scores):
    q = np.exp(scores / 0.05)
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    return q


def swav(a, b):
    return swapped_prediction([jnp.tanh(a) / 0.1, jnp.tanh(b) / 0.1],
                              [jax.lax.stop_gradient(sinkhorn(jnp.tanh(constant(n, *a.shape)), 0.05)) for n in "ab"])


def swav_by_the_paper(a, b):
    q_a, q_b = (sinkhorn_by_the_paper(np.tanh(np.float64(constant(n, *a.shape)))) for n in "ab")
    return -np.mean([q_a[i] @ np.log(softmax(np.tanh(b[i]) / 0.1)) + q_b[i] @ np.log(softmax(np.tanh(a[i]) / 0.1))
                     for i in range(len(a))]) / 2


def dino(a, b):
    return self_distillation([a, b], [constant("t", *a.shape), constant("u", *a.shape)], constant("c", a.shape[1]),
                             0.1, 0.07)


def dino_by_the_paper(a, b):
    of = [[softmax((x - np.float64(constant("c", a.shape[1]))) / 0.07) for x in np.float64(constant(n, *a.shape))]
          for n in "tu"]
    return -np.mean([of[0][i] @ np.log(softmax(b[i] / 0.1)) + of[1][i] @ np.log(softmax(a[i] / 0.1))
                     for i in range(len(a))]) / 2


def dino_of_lightly(losses, torch):
    def loss(a, b):
        criterion = losses.DINOLoss(output_dim=a.shape[1], teacher_temp=0.07)
        criterion.center.data = torch.tensor(constant("c", a.shape[1]))[None, None]
        return criterion([torch.tensor(constant(n, *a.shape)) for n in "tu"], [a, b], teacher_temp=0.07)

    return loss


def masks(B):
    """(weights [B, M] of hidden patches, those that count at all) of B // M images with M patches each, as rows."""
    M = 2 if B % 2 == 0 else 1
    hidden = np.random.default_rng(B).uniform(size=(B // M, M)) < 0.7
    return (hidden / np.maximum(hidden.sum(1, keepdims=True), 1)).astype(np.float32), hidden


def patches(a, b):
    """iBOT's loss: rows are patches of images, the second view is the teacher's logits."""
    weight, _ = masks(len(a))
    q = centred(b, constant("c", a.shape[1]), 0.07)
    return masked_prediction(*(x.reshape(*weight.shape, -1) for x in (a / 0.1, q)), weight)


def patches_by_the_paper(a, b):
    weight, _ = masks(len(a))
    c = np.float64(constant("c", a.shape[1]))
    nll_of = [-softmax((t - c) / 0.07) @ np.log(softmax(s / 0.1)) for s, t in zip(a, b, strict=True)]
    return (np.float64(weight).reshape(-1) @ nll_of) / len(weight)


def patches_of_lightly(losses, torch):
    def loss(a, b):
        weight, hidden = masks(len(a))
        criterion = losses.IBOTPatchLoss(output_dim=a.shape[1], teacher_temp=0.07)
        criterion.center.value.copy_(torch.tensor(constant("c", a.shape[1]))[None])
        chosen = torch.tensor(hidden.reshape(-1))
        return criterion(b[chosen], a[chosen], torch.tensor(hidden)[:, :, None])

    return loss


def koleo_by_the_paper(a, b):
    def of(x):
        x = unit(x)
        far = np.linalg.norm(x[:, None] - x + 1e-6, axis=2) + 1e9 * np.eye(len(x))
        return -np.log(far.min(1) + 1e-8).mean()

    return (of(a) + of(b)) / 2


def koleo_of_lightly(losses, torch):
    return lambda a, b: (losses.KoLeoLoss()(a) + losses.KoLeoLoss()(b)) / 2


def gram(a, b):
    return gram_anchoring(a[None], b[None])


def gram_by_the_paper(a, b):
    return np.square(unit(a) @ unit(a).T - unit(b) @ unit(b).T).mean()


def clip_of_transformers(losses, torch):
    criterion = pytest.importorskip("transformers.models.clip.modeling_clip").image_text_contrastive_loss
    normed = torch.nn.functional.normalize
    return lambda a, b: criterion(normed(b) @ normed(a).T / 0.2)


def siglip_of_transformers(losses, torch):
    """What the model makes of towers that give the two views."""
    siglip = pytest.importorskip("transformers.models.siglip.modeling_siglip").SiglipModel

    def loss(a, b):
        towers = {name: lambda x=x, **_: types.SimpleNamespace(pooler_output=x)
                  for name, x in (("vision_model", a), ("text_model", b))}
        model = types.SimpleNamespace(**towers, config=types.SimpleNamespace(return_dict=True),
                                      logit_scale=torch.tensor(7.0).log(), logit_bias=torch.tensor(-3.0))
        return siglip.forward(model, return_loss=True).loss

    return loss


def siglip_by_the_paper(a, b):
    sign = 2 * np.eye(len(a)) - 1
    return -np.log(1 / (1 + np.exp(-sign * (7 * unit(a) @ unit(b).T - 3)))).sum() / len(a)


def labels(B):
    return np.arange(B) % max(1, B // 3)


def sup_con_by_the_paper(a, b):
    z, y = unit(np.concatenate([a, b])), np.tile(labels(len(a)), 2)
    total = 0
    for i in range(len(z)):
        logits = np.where(np.arange(len(z)) == i, -np.inf, z @ z[i] / 0.3)
        total += np.mean([nll(logits, p) for p in range(len(z)) if p != i and y[p] == y[i]])
    return total / len(z)


PLACES = 4


def places(x, view):
    """Rows as images of so many places each, and where these lie."""
    return x.reshape(-1, PLACES, x.shape[1]), constant(f"{view} of {len(x)}", len(x) // PLACES, PLACES, 2)


def local_vicreg(a, b):
    (a, lie_a), (b, lie_b) = places(a, "a"), places(b, "b")
    return local_criterion(a, b, lie_a, lie_b, 3, (25.0, 25.0, 1.0))


def local_vicreg_by_the_paper(a, b):
    (a, lie_a), (b, lie_b) = places(a, "a"), places(b, "b")

    def matches(x, y, lie_x, lie_y):
        found = []
        for i in range(len(x)):
            far = np.linalg.norm(np.float64(lie_x[i])[:, None] - lie_y[i], axis=2)
            chosen = np.argsort(far.min(1))[:3]
            found.append((x[i][chosen], y[i][far.argmin(1)[chosen]]))
        return map(np.stack, zip(*found, strict=True))

    def criterion(x, y):
        def terms(z):
            total = 0
            for m in range(3):
                c = np.cov(z[:, m], rowvar=False)
                off = np.square(c).sum() - np.square(np.diag(c)).sum()
                total += 12.5 * np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean() + 0.5 * off / len(c)
            return total / 3

        return 25 * np.square(x - y).mean() + terms(x) + terms(y)

    return sum(criterion(*matches(x, y, lie_x, lie_y)) / 2 for x, y, lie_x, lie_y in (
        (a, b, a, b), (b, a, b, a), (a, b, lie_a, lie_b), (b, a, lie_b, lie_a)))


def local_vicreg_of_lightly(losses, torch):
    def loss(a, b):
        lie = [torch.tensor(places(x, view)[1]).reshape(-1, 2, 2, 2) for x, view in ((a, "a"), (b, "b"))]
        a, b = (x.reshape(-1, 2, 2, x.shape[1]) for x in (a, b))
        criterion = losses.VICRegLLoss(alpha=0.0, num_matches=(3, 3))
        whole = torch.zeros(len(a), 2)
        return criterion([(whole, a), (whole.clone(), b)], lie)[0]

    return loss


class Case(NamedTuple):
    """A loss of two views [B, D]; `peer` makes that of lightly or transformers of (lightly.loss, torch)."""

    ours: Callable
    paper: Callable
    peer: Callable | None = None
    target: bool = False  # the second view is a target and gets no gradient
    least: int = 1  # rows for each feature
    rows: int = 1  # a multiple of which the loss takes
    whole: bool = False  # rows are of one image, and on one device

    def enough(self, B, D):
        """At least B rows that it takes."""
        B = max(B, self.least * D)
        return B + -B % self.rows


LOSSES = {
    "vicreg": Case(vicreg, vicreg_by_the_paper, lambda losses, _: losses.VICRegLoss()),
    "barlow_twins": Case(lambda a, b: redundancy_reduction(a, b, 5e-3), barlow_by_the_paper,
                         lambda losses, _: losses.BarlowTwinsLoss()),
    "byol": Case(prediction_error, lambda p, z: np.square(unit(p) - unit(z)).sum(1).mean(), target=True),
    "simsiam": Case(negative_cosine, lambda p, z: -(unit(p) * unit(z)).sum(1).mean(),
                    lambda losses, _: losses.NegativeCosineSimilarity(), target=True),
    "simclr": Case(lambda a, b: nt_xent(heads.unit(a), heads.unit(b), 0.5), simclr_by_the_paper,
                   lambda losses, _: losses.NTXentLoss(temperature=0.5)),
    "info_nce": Case(lambda a, b: info_nce(heads.unit(a), heads.unit(b), 0.2), info_nce_by_the_paper),
    "moco": Case(moco, moco_by_the_paper, moco_of_lightly),
    "w_mse": Case(lambda a, b: 2 - 2 * mean_cosine(whitened(a), whitened(b)), w_mse_by_the_paper,
                  lambda losses, torch: lambda a, b: losses.WMSELoss(
                      embedding_dim=a.shape[1], w_size=len(a))(torch.cat([a, b])), least=2),
    "sigreg": Case(lambda a, b: (sigreg(a, directions(a.shape[1])) + sigreg(b, directions(a.shape[1]))) / 2,
                   sigreg_by_the_paper, lejepa_of_lightly),
    "alike": Case(lambda a, b: alike(three(a, b), 2), alike_by_the_paper, alike_of_lightly),
    "deepcluster": Case(clusters, clusters_by_the_paper),
    "swav": Case(swav, swav_by_the_paper, lambda losses, torch: lambda a, b: swav_of_lightly(losses, torch, a, b)),
    "dino": Case(dino, dino_by_the_paper, dino_of_lightly),
    "ibot_patches": Case(patches, patches_by_the_paper, patches_of_lightly, target=True),
    "koleo": Case(lambda a, b: (koleo(a) + koleo(b)) / 2, koleo_by_the_paper, koleo_of_lightly),
    "gram": Case(gram, gram_by_the_paper, target=True, whole=True),
    "clip": Case(lambda a, b: symmetric_info_nce(heads.unit(a), heads.unit(b), 0.2),
                 lambda a, b: (info_nce_by_the_paper(a, b) + info_nce_by_the_paper(b, a)) / 2, clip_of_transformers),
    "vicregl": Case(local_vicreg, local_vicreg_by_the_paper, local_vicreg_of_lightly, rows=4 * PLACES),
    "siglip": Case(lambda a, b: sigmoid_contrast(heads.unit(a), heads.unit(b), 7.0, -3.0), siglip_by_the_paper,
                   siglip_of_transformers),
    "sup_con": Case(lambda a, b: supervised_contrast(heads.unit(a), heads.unit(b), labels(len(a)), len(a), 0.3),
                    sup_con_by_the_paper),
}


def swav_of_lightly(losses, torch, a, b):
    criterion = losses.SwaVLoss()
    q = [losses.swav_loss.sinkhorn(torch.tanh(torch.tensor(constant(n, *a.shape)))) for n in "ab"]
    return (criterion.subloss(torch.tanh(b), q[0]) + criterion.subloss(torch.tanh(a), q[1])) / 2


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
    case = LOSSES[name]
    a, b = views(seed, case.enough(B, D), D)
    if case.target:
        assert_same(lambda x: case.ours(x, b), lambda x: case.paper(x, np.float64(b)), a, seed)
        assert not jax.grad(case.ours, 1)(a, b).any()
    else:
        assert_same(lambda x: case.ours(x[0], x[1]), lambda x: case.paper(x[0], x[1]), np.stack([a, b]), seed)


@every_loss
@pytest.mark.parametrize("seed, B, D", [(0, 4, 3), (1, 32, 16)])
def test_loss_is_that_of_its_peer(name, seed, B, D, one_device):
    torch, losses = pytest.importorskip("torch"), pytest.importorskip("lightly.loss")
    case = LOSSES[name]
    if case.peer is None:
        pytest.skip("neither lightly nor transformers has one")
    arrays = views(seed, case.enough(B, D), D)
    a, b = (torch.tensor(x, requires_grad=True) for x in arrays)
    value = case.peer(losses, torch)(a, b.detach() if case.target else b)
    value.backward()
    expected = [np.zeros_like(x) if y.grad is None else y.grad.numpy() for x, y in zip(arrays, (a, b), strict=True)]
    found, gradients = jax.value_and_grad(case.ours, (0, 1))(*arrays)
    np.testing.assert_allclose(found, value.item(), rtol=1e-5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * np.abs(expected[0]).max())


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if not case.whole])
@pytest.mark.parametrize("shape", [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=["8", "2x2x2"])
def test_loss_on_8_devices_is_that_of_one(name, shape, one_device):
    gradient = jax.jit(jax.value_and_grad(LOSSES[name].ours, (0, 1)))
    arrays = views(0, max(16, 4 * LOSSES[name].rows), 5)
    expected = jax.device_get(gradient(*arrays))
    mesh = make_mesh(**shape)
    with jax.set_mesh(mesh):
        sharded = jax.device_get(gradient(*jax.device_put(tuple(arrays), batch_sharding(mesh))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), sharded, expected)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_parts_of_all_pairs_are_all_pairs(chunks, one_device):
    a, b = (heads.unit(x) for x in views(3, 8, 5))
    whole = jax.value_and_grad(lambda a, b: symmetric_info_nce(a, b, 0.1) + sigmoid_contrast(a, b, 5.0, -2.0), (0, 1))
    parts = jax.value_and_grad(lambda a, b: symmetric_info_nce(a, b, 0.1, chunks)
                               + sigmoid_contrast(a, b, 5.0, -2.0, chunks), (0, 1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), parts(a, b), whole(a, b))
    with pytest.raises(UserError, match="config.objective.chunks=3 does not divide"):
        sigmoid_contrast(a, b, 5.0, -2.0, 3)


@pytest.mark.parametrize("log_scale, slope, expected", [(2.0, -1, -np.exp(2)), (2.0, 1, np.exp(2)),
                                                        (5.0, -1, 0), (5.0, 1, 100)])
def test_a_temperature_beyond_its_bound_comes_back(log_scale, slope, expected):
    """By gradients of a loss that falls with 1 / t and of one that rises; it goes no further."""
    value, gradient = jax.value_and_grad(lambda s: slope * inverse_temperature(s))(log_scale)
    np.testing.assert_allclose((value, gradient), (slope * min(np.exp(log_scale), 100), expected), rtol=1e-6)


def test_second_view_of_another_size_is_refused():
    conf = CONFIGS["byol_fashion_mnist"].copy_and_resolve_references()
    conf.objective.second = dict(size=8)
    with pytest.raises(UserError, match="config.objective.second.size=8 must be config.objective.view.size=16"):
        build(conf)
