"""Evaluations against scikit-learn and NumPy, and the path from sources to metrics on a mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sslx import evals
from sslx.config import UserError
from sslx.data import BadRecord, Info, Source
from sslx.evals import Subject, collapse, copying, heldout, knn, probe
from sslx.objectives import Objective
from sslx.sharding import make_mesh


class Examples(list):
    """A list whose `None` is a record that cannot be read."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if example is None:
            raise BadRecord(str(index), "broken on purpose")
        return example


def blobs(seed, n, noise=2.0, classes=4, dims=12):
    centres = np.random.default_rng(0).normal(size=(classes, dims))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (centres[labels] + noise * rng.normal(size=(n, dims))).astype(np.float32), labels


def of_features(**splits):
    """A subject whose features are given: {split: (x [N, D], labels [N])}."""
    sources = {name: Source(Examples(dict(x=x, label=y) for x, y in zip(*split, strict=True)), Info(name, "image", "f"))
               for name, split in splits.items()}
    return Subject(lambda batch: batch["x"], None, sources, 8)


def images(n, seed=0, bad=()):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    rows = [dict(image=rng.integers(0, 80, (4, 4, 1), dtype=np.uint8), label=y) for y in labels]
    for row in rows:
        row["image"][:, row["label"]] += 150
    examples = Examples(None if i in bad else row for i, row in enumerate(rows))
    return Source(examples, Info("bars", "image", "f", shape=(4, 4, 1), num_classes=3, bytes_per_token=2.0))


def pixel_loss(params, aux, batch, key):
    x_B = batch["image"].astype(jnp.float32).mean((1, 2, 3)) * params
    metrics = {"loss": x_B.mean(), "tokens": x_B.sum(), "token_nll": x_B.mean(), "draw": jax.random.uniform(key)}
    return x_B.mean(), (aux, metrics)


def pixel_encode(params, aux, batch):
    x_BHW = batch["image"].astype(jnp.float32)[..., 0] * params
    return jnp.concatenate([x_BHW.mean(1), x_BHW.mean(2)], -1)


OBJECTIVE = Objective(lambda key, batch: (jnp.ones(()), ()), pixel_loss, pixel_encode)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_probe_reaches_the_optimum_of_sklearn(l2):
    x, y = blobs(1, 400)
    weight = np.full(400, 1 / 400, np.float32)
    reference = LogisticRegression(C=1 / (l2 * 400), tol=1e-8, max_iter=5000).fit(x, y)
    fit = probe.fit(x, y, weight, l2, jnp.zeros((12, 4)), jnp.zeros(4), *probe.principal_axes(x), tolerance=1e-5,
                    max_iterations=500)
    optimum = probe.logistic_loss(jnp.asarray(reference.coef_.T, jnp.float32),
                                  jnp.asarray(reference.intercept_, jnp.float32), x, y, weight, l2)
    assert fit.gradient <= 1e-5
    assert abs(probe.logistic_loss(*fit[:2], x, y, weight, l2) - optimum) < 1e-5
    assert (np.asarray(probe.predict(fit, x)) == reference.predict(x)).mean() > 0.995


def test_logistic_loss_equals_numpy():
    rng = np.random.default_rng(0)
    x, y, w, weights, bias = rng.normal(size=(6, 3)), np.array([0, 1, 1, 0, 2, 2]), rng.random(6), *map(
        rng.normal, (0, 0), (1, 1), ((3, 3), 3))
    logits = x @ weights + bias
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), y]
    expected = w @ nll + 0.25 * (weights**2).sum()
    arrays = [jnp.asarray(a, jnp.float32) for a in (weights, bias, x)]
    assert abs(probe.logistic_loss(*arrays, y, jnp.asarray(w, jnp.float32), 0.5) - expected) < 1e-5


def test_probe_accuracy_is_that_of_sklearn_whatever_the_units():
    (x, y), (x_test, y_test) = blobs(1, 600), blobs(2, 500)
    units = np.logspace(-3, 3, 12, dtype=np.float32)
    subject = of_features(train=((x + 5) * units, y), test=((x_test + 5) * units, y_test))
    metrics = probe.make(l2=(1e-2,))(subject)
    mean, std = x.mean(0), x.std(0)
    reference = LogisticRegression(C=1 / (1e-2 * 600), tol=1e-6, max_iter=2000).fit((x - mean) / std, y)
    expected = reference.score((x_test - mean) / std, y_test)
    assert abs(metrics["probe/accuracy"] - expected) <= 2 / 500
    a = metrics["probe/accuracy"]
    assert metrics["probe/stderr"] == pytest.approx(math.sqrt(a * (1 - a) / 500)) and metrics["probe/l2"] == 1e-2
    assert "probe/iterations" not in metrics


def test_probe_picks_the_penalty_that_generalizes():
    (x, y), (x_test, y_test) = blobs(1, 200, noise=3.0, dims=100), blobs(2, 400, noise=3.0, dims=100)
    subject = of_features(train=(x, y), test=(x_test, y_test))
    assert probe.make(l2=(1e-6, 0.3))(subject)["probe/l2"] == 0.3
    alone = {l2: probe.make(l2=(l2,))(subject)["probe/accuracy"] for l2 in (1e-6, 0.3)}
    assert alone[0.3] > alone[1e-6]


def test_an_unfinished_probe_says_so():
    metrics = probe.make(l2=(1e-3,), max_iterations=2)(of_features(train=blobs(1, 100), test=blobs(2, 50)))
    assert metrics["probe/iterations"] == 2


def test_constant_features_do_not_break_the_probe():
    (x, y), (x_test, y_test) = blobs(1, 200), blobs(2, 200)
    x[:, 3] = x_test[:, 3] = 0.1
    metrics = probe.make()(of_features(train=(x, y), test=(x_test, y_test)))
    assert metrics["probe/accuracy"] > 0.4


@pytest.mark.parametrize("k", [1, 5])
def test_knn_votes_as_sklearn(k):
    (x, y), (x_test, y_test) = blobs(1, 300), blobs(2, 200)
    reference = KNeighborsClassifier(k, metric="cosine").fit(x, y)
    shares = np.sort(reference.predict_proba(x_test), 1)
    clear = shares[:, -1] > shares[:, -2]
    elected = knn.elect(knn.unit(jnp.asarray(x_test)), knn.unit(jnp.asarray(x)), jnp.asarray(y), k=k, n_classes=4)
    np.testing.assert_array_equal(np.asarray(elected)[clear], reference.predict(x_test)[clear])
    assert 0.5 < clear.mean() and (k > 1 or clear.all())
    metrics = knn.make(k=k, chunk=64)(of_features(train=(x, y), test=(x_test, y_test)))
    assert metrics["knn/accuracy"] == pytest.approx((np.asarray(elected) == y_test).mean())


def test_a_tied_vote_goes_to_the_nearest():
    angles = np.array([0.1, 0.2, 0.3, 0.4, 3.0])
    keys = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    elected = knn.elect(jnp.array([[1.0, 0.0]]), jnp.asarray(keys), jnp.array([2, 1, 1, 2, 0]), k=4, n_classes=3)
    assert elected.tolist() == [2]


@pytest.mark.parametrize("shape", [(200, 16), (10, 30)])
def test_rankme_equals_numpy_svd(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * np.logspace(0, -3, shape[1], dtype=np.float32)
    sigma = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert collapse.rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_signs_of_collapse():
    x = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    assert collapse.rankme(x) > 15.5 and collapse.feature_std(x) == pytest.approx(1, abs=0.02)
    point = np.ones((2000, 16), np.float32) * x[0]
    assert collapse.rankme(point) == pytest.approx(1, abs=1e-3) and collapse.feature_std(point) < 1e-4
    assert collapse.rankme(np.zeros((10, 4), np.float32)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=2, tensor=2)])
def test_features_are_those_of_each_example_in_order_without_padding_and_bad_records(axes):
    source = images(21, bad=(4,))
    seen = {}

    def spy(subject):
        seen["features"], seen["labels"] = subject.features("train")
        return {}

    mesh = make_mesh(**axes)
    evaluate = evals.assemble({"spy": spy}, dict(train=source), OBJECTIVE, mesh, batch_size=8)
    with jax.set_mesh(mesh):  # as the loop calls it, with parameters that live on the mesh
        evaluate.evaluate(jax.device_put(jnp.float32(2.0), NamedSharding(mesh, P())), ())
    good = [list.__getitem__(source.examples, i) for i in range(21) if i != 4]
    x = np.stack([e["image"] for e in good])[..., 0] * 2.0
    np.testing.assert_allclose(seen["features"], np.concatenate([x.mean(1), x.mean(2)], -1), rtol=1e-5)
    assert seen["labels"].tolist() == [e["label"] for e in good]


def test_heldout_is_the_token_weighted_mean_and_the_same_every_time():
    source = images(30)
    evaluate = evals.assemble({"heldout": heldout.make(batches=5)}, dict(heldout=source), OBJECTIVE, make_mesh(),
                              batch_size=8)
    metrics = evaluate.evaluate(jnp.float32(1.0), ())
    means = np.stack([e["image"].mean() for e in source.examples])[:24].reshape(3, 8)
    expected = np.average(means.mean(1), weights=means.sum(1))
    assert metrics["heldout/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["heldout/bits_per_byte"] == pytest.approx(expected / math.log(2) / 2.0, rel=1e-5)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(3)]
    draws = [float(jax.random.uniform(k)) for k in keys]
    assert metrics["heldout/draw"] == pytest.approx(np.average(draws, weights=means.sum(1)), rel=1e-5)
    assert evaluate.evaluate(jnp.float32(1.0), ()) == metrics and "heldout/tokens" not in metrics


@pytest.mark.parametrize("copies", [False, True])
def test_copying_is_what_reading_the_same_before_gains(copies):
    """A model of 50 equal tokens; one that copies is certain of what stands half a window before."""
    rows = [dict(tokens=x) for x in np.random.default_rng(0).integers(0, 50, (24, 16))]

    def loss(batch, number):
        tokens = batch["tokens"]
        nll = np.full(tokens.shape, np.log(50.0))
        if copies:
            nll[:, 8:][tokens[:, 8:] == tokens[:, :8]] = 0.0
        return {"loss": nll.mean(), "tokens": tokens.size}

    subject = Subject(lambda batch: None, loss, dict(heldout=Source(Examples(rows), Info("t", "text", "f"))), 8)
    expected = np.log(50.0) if copies else 0.0  # but for one token in 50 that is equal by chance
    assert copying.make(batches=3)(subject)["copying/gain"] == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_copying_is_of_text():
    subject = Subject(lambda batch: None, lambda batch, number: {}, dict(heldout=images(8)), 8)
    with pytest.raises(UserError, match="no tokens: remove it"):
        copying.make()(subject)


def test_raw_baseline_has_the_accuracies_of_pixels():
    evaluations = dict(probe=probe.make(), knn=knn.make(), collapse=collapse.make(), heldout=heldout.make())
    splits = dict(train=images(90), test=images(45, seed=1), heldout=images(16))
    evaluate = evals.assemble(evaluations, splits, OBJECTIVE, make_mesh(), batch_size=16)
    raw = evaluate.baseline_raw()
    assert set(raw) == {"probe/accuracy@raw", "knn/accuracy@raw"} and min(raw.values()) > 0.95
    with jax.set_mesh(make_mesh()):
        trained = evaluate.evaluate(jnp.float32(1.0), ())
    assert trained["probe/accuracy"] > 0.95
    assert {"rankme", "feature_std", "heldout/loss", "knn/accuracy"} <= set(trained)


def test_raw_features_of_tokens_are_shares():
    batch = dict(tokens=np.array([[1, 1, 3, 5000]], np.int32))
    features = evals.raw_features(batch)
    assert features[0, [1, 3, 5000 - 4096]].tolist() == [0.5, 0.25, 0.25] and features.sum() == 1


@pytest.mark.parametrize("section, message", [
    (dict(probee=dict()), "probe"),
    (dict(probe=dict(l3=(1.0,))), "evals.probe.l3"),
    (dict(probe=dict(l2=(0.0,))), "evals.probe.l2"),
    (dict(knn=5), "evals.knn is 5"),
    (dict(knn=dict(k=0)), "evals.knn.k is 0; it takes a positive integer"),
    (dict(batch_size=12), "evals.batch_size is 12"),
    (dict(batch_size="often"), "evals.batch_size"),
    (dict(labelled=dict(trian=dict())), "did you mean 'train'"),
])
def test_mistakes_name_the_field(section, message):
    with pytest.raises(UserError, match=message):
        evals.make(section, OBJECTIVE, make_mesh())


def test_a_missing_split_says_where_to_add_it():
    with pytest.raises(UserError, match="evals.labelled.train"):
        evals.make(dict(batch_size=8, probe=dict()), OBJECTIVE, make_mesh())


def test_a_source_that_nothing_reads_and_one_that_is_too_small_are_refused():
    labelled = dict(train=dict(name="digits", split="train"), test=dict(name="digits", split="test"))
    with pytest.raises(UserError, match=r"unknown key evals.knn.source: this evaluation reads train and test"):
        evals.make(dict(batch_size=8, labelled=labelled, knn=dict(source=labelled["test"])), OBJECTIVE, make_mesh())
    with pytest.raises(UserError, match=r"evals.knn takes at least 1438 examples of the split 'train', .* has 1437"):
        evals.make(dict(batch_size=8, labelled=labelled, knn=dict(k=1438)), OBJECTIVE, make_mesh())
    with pytest.raises(UserError, match=r"at least 368 examples \(evals.batch_size\) of the split 'heldout', .* 360"):
        evals.make(dict(batch_size=368, heldout=dict(source=labelled["test"])), OBJECTIVE, make_mesh())


def test_too_little_held_out_data_is_an_error():
    evaluate = evals.assemble({"heldout": heldout.make()}, dict(heldout=images(5)), OBJECTIVE, make_mesh(),
                              batch_size=8)
    with pytest.raises(UserError, match="fewer than one batch"):
        evaluate.evaluate(jnp.float32(1.0), ())
