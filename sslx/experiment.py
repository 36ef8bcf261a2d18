"""From a config to all that it describes, built and checked before anything is compiled."""

import hashlib
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from sslx import config, evals, flops, mup, optim, topology, workdir
from sslx.config import Count, Natural, Nonnegative, Only, Positive, Seed, UserError
from sslx.data import Info, Source, pipeline
from sslx.objectives import Objective
from sslx.sharding import batch_sharding, batch_shards, make_mesh
from sslx.state import TrainState

SECTIONS = ("mesh", "model", "objective", "data", "optim", "run", "evals")


Best = Annotated[str, Only(lambda text: re.fullmatch("(min|max):.+", text) is not None,
                           "min:METRIC or max:METRIC, such as min:heldout/loss")]


class Run(NamedTuple):
    """config.run. Intervals are in steps.

    accumulate: micro-batches per step; a contrastive loss sees the negatives of its micro-batch, and what is carried
                (a teacher, a queue, steps of a schedule of theirs) moves on with each.
    overlap:    compiles with the options that let communication run beside computation (sslx/topology.py).
    log_every, eval_every, save_every: points, evaluations, checkpoints; the last step has all three.
    eval_first: an evaluation of the random weights, the baselines `@random_init`.
    save_minutes: saves also when this time has passed, at the next point.
    keep:       newest checkpoints kept. keep_every: those of its multiples stay as well; keep_best: and the one with
                the best value of a metric, "min:heldout/loss" or "max:knn/accuracy"; evaluations then save.
    keep_at:    steps that are saved and stay, for branches.
    trunk, trunk_step: the run branches from this step of the run in the workdir `trunk` (sslx/branches.py).
    encoder_from, encoder_step, encoder_of: the run begins with the encoder of the run in the workdir `encoder_from`, of
                its newest checkpoint or of a step, of its student or its teacher (sslx/encoders.py).
    on_bad_step: a loss or gradient that is not finite, or a spike: "stop" ends the run; "skip" leaves weights and
                optimizer as they were; "rollback" goes on from the newest checkpoint and passes over the step's batch
                and the one before.
    spike:      a step is bad whose loss or gradient norm is so many standard deviations above the mean of the last
                128 sound steps.
    max_bad_steps: in 128 steps; more end the run.
    on_collapse: features that `evals.collapse` finds collapsed are a warning, or end the run.
    hang_s:     a step that takes longer ends the run with the stacks of all processes (0: never).
    check_replicas_every, recompute_every: intervals of comparing the bits of weights between devices, and of computing
                a step twice.
    record_examples: writes which examples each step read to W/examples.
    """

    steps: Count
    seed: Seed = 0
    accumulate: Count = 1
    overlap: bool = False
    log_every: Count = 20
    eval_every: Count = 500
    eval_first: bool = True
    save_every: Count = 500
    save_minutes: Positive | None = None
    keep: Count = 2
    keep_every: Count | None = None
    keep_best: Best | None = None
    keep_at: tuple[Count, ...] = ()
    trunk: str | None = None
    trunk_step: Count | None = None
    encoder_from: str | None = None
    encoder_step: Count | None = None
    encoder_of: Literal["student", "teacher"] = "student"
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    spike: Positive | None = None
    max_bad_steps: Natural = 8
    on_collapse: Literal["warn", "stop"] = "warn"
    hang_s: Nonnegative = 1800.0
    check_replicas_every: Count | None = None
    recompute_every: Count | None = None
    record_examples: bool = False


class Data(NamedTuple):
    """config.data.

    batch_size: rows of the global batch.
    train:      a source (a file of sslx/data).
    synthetic:  arguments of sslx/data/synthetic.py: rows of the shape of `train`'s, where the data is not at hand.
    workers:    reading processes; 0 reads in threads.
    on_bad:     what to do about a record that cannot be decoded.
    """

    batch_size: Count
    train: Mapping
    synthetic: Mapping | None = None
    shuffle: bool = True
    workers: Natural = 0
    on_bad: pipeline.OnBad = "skip"


class Experiment(NamedTuple):
    """What a config describes; `config` is the config itself, as nested dicts, without its secrets."""

    config: dict[str, Any]
    run: Run
    data: Data
    mesh: jax.sharding.Mesh
    source: Source
    objective: Objective
    optimizer: optim.Optimizer
    evaluation: evals.Evaluate

    def batches(self, first: int, last: int, rows: int | None = None) -> pipeline.Batches:
        """Global batches first, ..., last - 1 of the training data; of data.batch_size rows, or of `rows`."""
        data = self.data
        stream = pipeline.stream(self.source, seed=self.run.seed, shuffle=data.shuffle, on_bad=data.on_bad)
        return pipeline.batches(stream, batch_size=rows or data.batch_size, sharding=batch_sharding(self.mesh),
                                first_step=first, last_step=last, workers=data.workers,
                                reads=self.objective.reads)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Of the training step, on the devices of the mesh."""
        return topology.overlap(self.mesh.devices.flat) if self.run.overlap else {}


def build(conf: ml_collections.ConfigDict, devices: list | None = None, source: Source | None = None) -> Experiment:
    """Reads every section of a config. Raises UserError for whatever cannot work.

    source: of config.data.train, where it is open already.
    """
    sections = config.plain(conf)
    for key in sections:
        if key not in SECTIONS:
            raise UserError(f"unknown section config.{key}{config.nearest(key, SECTIONS)}")
    for key in SECTIONS:
        if key not in sections:
            raise UserError(f"section config.{key} is missing")
    run = config.call(Run, sections["run"], "config.run")
    data = config.call(Data, sections["data"], "config.data")
    mesh = config.call(make_mesh, sections["mesh"], "config.mesh", devices=devices)
    rows = batch_shards(mesh) * run.accumulate
    if data.batch_size % rows:
        raise UserError(f"config.data.batch_size={data.batch_size} does not divide into {run.accumulate} micro-batches"
                        f" (run.accumulate) over {batch_shards(mesh)} devices (mesh data x fsdp);"
                        f" choose a multiple of {rows}")
    model = config.build("models", sections["model"], "config.model")
    source = pipeline.source(data.train, "config.data.train", data.on_bad) if source is None else source
    if data.synthetic is not None:
        config.call(config.load("data", "synthetic"), data.synthetic, "config.data.synthetic")

    n_examples = len(source.examples)

    def objective_on(info: Info, model: Any = model) -> Objective:
        return config.build("objectives", sections["objective"], "config.objective", model=model, info=info,
                            n_examples=n_examples)

    if source.info.modality != model.modality:
        raise UserError(f"config.model.name={sections['model']['name']!r} reads {model.modality}, and"
                        f" config.data.train.name={data.train['name']!r} is a source of {source.info.modality}")
    objective, growth = objective_on(source.info), None
    calls, lasts = run.steps * run.accumulate, sections["objective"].get("steps")
    if lasts is not None and lasts < calls:
        raise UserError(f"config.objective.steps={lasts} is over before the run is: it counts calls of the loss, and"
                        f" there are run.steps * run.accumulate = {calls} of them; set it to that, and what else"
                        " config.objective counts in steps in proportion")
    if sections["model"].get("base") is not None:
        narrow = config.build("models", narrowed(sections["model"]), "config.model")
        batch = abstract_batch(source.info, data.batch_size, objective.reads)
        objective, growth = mup.parametrized(objective, objective_on(source.info, narrow), batch)
    optimizer = config.call(optim.make, sections["optim"], "config.optim", growth=growth)
    evaluation = evals.make(sections["evals"], objective, mesh, data.on_bad)
    for split, other in evaluation.splits.items():
        check_alike(source.info, other.info, split, mesh)
        objective_on(other.info)
    source = Source(source.examples, source.info._replace(name=config.redacted(source.info.name)))
    return Experiment(config.redacted(sections), run, data, mesh, source, objective, optimizer, evaluation)


def narrowed(section: Mapping[str, Any]) -> dict[str, Any]:
    """config.model with the widths of its base, and its own depth."""
    depths = ("depth", "decoder_depth", "stages")
    return {**section, **{k: v for k, v in section["base"].items() if k not in depths}, "base": None}


def abstract_batch(info: Info, rows: int, reads: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch: tokens or images, and what an objective `reads` beside them."""
    beside = {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in reads}
    tokens, image = jax.ShapeDtypeStruct((rows, info.length), jnp.int32), (rows, *info.shape)
    if info.modality == "text":
        return beside | {"tokens": tokens}
    beside |= {"tokens": tokens, "segment_ids": tokens} if info.modality == "image_text" else {}
    return beside | {"image": jax.ShapeDtypeStruct(image, jnp.uint8)}


def check_alike(trained: Info, judged: Info, split: str, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if a network that reads the source it is trained on cannot read the source of an evaluation."""
    for what in ("modality", "vocab_size", "special", "word_starts"):
        if getattr(trained, what) != getattr(judged, what):
            raise UserError(f"config.evals has a source ({split}: {judged.name}) of another {what} than"
                            f" config.data.train ({trained.name}); choose sources that one network can read")
    if trained.shape[2] != judged.shape[2]:
        raise UserError(f"config.evals has a source ({split}: {judged.name}) of {judged.shape[2]} channels, and"
                        f" config.data.train ({trained.name}) has {trained.shape[2]}")
    if judged.length % mesh.shape["context"]:
        raise UserError(f"config.mesh.context={mesh.shape['context']} does not divide the windows of {judged.length}"
                        f" tokens that config.evals reads ({split}: {judged.name})")


def record(experiment: Experiment, state: TrainState, counted: flops.Flops, peak: float | None) -> dict[str, Any]:
    """The first record of metrics.jsonl: what was run, on what, and what a step costs."""
    conf, run, data, mesh, source, *_ = experiment
    text = json.dumps(workdir.flat(conf), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    objective = conf["objective"]["name"]
    branched = {} if run.trunk is None else {"branched_from": {"workdir": run.trunk, "step": run.trunk_step}}
    libraries = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
    return dict(
        run_id=f"{objective}-{digest}-{run.seed}",
        config=conf,
        config_hash=digest,
        git_sha=git_sha(),
        objective=objective,
        modality=source.info.modality,
        dataset=source.info.name,
        seed=run.seed,
        n_params=flops.n_params(state.params),
        n_params_nonembedding=flops.n_params_nonembedding(state.params),
        flops_per_example={name: n / data.batch_size for name, n in counted.model.items()},
        flops_per_example_full_attention=counted.full_total / data.batch_size,
        flops_convention=flops.CONVENTION,
        batch_size=data.batch_size,
        heldout_batch=experiment.evaluation.batch_size if experiment.objective.of_batch else None,
        total_steps=run.steps,
        device=jax.devices()[0].device_kind,
        device_count=mesh.size,
        peak_flops=peak,
        versions={"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in libraries},
        **branched,
    )


def git_sha() -> str | None:
    """The commit of the code that runs, "-dirty" if it was changed; None if it runs from no checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
