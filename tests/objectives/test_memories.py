"""What is carried from batch to batch: queues, memories of all examples, clusters; on 8 devices as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import CONFIGS, experiment
from test_losses import unit

from sslx import state
from sslx.config import UserError
from sslx.experiment import build
from sslx.models import resnet
from sslx.objectives import memory
from sslx.objectives.assignment import sinkhorn
from sslx.objectives.contrast import Queue
from sslx.objectives.crops import Crops
from sslx.objectives.deepcluster import UNSEEN, k_means
from sslx.objectives.joint import Tower, objective
from sslx.sharding import batch_sharding, make_mesh

MESHES = {"1": None, "8": dict(data=8), "2x2x2": dict(data=2, fsdp=2, tensor=2)}


@pytest.fixture(params=MESHES)
def on_mesh(request):
    """Places the rows of arrays on a mesh, which is set."""
    shape = MESHES[request.param]
    mesh = make_mesh(**shape) if shape else make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield lambda x: jax.device_put(x, batch_sharding(mesh))


def rows(seed, *shape):
    return unit(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def as_set(x):
    return {tuple(np.round(row, 5)) for row in np.asarray(x).reshape(-1, x.shape[-1])}


@pytest.mark.parametrize("batch", [16, 8])
def test_a_queue_holds_the_newest_rows(on_mesh, batch):
    """Filled by batches of 16, or by halves of them, as micro-batches are; the oldest leave first."""
    queue = Queue(48, 4)
    carried = queue.begin(jax.random.key(0), 16)
    at_first, pushed = as_set(carried["rows"]), []
    push = jax.jit(queue.push)
    for i in range(10):
        pushed.append(rows(i, batch, 4))
        carried = push(carried, on_mesh(pushed[-1]))
        newest = as_set(np.concatenate(pushed)[-48:])
        assert newest <= as_set(carried["rows"]) <= newest | at_first
        assert len(as_set(carried["rows"])) == 48


def test_a_queue_of_another_size_than_batches_fill_is_refused(on_mesh):
    with pytest.raises(UserError, match="config.objective.queue=40 is no multiple of the 16 images of a batch"):
        Queue(40, 4).begin(jax.random.key(0), 16)
    carried = Queue(48, 4).begin(jax.random.key(0), 16)
    with pytest.raises(UserError, match="batches that divide 16, not 24"):
        Queue(48, 4).push(carried, jnp.zeros((24, 4)))


def test_sums_and_neighbours_are_over_all_of_a_queue(on_mesh):
    queue, asked = Queue(48, 4), rows(1, 16, 4)
    carried = queue.begin(jax.random.key(0), 16)
    whole = np.float64(carried["rows"]).reshape(-1, 4)
    found = jax.jit(queue.log_sum_exp, static_argnums=2)(carried, on_mesh(asked), 0.1)
    np.testing.assert_allclose(found, np.log(np.exp(asked @ whole.T / 0.1).sum(1)), rtol=1e-5)
    nearest = jax.jit(queue.nearest)(carried, on_mesh(asked))
    np.testing.assert_allclose(nearest, whole[(asked @ whole.T).argmax(1)], rtol=1e-6)


def test_a_queue_gets_no_gradient(on_mesh):
    queue, asked = Queue(32, 4), on_mesh(rows(1, 16, 4))
    carried = queue.begin(jax.random.key(0), 16)
    of_rows = jax.jit(jax.grad(lambda x: queue.push(carried, x)["rows"].sum() + queue.nearest(carried, x).sum()))(asked)
    of_queue = jax.jit(jax.grad(lambda r: queue.nearest(carried | {"rows": r}, asked).sum()))(carried["rows"])
    assert not of_rows.any() and not of_queue.any()


def test_sinkhorn_is_over_the_global_batch(on_mesh):
    scores = np.tanh(rows(0, 16, 6))
    q = np.exp(np.float64(scores) / 0.05)
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdims=True)
    np.testing.assert_allclose(jax.jit(lambda s: sinkhorn(s, 0.05))(on_mesh(scores)), q, rtol=1e-4, atol=1e-6)
    even = jax.jit(lambda s: sinkhorn(s, 0.05, 300))(on_mesh(scores))
    np.testing.assert_allclose(even.sum(0), 16 / 6, rtol=1e-3)
    counted = np.arange(16)[:, None] < 8
    part = jax.jit(lambda s: sinkhorn(s, 0.05, 3, counted))(on_mesh(scores))
    np.testing.assert_allclose(np.asarray(part)[:8], sinkhorn(scores[:8], 0.05), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(part.sum(1), 1, rtol=1e-5)
    assert np.isfinite(sinkhorn(scores, 0.05, 3, np.zeros((16, 1), bool))).all()


def test_a_memory_is_written_where_an_example_is(on_mesh):
    expected, index = np.zeros((memory.PARTS, 3), np.float32), np.random.default_rng(0).permutation(100)
    held = memory.spread(100, 3)
    assert held.shape == expected.shape
    for step in range(6):
        of_step, new = index[16 * step:16 * (step + 1)], rows(step, 16, 3)
        held = jax.jit(memory.write)(held, on_mesh(of_step), on_mesh(new))
        expected[of_step] = new
        np.testing.assert_array_equal(held, expected)
    np.testing.assert_array_equal(jax.jit(memory.lookup)(held, np.array([3, 99, 3])), expected[[3, 99, 3]])


def test_k_means_is_that_of_all_rows(on_mesh):
    x = rows(0, 64, 5)
    x[-8:] = 0
    expected = np.float64(x[:4])
    for _ in range(10):
        cluster = (x @ expected.T).argmax(1)
        sums = [x[:-8][cluster[:-8] == k].sum(0) for k in range(4)]
        expected = np.stack([unit(s) if s.any() else old for s, old in zip(sums, expected, strict=True)])
    centroids, cluster = jax.jit(k_means, static_argnums=2)(on_mesh(x), x[:4], 10)
    np.testing.assert_allclose(centroids, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(cluster)[:-8], (x @ expected.T).argmax(1)[:-8])
    assert (np.asarray(cluster)[-8:] == UNSEEN).all()


def test_what_an_objective_reads_beside_images_is_on_the_devices():
    built = experiment("sup_con_fashion_mnist")
    batch, host = next(built.batches(3, 4))
    rows = [built.source.examples[i] for i in host["index"]]
    assert set(batch) == {"image", "label"}
    np.testing.assert_array_equal(batch["label"], [row["label"] for row in rows])
    built = experiment("deepcluster_fashion_mnist")
    batch, host = next(built.batches(3, 4))
    assert set(batch) == {"image", "index"}
    np.testing.assert_array_equal(batch["index"], host["index"])


def test_an_objective_that_learns_from_labels_takes_no_data_without():
    built = experiment("sup_con_fashion_mnist")
    without = built.source._replace(info=built.source.info._replace(num_classes=None))
    conf = CONFIGS["sup_con_fashion_mnist"].copy_and_resolve_references()
    conf.mesh = dict(data=1)
    with pytest.raises(UserError, match="config.objective.name='sup_con' learns from labels, and 'digits/train' has"):
        build(conf, jax.devices()[:1], without)


@pytest.mark.parametrize("name", ["sup_con", "deepcluster", "moco"])
def test_heldout_loss_is_of_other_examples(name):
    conf = CONFIGS[f"{name}_fashion_mnist"].copy_and_resolve_references()
    conf.mesh, conf.evals = dict(data=1), dict(batch_size=16, heldout=dict(batches=2, source=dict(name="digits",
                                                                                                  split="test")))
    built = build(conf, jax.devices()[:1])
    with jax.set_mesh(built.mesh):
        start = state.create(built.objective, built.optimizer, 0, next(built.batches(0, 1))[0])
        found = built.evaluation.evaluate(start.params, start.aux)
    assert np.isfinite(found["heldout/loss"]) and found["heldout/loss"] > 0.1


def test_random_numbers_of_a_loss_are_not_those_of_its_crops():
    seen = []

    def view(key, images):
        seen.append(key)
        return images

    def loss(params, aux, drawn):
        seen.append(drawn.key)
        return jnp.float32(0), aux

    built = experiment("simclr_fashion_mnist")
    tower = Tower(resnet.make(stages=(1,), width=8, dtype="float32"), {})
    with jax.set_mesh(built.mesh):
        batch, _ = next(built.batches(0, 1))
        for crops in (Crops([view, view]), Crops([view, view], view, 2)):
            seen.clear()
            objective(tower, built.source.info, crops, loss).loss({}, {}, batch, jax.random.key(3))
            keys = {tuple(jax.random.key_data(key).tolist()) for key in seen}
            assert len(keys) == len(seen) == 3 + (crops.small is not None)
