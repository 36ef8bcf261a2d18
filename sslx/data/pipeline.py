"""From a source to global batches: the state of the data is one integer, the step.

Row r of global batch s is example s * B + r of one endless, deterministic, random-access dataset. A
process reads the rows that its own devices hold, so a run resumes at any step on any number of
hosts, devices and workers and sees the same rows.
"""

import functools
from collections.abc import Collection, Generator, Mapping
from typing import Any, Literal, cast

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding

from sslx import config
from sslx.config import UserError
from sslx.data import BadRecord, Example, RandomAccess, Source
from sslx.data.order import Order
from sslx.sharding import batch_shards

Batches = Generator[tuple[dict[str, jax.Array], dict[str, Any]]]  # what is on the devices, what stays on the host
OnBad = Literal["skip", "stop"]
MAX_CONSECUTIVE_BAD = 100
BESIDE = ("label", "index", "skipped")  # the inputs


def source(section: Mapping[str, Any], where: str, on_bad: OnBad) -> Source:
    """The source that a config section names: a file of sslx/data with the rest of the section."""
    return config.build("data", section, where, on_bad=on_bad)


def stream(source: Source, *, seed: int, shuffle: bool = True, on_bad: OnBad = "skip") -> "Stream":
    """Endless examples of `source`, each pass in an order of its own (`order.Order`).

    `stream[i]` is a pure function of (source, seed, i): the example's fields, `index` (its place in
    the source) and `skipped` (how many bad records were passed over to make it).
    """
    if len(source.examples) == 0:
        raise UserError(f"the data source {source.info.name} holds no example: check its path, split and limit")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed of the data is {seed}; it takes an integer from 0 to 2**32 - 1")
    return Stream(source.info.name, source.examples, Order(len(source.examples), seed, shuffle), on_bad)


class Stream:
    """Examples of a source in an endless order."""

    def __init__(self, name: str, examples: RandomAccess, order: Order, on_bad: OnBad):
        self.name, self.examples, self.order, self.on_bad = name, examples, order, on_bad

    def __getitem__(self, index: int) -> Example:
        return self.first_readable(int(self.order(np.array([index]))[0]))

    def rows(self, indices_B: np.ndarray) -> Example:
        """The examples at `indices_B`, each field stacked; one call of the source where it offers it."""
        order_B = self.order(indices_B)
        if not hasattr(self.examples, "rows"):
            return stack([self.first_readable(i) for i in order_B.tolist()])
        fields = self.examples.rows(order_B)
        return fields | {"index": order_B, "skipped": np.zeros(len(order_B), np.int64)}

    def first_readable(self, first: int) -> Example:
        """The example at `first` of the source or, past bad records, at the next index that can be read."""
        for skipped in range(MAX_CONSECUTIVE_BAD):
            index = (first + skipped) % len(self.examples)
            try:
                return {**self.examples[index], "index": np.int64(index), "skipped": np.int64(skipped)}
            except BadRecord as bad:
                if self.on_bad == "stop":
                    raise UserError(f"a bad record in {self.name}: {bad}. Repair or remove it, or let bad"
                                    " records be skipped (on_bad='skip')") from bad
                last = bad
        raise UserError(f"{MAX_CONSECUTIVE_BAD} bad records in a row in {self.name}, the last is {last}."
                        " Is this the data that was meant?")


def batches(
    dataset: Stream,
    *,
    batch_size: int,
    sharding: NamedSharding,
    first_step: int,
    last_step: int,
    workers: int = 0,
    prefetch: int = 2,
    reads: Collection[str] = (),
) -> Batches:
    """Global batches first_step, ..., last_step - 1, read and placed on the devices in the background.

    Row r of batch s is dataset[s * batch_size + r]. Each batch comes with what stays on the host:
    `index` (of this process's rows) and `skipped` (bad records passed over to make them). `label` and
    `index` are left behind, but for what the objective `reads`. Integers become int32, floats float32; bytes stay
    uint8.
    `workers` are reading processes, `prefetch` the batches kept ready at each stage (0: none, no threads).

    Raises UserError if the rows do not spread evenly over the devices; an error while reading is
    raised where the batch is awaited.
    """
    shards = batch_shards(cast(Mesh, sharding.mesh))
    if batch_size < 1 or batch_size % shards:
        raise UserError(f"config.data.batch_size is {batch_size}; it must be a multiple of the {shards} devices"
                        " (data x fsdp) that share its rows")
    rows = local_rows(sharding, batch_size)
    host = grain.MapDataset.range(first_step, last_step).map(functools.partial(read, dataset, batch_size, rows))
    onto = functools.partial(place, sharding, batch_size, reads)
    threads = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    if not workers:  # what reads a batch also places it: each thread that hands it on costs as much as to read tokens
        return closing(host.map(onto).to_iter_dataset(threads))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, also in programs without them
    read_apart = host.to_iter_dataset(threads).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch or 1))
    return closing(grain.experimental.ThreadPrefetchIterDataset(read_apart.map(onto), prefetch_buffer_size=prefetch))


def closing(dataset: grain.IterDataset) -> Generator[Any]:
    """Iterates, and ends the threads and processes behind `dataset` when the consumer stops, early or not."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, in order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices]))


def read(dataset: Stream, batch_size: int, rows: np.ndarray, step: int) -> Example:
    """Rows `rows` of global batch `step`, each field stacked."""
    return dataset.rows(step * batch_size + rows)


def place(sharding: NamedSharding, batch_size: int, reads: Collection[str],
          local: Example) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Makes global arrays of this process's rows, and keeps back what the host alone needs."""
    host = {"index": local.get("index"), "skipped": int(np.sum(local.get("skipped", 0)))}
    batch = {name: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
             for name, x in inputs(local, reads).items()}
    return batch, host


def inputs(rows: Example, reads: Collection[str]) -> Example:
    """What an objective sees of rows, in the types of its batches: inputs, and beside them what it `reads`."""
    return {name: narrow(x) for name, x in rows.items() if name in reads or name not in BESIDE}


def narrow(x: np.ndarray) -> np.ndarray:
    """int32, float32, and bytes as they are: what a device computes with."""
    if x.dtype == np.uint8 or x.dtype == np.bool_:
        return x
    return x.astype(np.float32 if np.issubdtype(x.dtype, np.floating) else np.int32, copy=False)


def stack(examples: list[Example]) -> Example:
    """The examples as one, each field stacked. Raises UserError if they have other fields, shapes or dtypes."""
    first = layout(examples[0])
    for example in examples:
        if layout(example) != first:
            raise UserError(f"example {example.get('index')} is {layout(example)}, and {examples[0].get('index')} is"
                            f" {first}: a batch takes examples of one layout")
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def layout(example: Example) -> dict[str, tuple]:
    return {name: (np.shape(x), np.asarray(x).dtype.str) for name, x in example.items()}
