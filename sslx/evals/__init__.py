"""Evaluations: numbers about frozen parameters. One file per evaluation.

The `make(...)` of a file returns `Subject -> {metric: number}`; its keyword arguments are the schema of the
section of that name in `config.evals`. Beside these sections, config.evals holds

    batch_size  rows of the batches that are evaluated; by default 256, or the next multiple of the mesh's shards.
    labelled    sections of the sources `train` and `test`, whose examples carry `label`.

An evaluation whose section has a `source` gets the built source as the split of its own name.
"""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sslx import config, distributed
from sslx.config import Count, UserError
from sslx.data import Source, pipeline
from sslx.objectives import Aux, Objective, Params
from sslx.sharding import batch_sharding, batch_shards

HostBatch = dict[str, np.ndarray]

MACHINERY = ("batch_size", "labelled")
TAKEN = {"project": "projections, of which config.objective compares none",
         "embed": "pairs of images and captions, which config.objective does not bring together"}


class Subject:
    """Frozen parameters under evaluation, with the features of each split computed once.

    `encode` maps a host batch to features float32 [B, D] on the host; `loss` maps a host batch and its
    number, which fixes its key, to metrics, or is None where there is no objective (raw inputs), which `reads` some
    fields beside the inputs. `project` maps a host batch to projections, and `embed` to the unit vectors of both sides
    of its pairs; None if the objective has none.
    """

    def __init__(self, encode: Callable[[HostBatch], np.ndarray],
                 loss: Callable[[HostBatch, int], dict[str, jax.Array]] | None,
                 splits: Mapping[str, Source], batch_size: int, on_bad: pipeline.OnBad = "skip",
                 reads: Sequence[str] = (), project: Callable[[HostBatch], np.ndarray] | None = None,
                 embed: Callable[[HostBatch], dict[str, np.ndarray]] | None = None):
        self.encode, self.loss, self.splits, self.batch_size, self.on_bad = encode, loss, splits, batch_size, on_bad
        self.reads, self.project, self.embed = reads, project, embed
        self.computed: dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]] = {}

    def features(self, split: str, rows: int | None = None,
                 of: Literal["features", "projections"] = "features") -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [N, D] of the readable ones of a split's examples, and labels int [N] (-1 for none).

        rows: of the first ones only.
        """
        source = self.split(split)
        n = min(rows or len(source.examples), len(source.examples))
        if (split, n, of) not in self.computed:
            encode = self.encode if of == "features" else self.project
            assert encode is not None
            features, labels = [], []
            for batch, counts in batches(source, self.batch_size, self.on_bad, n):
                features.append(encode(pipeline.inputs(batch, self.reads))[counts])
                labels.append(batch["label"][counts] if "label" in batch else np.full(counts.sum(), -1))
            self.computed[split, n, of] = np.concatenate(features), np.concatenate(labels).astype(np.int64)
        return self.computed[split, n, of]

    def embeddings(self, split: str, rows: int | None = None) -> dict[str, np.ndarray]:
        """{"image", "text": float32 [N, D], "label": int [N]} of the readable ones of a split's first pairs."""
        assert self.embed is not None
        source, found = self.split(split), collections.defaultdict(list)
        n = min(rows or len(source.examples), len(source.examples))
        for batch, counts in batches(source, self.batch_size, self.on_bad, n):
            for name, x in (self.embed(pipeline.inputs(batch, self.reads)) | {"label": batch.get("label")}).items():
                if x is not None:
                    found[name].append(x[counts])
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def texts(self, tokens_NT: np.ndarray, segments_NT: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Embeddings [N, D] of texts, beside black pictures of this shape."""
        assert self.embed is not None
        black, found = np.zeros((self.batch_size, *shape), np.uint8), []
        for first in range(0, len(tokens_NT), self.batch_size):
            rows = np.minimum(np.arange(first, first + self.batch_size), len(tokens_NT) - 1)
            batch = {"image": black, "tokens": tokens_NT[rows], "segment_ids": segments_NT[rows]}
            found.append(self.embed(batch)["text"])
        return np.concatenate(found)[: len(tokens_NT)]

    def split(self, name: str) -> Source:
        """The source of a split. Raises UserError if the config has none."""
        if name not in self.splits:
            where = f"evals.labelled.{name}" if name in ("train", "test") else f"evals.{name}.source"
            raise UserError(f"an evaluation needs the split {name!r}, and {where} is not in the config:"
                            " add the section of a data source there, or remove the evaluation")
        return self.splits[name]


class Evaluation(NamedTuple):
    """measure: Subject -> {metric: number}.
    splits:  those it reads, with the least number of examples; None for a batch.
    takes:   what an objective must have for it, of "project" and "embed"; of a subject without, such as raw inputs, it
             says nothing.
    """

    measure: Callable[[Subject], dict[str, float]]
    splits: Mapping[str, int | None]
    takes: Sequence[str] = ()

    def __call__(self, subject: Subject) -> dict[str, float]:
        return {} if any(getattr(subject, name) is None for name in self.takes) else self.measure(subject)


class Evaluate(NamedTuple):
    """evaluate:     (params, aux) -> metrics of all evaluations of the config.
    baseline_raw: () -> accuracies `<metric>@raw` with the inputs themselves as features.
    splits:       the sources that are read, in batches of `batch_size`.
    """

    evaluate: Callable[[Params, Aux], dict[str, float]]
    baseline_raw: Callable[[], dict[str, float]]
    splits: Mapping[str, Source]
    batch_size: int


def make(section: Mapping[str, Any], objective: Objective, mesh: jax.sharding.Mesh,
         on_bad: pipeline.OnBad = "skip") -> Evaluate:
    """The evaluations of `config.evals`, compiled once for all their calls.

    Raises UserError for unknown keys, sources that cannot be opened or are missing or too small, and a batch size that
    does not divide over the mesh.
    """
    if not hasattr(section, "items"):
        raise UserError(f"config.evals is {section!r}; it takes a section, dict() for no evaluation")
    settings = config.call(machinery, {k: section[k] for k in MACHINERY if k in section}, "evals")
    shards = batch_shards(mesh)
    batch_size = shards * math.ceil(256 / shards) if settings.batch_size is None else settings.batch_size
    if batch_size % shards:
        raise UserError(f"evals.batch_size is {batch_size}; it takes a positive multiple of the {shards} shards of a"
                        " batch on this mesh (data x fsdp)")
    splits = {k: pipeline.source(s, f"evals.labelled.{k}", on_bad) for k, s in settings.labelled.items()}
    evaluations: dict[str, Evaluation] = {}
    for key, options in section.items():
        if key in MACHINERY or options is None:
            continue
        if not hasattr(options, "items"):
            raise UserError(f"evals.{key} is {options!r}; it takes a section: the options of the evaluation"
                            f" sslx/evals/{key}.py, dict() for its defaults")
        options = dict(options.items())
        if "source" in options:
            splits[key] = pipeline.source(options.pop("source"), f"evals.{key}.source", on_bad)
        if "name" in options:
            raise UserError(f"unknown key evals.{key}.name: an evaluation's section has the name of its file")
        evaluations[key] = config.build("evals", {"name": key, **options}, f"evals.{key}")
    subject = Subject(raw_features, None, splits, batch_size)
    for key, evaluation in evaluations.items():
        if key in splits and key not in evaluation.splits:
            raise UserError(f"unknown key evals.{key}.source: this evaluation reads {' and '.join(evaluation.splits)}")
        for name in evaluation.takes:
            if getattr(objective, name) is None:
                raise UserError(f"evals.{key} is of {TAKEN[name]}: remove it, or change its options")
        for split, least in evaluation.splits.items():
            n, wanted = len(subject.split(split).examples), batch_size if least is None else least
            if n < wanted:
                raise UserError(f"evals.{key} takes at least {wanted} examples"
                                + (" (evals.batch_size)" if least is None else "")
                                + f" of the split {split!r}, and {subject.split(split).info.name} has {n}")
    return assemble(evaluations, splits, objective, mesh, batch_size=batch_size, on_bad=on_bad)


def assemble(evaluations: Mapping[str, Evaluation], splits: Mapping[str, Source], objective: Objective,
             mesh: jax.sharding.Mesh, *, batch_size: int, on_bad: pipeline.OnBad = "skip") -> Evaluate:
    """Evaluations of sources that are open: what `make` does after reading the config."""
    def compiled(f):
        return f and jax.jit(lambda params, aux, batch: jax.sharding.reshard(f(params, aux, batch), P()))

    parts = [compiled(f) for f in (objective.encode, objective.project, objective.embed)]

    @jax.jit
    def loss(params, aux, batch, number):
        return objective.loss(params, aux, batch, jax.random.fold_in(jax.random.key(0), number))[1][1]

    def on_mesh(batch):
        sharding = batch_sharding(mesh)
        return {k: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for k, x in batch.items()}

    def evaluate(params, aux):
        def on_host(f):
            def found(batch):
                with jax.set_mesh(mesh):
                    return jax.tree.map(lambda x: np.asarray(x, np.float32), f(params, aux, on_mesh(batch)))

            return f and found

        def metrics(batch, number):
            with jax.set_mesh(mesh):
                return distributed.settle(loss(params, aux, on_mesh(batch), number))

        encode, project, embed = map(on_host, parts)
        return run(Subject(encode, metrics, splits, batch_size, on_bad, objective.reads, project, embed))

    def run(subject):
        # Every process evaluates the same features by itself, on one device, away from the mesh.
        with jax.set_mesh(single(jax.local_devices()[0])):
            return {name: value for evaluation in evaluations.values() for name, value in evaluation(subject).items()}

    def baseline_raw():
        metrics = run(Subject(raw_features, None, splits, batch_size, on_bad))
        return {f"{name}@raw": value for name, value in metrics.items() if name.endswith("/accuracy")}

    return Evaluate(evaluate, baseline_raw, splits, batch_size)


class Machinery(NamedTuple):
    batch_size: int | None
    labelled: Mapping[str, Any]


def machinery(*, batch_size: Count | None = None, labelled: Mapping | None = None) -> Machinery:
    sections = dict(labelled.items()) if labelled else {}
    for key in sections:
        if key not in ("train", "test"):
            raise UserError(f"unknown key evals.labelled.{key}{config.nearest(key, ('train', 'test'))}")
    return Machinery(batch_size, sections)


def single(device: jax.Device) -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("device",), devices=[device])


def batches(source: Source, batch_size: int, on_bad: pipeline.OnBad,
            rows: int) -> Iterator[tuple[HostBatch, np.ndarray]]:
    """(batch, counts bool [B]) of the first `rows` examples, the last batch filled with others.

    `counts` is False for what fills the last batch and for what stands in for a bad record.
    """
    stream = pipeline.stream(source, seed=0, shuffle=False, on_bad=on_bad)
    for first in range(0, rows, batch_size):
        places_B = np.arange(first, first + batch_size)
        batch = stream.rows(places_B)
        yield batch, (places_B < rows) & (batch["skipped"] == 0)


def raw_features(batch: HostBatch) -> np.ndarray:
    """The inputs as features: pixels in [0, 1], or the shares of token ids (modulo 4096), float32 [B, D]."""
    if "image" in batch:
        images = batch["image"]
        return images.reshape(len(images), -1).astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    if "tokens" in batch:
        tokens_BT = batch["tokens"] % 4096
        return np.stack([np.bincount(row, minlength=4096) for row in tokens_BT]).astype(np.float32) / tokens_BT.shape[1]
    arrays = [x.reshape(len(x), -1) for x in batch.values()]
    return np.concatenate(arrays, 1).astype(np.float32)


def binomial_stderr(accuracy: float, n: int) -> float:
    """The standard error of a share of n independent trials: sqrt(a (1 - a) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / n)
