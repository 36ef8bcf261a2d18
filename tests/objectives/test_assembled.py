"""Whole losses: of what an objective's towers made, recorded, NumPy in float64 makes the value once more."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from experiments import CONFIGS, first_batch
from test_joint import (
    barlow_by_the_paper,
    info_nce_by_the_paper,
    koleo_by_the_paper,
    simclr_by_the_paper,
    vicreg_by_the_paper,
    w_mse_by_the_paper,
)
from test_losses import unit

from sslx import config
from sslx.experiment import build
from sslx.objectives.joint import Tower
from sslx.objectives.token_tower import TokenTower
from sslx.views.image import block_masks


class Seen(NamedTuple):
    """A loss that was called: what its towers made, in the order of their calls, with what and with what result."""

    made: list[Any]
    images: list[jax.Array]
    o: Any
    model: Any
    params: Any
    aux: Any
    after: Any
    batch: Any
    key: jax.Array  # of the loss


def views(x, n=2):
    """The rows of each of n views, which lie side by side."""
    x = np.float64(x)
    return np.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def sinkhorn(scores, counted=None, temperature=0.05):
    """Of rows [N, K]; columns are sums over the rows that count."""
    q, counted = np.exp(scores / temperature), np.ones(len(scores), bool) if counted is None else counted
    for _ in range(3):
        q = q / q[counted].sum(0)
        q = q / q.sum(1, keepdims=True)
    return q


def crops(s, name):
    """What the student made of two large and two small crops."""
    large, small = s.made[-2:]
    return [*views(large[name]), *views(small[name])]


def swapped(targets, log_p):
    """Every target against every other crop."""
    return np.mean([-(q * p).sum(1).mean() for g, q in enumerate(targets) for v, p in enumerate(log_p) if v != g])


def of_two(criterion, name="projector"):
    return lambda s: criterion(*views(s.made[0][name]))


def moco(s):
    q, k = (unit(np.float64(made["projector"])) for made in s.made[::-1])
    queue = np.float64(s.aux["queue"]["rows"]).reshape(-1, s.o.features)

    def contrast(q, k):
        logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], 1) / s.o.temperature
        return -log_softmax(logits)[:, 0].mean()

    if not s.o.symmetric:
        return contrast(q, k)
    (q_1, q_2), (k_1, k_2) = views(q), views(k)
    return (contrast(q_1, k_2) + contrast(q_2, k_1)) / 2


def moco_v3(s):
    (k_1, k_2), (q_1, q_2) = views(s.made[0]["projector"]), views(s.made[1]["predictor"])
    return 2 * 0.2 * (info_nce_by_the_paper(q_1, k_2) + info_nce_by_the_paper(q_2, k_1))


def byol(s):
    (z_1, z_2), (p_1, p_2) = views(s.made[0]["projector"]), views(s.made[1]["predictor"])
    return sum(np.square(unit(p) - unit(z)).sum(1).mean() for p, z in ((p_1, z_2), (p_2, z_1)))


def simsiam(s):
    (z_1, z_2), (p_1, p_2) = views(s.made[0]["projector"]), views(s.made[0]["predictor"])
    return -sum((unit(p) * unit(z)).sum(1).mean() for p, z in ((p_1, z_2), (p_2, z_1))) / 2


def nnclr(s):
    (z_1, z_2), (p_1, p_2) = views(s.made[0]["projector"]), views(s.made[0]["predictor"])
    queue = np.float64(s.aux["queue"]["rows"]).reshape(-1, s.o.features)
    near_1, near_2 = (queue[(unit(z) @ queue.T).argmax(1)] for z in (z_1, z_2))
    contrast = simclr_by_the_paper if s.o.within else info_nce_by_the_paper
    np.testing.assert_allclose(s.after["queue"]["rows"][0], unit(z_1), atol=1e-5)
    return (contrast(near_1, p_2) + contrast(near_2, p_1)) / 2


def sup_con(s):
    z, label = unit(np.float64(s.made[0]["projector"])), np.repeat(np.asarray(s.batch["label"]), 2)
    own = np.eye(len(z), dtype=bool)
    log_p = log_softmax(np.where(own, -np.inf, z @ z.T / s.o.temperature))
    alike = (label[:, None] == label) & ~own
    return -np.mean([log_p[i][alike[i]].mean() for i in range(len(z))])


def swav(s):
    """In its step 1: of the queues only what step 0 left counts."""
    scores, prototypes = crops(s, "prototypes"), np.float64(s.params["prototypes"]["prototypes"])
    targets = []
    for own, queue in zip(scores, s.aux["queues"], strict=False):
        rows = np.float64(queue["rows"]).reshape(-1, s.o.features)
        along = np.concatenate([own, rows @ (prototypes / np.linalg.norm(prototypes, axis=0))])
        targets.append(sinkhorn(along, np.arange(len(along)) < 2 * len(own))[:len(own)])
    return swapped(targets, [log_softmax(x / 0.1) for x in scores])


def deepcluster(s):
    z, index = [unit(x) for x in crops(s, "projector")], np.asarray(s.batch["index"])
    losses = []
    for centroid, cluster in zip(s.aux["centroids"], s.aux["cluster"], strict=True):
        logits, known = [x @ np.float64(centroid).T / 0.1 for x in z], np.asarray(cluster)[index]
        target = np.where(known < 0, sinkhorn(logits[0], temperature=1.0).argmax(1), known)
        assert (known < 0).any() and (known >= 0).any()
        losses += [-log_softmax(x)[np.arange(len(x)), target].mean() for x in logits]
    return np.mean(losses)


def lejepa(s):
    z = crops(s, "projector")
    axes = unit(np.float64(jax.random.normal(s.key, (s.o.features, s.o.directions))).T).T
    t = np.linspace(-3, 3, 33)
    normal = np.exp(-t**2 / 2)

    def gaussian(x):
        characteristic = np.exp(1j * (x @ axes)[..., None] * t).mean(0)
        return len(x) * np.trapezoid(np.abs(characteristic - normal) ** 2 * normal, t).mean()

    alike = np.mean([np.square(x - (z[0] + z[1]) / 2).mean() for x in z])
    return (1 - s.o.weight) * alike + s.o.weight * np.mean([gaussian(x) for x in z])


def dino(s):
    """In its step 5 of a warm-up of 10."""
    logits, temperature = np.float64(s.made[0]["prototypes"]), 0.04 + 0.5 * 0.03
    targets = softmax((views(logits) - np.float64(s.aux["centre"])) / temperature)
    np.testing.assert_allclose(s.after["centre"], 0.9 * s.aux["centre"] + 0.1 * logits.mean(0), atol=1e-5)
    return swapped(targets, [log_softmax(x / 0.1) for x in crops(s, "prototypes")])


def masked(s, assign):
    """iBOT and DINOv2, by what makes assignments of (logits [N, K], those that count, name of the centre)."""
    teacher, student, small = s.made
    keys, grid = jax.random.split(s.key, 3), tuple(s.model.grid)
    weight = np.float64(block_masks(keys[0], len(s.images[0]), grid, (0.1, 0.5), 0.5)[2])
    targets = assign(np.float64(teacher.cls_logits), np.ones(len(weight), bool), "centre")
    value = swapped(views(targets), [log_softmax(x / 0.1) for x in (*views(student.cls_logits),
                                                                    *views(small.cls_logits))])
    K = teacher.patch_logits.shape[-1]
    patches = assign(np.float64(teacher.patch_logits).reshape(-1, K), weight.reshape(-1) > 0, "patch_centre")
    nll = -(patches * log_softmax(np.float64(student.patch_logits).reshape(-1, K) / 0.1)).sum(1)
    return value + s.o.patch_weight * weight.reshape(-1) @ nll / len(weight)


def ibot(s):
    def assign(logits, counted, centre):
        moved = 0.9 * s.aux[centre] + 0.1 * logits[counted].mean(0)
        np.testing.assert_allclose(s.after[centre], moved, atol=1e-5)
        return softmax((logits - np.float64(s.aux[centre])) / (0.04 + 0.5 * 0.03))

    return masked(s, assign)


def dinov2(s):
    value = masked(s, lambda logits, counted, _: sinkhorn(logits, counted, 0.04 + 0.5 * 0.03))
    a, b = views(s.made[1].cls)
    value += s.o.koleo_weight * 2 * koleo_by_the_paper(a, b)
    if s.o.get("gram_weight", 0) == 0:
        return value
    since = 5 - s.o.gram_from
    due = s.o.get("gram_anchor", s.o.gram_from) == 5 or (since > 0 and since % s.o.gram_every == 0)
    held = s.after["teacher"]["params"]["encoder"] if due else s.aux["anchor"]
    jax.tree.map(np.testing.assert_array_equal, s.after["anchor"], held)
    if since < 0:
        return value
    of_anchor = s.model.apply({"params": held}, s.images[0])[:, 1:]
    x, y = (unit(np.float64(patches)) for patches in (s.made[1].patches, of_anchor))
    return value + s.o.gram_weight * np.square(x @ x.swapaxes(1, 2) - y @ y.swapaxes(1, 2)).mean()


WARMED = dict(teacher_temperature=(0.04, 0.07), temperature_warmup=10)
TOKENS = WARMED | dict(patch_weight=0.7)
# (config, what it sets, the value by what was seen)
LOSSES: dict[str, tuple[str, dict[str, Any], Callable[[Seen], float]]] = {
    "simclr": ("simclr", dict(temperature=0.5), of_two(simclr_by_the_paper)),
    "moco": ("moco", dict(symmetric=False), moco),
    "moco, symmetric": ("moco", dict(symmetric=True), moco),
    "moco_v3": ("moco_v3", dict(temperature=0.2), moco_v3),
    "nnclr": ("nnclr", dict(temperature=0.2, within=False), nnclr),
    "nnclr, within": ("nnclr", dict(temperature=0.5, within=True), nnclr),
    "byol": ("byol", {}, byol),
    "simsiam": ("simsiam", {}, simsiam),
    "barlow_twins": ("barlow_twins", dict(off_diagonal=5e-3), of_two(barlow_by_the_paper)),
    "vicreg": ("vicreg", {}, of_two(vicreg_by_the_paper, "expander")),
    "w_mse": ("w_mse", dict(shrinkage=0.0, groups=1), of_two(w_mse_by_the_paper)),
    "w_mse, in groups": ("w_mse", dict(shrinkage=0.0, groups=2), of_two(lambda a, b: np.mean([
        w_mse_by_the_paper(a[g::2], b[g::2]) for g in range(2)]))),
    "sup_con": ("sup_con", {}, sup_con),
    "swav": ("swav", dict(queue_from=0), swav),
    "deepcluster": ("deepcluster", {}, deepcluster),
    "lejepa": ("lejepa", {}, lejepa),
    "dino": ("dino", WARMED | dict(centre_momentum=0.9), dino),
    "ibot": ("ibot", TOKENS, ibot),
    "ibot, heads apart": ("ibot", TOKENS | dict(shared_head=False), ibot),
    "dinov2": ("dinov2", TOKENS | dict(koleo_weight=0.2), dinov2),
    **{f"dinov3, {case}": ("dinov3", TOKENS | dict(koleo_weight=0.2, gram_weight=0.3, gram_every=4) | changes, dinov2)
       for case, changes in {
           "a new anchor": dict(gram_from=5), "its anchor": dict(gram_from=3), "another anchor": dict(gram_from=1),
           "an anchor for later": dict(gram_anchor=5, gram_from=7),
           "an earlier anchor": dict(gram_anchor=2, gram_from=5)}.items()},
}


def in_the_midst(aux):
    """What is carried after some steps: schedules at 5, but SwAV's at 1, centres and clusters that are not those of
    birth."""
    def moved(path, x):
        name = jax.tree_util.keystr(path)
        if "centre" in name and hasattr(x, "shape"):
            return jax.numpy.float32(np.random.default_rng(len(name)).normal(size=x.shape))
        if "cluster" in name:
            return jax.numpy.where(jax.numpy.arange(len(x)) % 2, jax.numpy.arange(len(x)) % 16, x)
        if name == "['step']":
            return jax.numpy.int32(1)
        return jax.numpy.int32(5) if "step" in name else x

    return jax.tree_util.tree_map_with_path(moved, aux)


@pytest.mark.parametrize("name", LOSSES)
def test_a_whole_loss_is_that_of_the_paper(name, monkeypatch):
    method, changes, by_the_paper = LOSSES[name]
    conf = CONFIGS[f"{method}_fashion_mnist"].copy_and_resolve_references()
    conf.objective.update(changes)
    built = build(conf, jax.devices()[:1])
    made, images = [], []
    for kind in (Tower, TokenTower):
        def recorded(self, *given, call=kind.__call__, **named):
            found = call(self, *given, **named)
            made.append(found[0] if isinstance(self, Tower) else found)
            images.append(next(x for x in given if hasattr(x, "shape") and x.ndim == 4))
            return found

        monkeypatch.setattr(kind, "__call__", recorded)
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        params, aux = built.objective.init(jax.random.key(0), batch)
        aux = in_the_midst(aux)
        keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
        # The teacher's are others.
        params = jax.tree.map(lambda x, k: x + 0.3 * x.std() * jax.random.normal(k, x.shape), params,
                              jax.tree.unflatten(jax.tree.structure(params), list(keys)))
        value, (after, _) = built.objective.loss(params, aux, batch, jax.random.key(3))
        key_loss = jax.random.split(jax.random.key(3))[1]
        model = config.build("models", conf.model, "config.model")
        seen = Seen(made, images, conf.objective, model, params, aux, after, batch, key_loss)
        np.testing.assert_allclose(value, by_the_paper(seen), rtol=1e-5)
