"""Batches are a pure function of (source, seed, step), on any number of devices and workers."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sslx.config import UserError
from sslx.data import BadRecord, Info, Source, pipeline
from sslx.data.arrays import Arrays
from sslx.data.mixture import locate
from sslx.data.windows import Windows
from sslx.sharding import batch_sharding, make_mesh

ROOT = str(pathlib.Path(__file__).parents[2])


class Bad:
    """Example i is i; `bad` ones cannot be read."""

    def __init__(self, n, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"record {index}", "garbled")
        return {"x": np.int64(index)}


def numbers(n, bad=()):
    return Source(Bad(n, bad), Info("numbers", "text", "f"))


def in_memory(n):
    return Source(Arrays(x=np.arange(n)), Info("arrays", "text", "f"))


def sharding():
    return batch_sharding(make_mesh(data=1, devices=jax.devices()[:1]))


def consume(dataset, first, last, batch_size=4, **options):
    found = pipeline.batches(dataset, batch_size=batch_size, sharding=sharding(), first_step=first, last_step=last,
                             **options)
    return [(np.asarray(b["x"]).tolist(), h["index"].tolist(), h["skipped"]) for b, h in found]


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_every_pass_is_a_permutation(n):
    dataset = pipeline.stream(numbers(n), seed=3)
    passes = [[int(dataset[e * n + i]["x"]) for i in range(n)] for e in range(4)]
    assert all(sorted(p) == list(range(n)) for p in passes)
    if n == 100:
        assert len({tuple(p) for p in passes}) == 4
        assert passes[0] != [int(pipeline.stream(numbers(n), seed=4)[i]["x"]) for i in range(n)]
        # The order of one seed's second pass is not that of the next seed's first.
        assert passes[1] != [int(pipeline.stream(numbers(n), seed=4)[i]["x"]) for i in range(n)]


def test_without_shuffle_the_order_is_the_natural_one():
    dataset = pipeline.stream(numbers(5), seed=0, shuffle=False)
    assert [int(dataset[i]["x"]) for i in range(12)] == [i % 5 for i in range(12)]


@pytest.mark.parametrize("first", [0, 1, 5, 9])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resume_at_any_step_sees_the_same_rows(first, prefetch):
    dataset = pipeline.stream(numbers(17, bad=(3, 4)), seed=1)
    whole = consume(dataset, 0, 10)
    assert consume(dataset, first, 10, prefetch=prefetch) == whole[first:]
    assert [row for batch, _, _ in whole for row in batch] == [int(dataset[i]["x"]) for i in range(40)]


@pytest.mark.parametrize("seed", range(3))
def test_bad_records_are_passed_over_as_a_function_of_the_index(seed):
    dataset = pipeline.stream(numbers(9, bad=(2, 3, 8)), seed=seed)
    good = pipeline.stream(numbers(9), seed=seed)
    goes_to = {2: (4, 2), 3: (4, 1), 8: (0, 1)}
    for i in range(30):
        wanted = int(good[i]["x"])
        assert (int(dataset[i]["index"]), int(dataset[i]["skipped"])) == goes_to.get(wanted, (wanted, 0))
    skipped = sum(s for _, _, s in consume(dataset, 0, 9, batch_size=1))
    assert skipped == 4


def test_too_many_bad_records_are_an_error():
    with pytest.raises(UserError, match="100 bad records in a row"):
        pipeline.stream(numbers(500, bad=range(500)), seed=0)[7]


@pytest.mark.parametrize("source", [
    in_memory(23),
    Source(Windows([np.arange(57), np.arange(9)], [57, 9], 5, eod=3), Info("w", "text", "f")),
], ids=["arrays", "windows"])
def test_the_fast_path_equals_the_slow_one(source):
    dataset = pipeline.stream(source, seed=5)
    indices = np.array([0, 3, 3, 40, 7])
    fast, slow = dataset.rows(indices), pipeline.stack([dataset[int(i)] for i in indices])
    assert fast.keys() == slow.keys()
    for name in fast:
        np.testing.assert_array_equal(fast[name], slow[name])


def test_types_on_the_device():
    fields = dict(image=np.zeros((4, 2, 2, 1), np.uint8), tokens=np.zeros((4, 3), np.uint16), label=np.arange(4),
                  audio=np.zeros((4, 2)))
    dataset = pipeline.stream(Source(Arrays(**fields), Info("a", "image", "f")), seed=0)
    (batch, host), = pipeline.batches(dataset, batch_size=2, sharding=sharding(), first_step=0, last_step=1)
    assert {n: str(x.dtype) for n, x in batch.items()} == {"image": "uint8", "tokens": "int32", "audio": "float32"}
    assert host["skipped"] == 0 and len(host["index"]) == 2


DEVICES = '''
import jax, numpy as np
from sslx.config import UserError
from sslx.data import Info, Source, pipeline
from sslx.data.arrays import Arrays
from sslx.sharding import batch_sharding, make_mesh

dataset = pipeline.stream(Source(Arrays(x=np.arange(50)), Info("a", "text", "f")), seed=2)
expected = [[int(dataset[s * 8 + r]["x"]) for r in range(8)] for s in range(9)]
for shape in (dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, tensor=2), dict(data=1, tensor=8)):
    sharding = batch_sharding(make_mesh(**shape))
    found = pipeline.batches(dataset, batch_size=8, sharding=sharding, first_step=3, last_step=9)
    for step, (batch, host) in enumerate(found, start=3):
        assert np.asarray(batch["x"]).tolist() == expected[step], shape
        assert batch["x"].sharding == sharding, batch["x"].sharding
        for shard in batch["x"].addressable_shards:
            assert np.asarray(shard.data).tolist() == expected[step][shard.index[0]]
try:
    pipeline.batches(dataset, batch_size=12, sharding=batch_sharding(make_mesh(data=8)), first_step=0, last_step=1)
except UserError as error:
    assert "config.data.batch_size" in str(error)
else:
    raise AssertionError
'''


def test_rows_are_the_same_on_any_mesh():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT,
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


PROCESS = '''
import sys, jax, numpy as np
port, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=30)
from sslx.data import Info, Source, pipeline
from sslx.data.arrays import Arrays
from sslx.sharding import batch_sharding, make_mesh

class Watched(Arrays):
    def rows(self, indices_B):
        assert len(indices_B) == 4  # this process's half, no more
        return super().rows(indices_B)

dataset = pipeline.stream(Source(Watched(x=np.arange(50)), Info("a", "text", "f")), seed=2)
d = jax.devices()
for devices in (d, [d[0], d[2], d[1], d[3]]):  # the second: each process's rows are not contiguous
    sharding = batch_sharding(make_mesh(devices=devices))
    for step, (batch, host) in enumerate(pipeline.batches(dataset, batch_size=8, sharding=sharding, first_step=3,
                                                          last_step=5), start=3):
        expected = dataset.order(step * 8 + np.arange(8)).tolist()
        for shard in batch["x"].addressable_shards:
            assert np.asarray(shard.data).tolist() == expected[shard.index[0]]
'''


def test_a_process_reads_only_its_rows():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT,
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, port, str(rank)], env=environment,
                                stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [p.communicate(timeout=60)[1] for p in started]
    assert [p.returncode for p in started] == [0, 0], errors[0][-1500:] + errors[1][-1500:]


def test_workers_give_the_same_rows():
    dataset = pipeline.stream(numbers(17, bad=(3,)), seed=1)
    assert consume(dataset, 2, 9, workers=2) == consume(dataset, 2, 9)


def test_an_error_in_a_worker_reaches_the_consumer():
    with pytest.raises(Exception, match="garbled"):
        consume(pipeline.stream(numbers(8, bad=(3,)), seed=1, on_bad="stop"), 0, 9, workers=1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_the_background_reaches_the_consumer(prefetch):
    with pytest.raises(UserError, match="record 3: garbled"):
        consume(pipeline.stream(numbers(8, bad=(3,)), seed=1, on_bad="stop"), 0, 9, prefetch=prefetch)


def test_no_thread_survives_an_early_stop():
    before = set(threading.enumerate())
    found = pipeline.batches(pipeline.stream(numbers(8), seed=1), batch_size=2, sharding=sharding(), first_step=0,
                             last_step=10**6)
    next(found)
    assert set(threading.enumerate()) - before
    found.close()
    for _ in range(100):
        if not (left := {t for t in threading.enumerate() if t not in before and t.is_alive()}):
            return
        time.sleep(0.05)
    raise AssertionError(left)


@pytest.mark.parametrize("kwargs", [dict(seed=-1), dict(seed=2**32)])
def test_the_seed_is_checked(kwargs):
    with pytest.raises(UserError, match="seed"):
        pipeline.stream(numbers(3), **kwargs)


# --- mixtures


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (7, 2, 1), (1, 999)])
def test_a_mixture_keeps_its_proportions_everywhere(weights):
    n = 20 * sum(weights)
    part_N, place_N = locate(np.arange(n), weights)
    share = np.array(weights) / sum(weights)
    for k in range(len(weights)):
        assert place_N[part_N == k].tolist() == list(range(20 * weights[k]))  # each source in its order, no gap
        drift = np.cumsum(part_N == k) - share[k] * np.arange(1, n + 1)
        assert np.abs(drift).max() <= len(weights)


def test_a_mixture_reads_its_sources(tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * (40 if name == "a" else 400))
    sections = {n: dict(name="text", path=str(tmp_path / f"{n}.txt"), split="all", length=4) for n in "ab"}
    section = dict(name="mixture", sources=sections, weights={"a": 0.75, "b": 0.25})
    mixed = pipeline.source(section, "config.data", "skip")
    assert len(mixed.examples) == 400  # 100 windows of b at one in four; a's 10 repeat
    rows = mixed.examples.rows(np.arange(400))["tokens"]
    assert (rows[:, 0] == ord("a")).sum() == 300
    for i in range(0, 400, 37):
        np.testing.assert_array_equal(mixed.examples[i]["tokens"], rows[i])
    seen = pipeline.stream(mixed, seed=0)
    assert 250 < sum(int(seen[i]["tokens"][0]) == ord("a") for i in range(400)) <= 300


@pytest.mark.parametrize("change, message", [
    (dict(weights=(1.0,)), "config.data.weights are 1 for 2"),
    (dict(weights={"a": 1.0, "c": 1.0}), "config.data.weights are for a, c"),
    (dict(weights=(1.0, 0.0)), "positive"),
    (dict(sources={"a": dict(name="digits", split="train"), "b": dict(name="text", length=8)}), "differ in modality"),
    (dict(sources={"a": dict(name="digits", splt="train")}), "config.data.sources.a.splt"),
])
def test_a_mixture_names_what_is_wrong(change, message):
    digits = {n: dict(name="digits", split="train") for n in "ab"}
    with pytest.raises(UserError, match=message):
        pipeline.source(dict(name="mixture", sources=digits, weights=(1.0, 1.0)) | change, "config.data", "skip")
