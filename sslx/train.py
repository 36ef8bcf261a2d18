"""The training loop and the training step: the only ones, for every objective."""

import collections
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from sslx import checkpoint, config, evals, flops, log, optim, report, state
from sslx.config import UserError
from sslx.data import Source, pipeline
from sslx.objectives import Batch, Objective
from sslx.sharding import batch_shards, batch_sharding, make_mesh
from sslx.state import TrainState

SECTIONS = ("mesh", "model", "objective", "data", "optim", "run", "evals")


class Run(NamedTuple):
    """config.run. Intervals are in steps.

    accumulate: micro-batches per step; a contrastive loss sees the negatives of its micro-batch.
    log_every, eval_every, save_every: points, evaluations, checkpoints; the last step has all three.
    keep:       newest checkpoints kept.
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    keep: int = 2


class Data(NamedTuple):
    """config.data.

    batch_size: rows of the global batch.
    train:      a source (a file of sslx/data).
    workers:    reading processes; 0 reads in threads.
    on_bad:     what to do about a record that cannot be decoded.
    """

    batch_size: int
    train: Mapping
    shuffle: bool = True
    workers: int = 0
    on_bad: pipeline.OnBad = "skip"


class Experiment(NamedTuple):
    """All that a config describes, built and checked, before anything is compiled."""

    config: dict[str, Any]
    options: Run
    data: Data
    mesh: jax.sharding.Mesh
    source: Source
    objective: Objective
    optimizer: optim.Optimizer


def build(conf: ml_collections.ConfigDict, devices: list | None = None) -> Experiment:
    """Reads every section of a config. Raises UserError for whatever cannot work."""
    for key in conf:
        if key not in SECTIONS:
            raise UserError(f"unknown section config.{key}{config.nearest(key, SECTIONS)}")
    for key in SECTIONS:
        if key not in conf:
            raise UserError(f"section config.{key} is missing")
    options = config.call(Run, conf.run, "config.run")
    data = config.call(Data, conf.data, "config.data")
    for name in ("steps", "accumulate", "log_every", "eval_every", "save_every", "keep"):
        if getattr(options, name) < 1:
            raise UserError(f"config.run.{name} is {getattr(options, name)}; it takes a positive integer")
    mesh = config.call(make_mesh, conf.mesh, "config.mesh", devices=devices)
    shards = batch_shards(mesh) * options.accumulate
    if data.batch_size < 1 or data.batch_size % shards:
        raise UserError(f"config.data.batch_size={data.batch_size} does not divide into run.accumulate={options.accumulate}"
                        f" micro-batches over {batch_shards(mesh)} devices (data x fsdp); choose a multiple of {shards}")
    source = pipeline.source(data.train, "config.data.train", data.on_bad)
    model = config.build("models", conf.model, "config.model")
    objective = config.build("objectives", conf.objective, "config.objective", model=model, info=source.info)
    optimizer = config.call(optim.make, conf.optim, "config.optim")
    return Experiment(conf.to_dict(), options, data, mesh, source, objective, optimizer)


def train_step(objective: Objective, tx: optax.GradientTransformation, options: Run) -> Callable:
    """(state, batch) -> (state, metrics), jitted, the state donated."""

    def step(current: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(options.seed), current.step)
        grads, aux, metrics = gradient(objective, current.params, current.aux, batch, key, options.accumulate)
        updates, opt_state = tx.update(grads, current.opt_state, current.params)
        params = optax.apply_updates(current.params, updates)
        tokens = state.add_exactly(current.tokens, metrics["tokens"])
        new = TrainState(current.step + 1, tokens, params, aux, opt_state)
        # What is carried keeps its sharding: the next step is the same program, and buffers are reused.
        new = jax.tree.map(lambda x, old: jax.sharding.reshard(x, jax.typeof(old).sharding), new, current)
        return new, metrics | {"grad_norm": optax.global_norm(grads), "tokens_seen": tokens}

    return jax.jit(step, donate_argnums=0)


def gradient(objective: Objective, params, aux, batch: Batch, key: jax.Array, accumulate: int):
    """(gradient, aux, metrics) of a batch, of `accumulate` micro-batches in turn; micro-batch i has rows i mod accumulate.

    Gradients and metrics are means, `tokens` is the sum.
    """
    grad_of = jax.value_and_grad(objective.loss, has_aux=True)
    if accumulate == 1:
        (_, (aux, metrics)), grads = grad_of(params, aux, batch, key)
        return grads, aux, metrics

    # The batch dimension splits with the rows first, so that every micro-batch lies on all devices.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)

    def body(carry, part):
        total, aux = carry
        i, rows = part
        (_, (aux, metrics)), grads = grad_of(params, aux, rows, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, total, grads), aux), metrics

    start = jax.tree.map(jnp.zeros_like, params)
    (total, aux), metrics = jax.lax.scan(body, (start, aux), (jnp.arange(accumulate), micro))
    means = {name: values.sum(0) if name.endswith("tokens") else values.mean(0) for name, values in metrics.items()}
    return jax.tree.map(lambda g: g / accumulate, total), aux, means


def count_flops(objective: Objective, current: TrainState, batch: Batch) -> flops.Flops:
    """FLOPs of one step: forward and backward of all networks on the global batch."""
    grad_of = jax.value_and_grad(objective.loss, has_aux=True)
    return flops.count(grad_of, current.params, current.aux, batch, jax.random.key(0))


def run(conf: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains what `conf` describes in `workdir`, or goes on where a run of the same config stopped.

    Raises UserError for a mistake in the config, the data or the workdir; Diverged if the loss is no number.
    """
    experiment = build(conf)
    with jax.set_mesh(experiment.mesh):
        loop(experiment, pathlib.Path(workdir))


class Diverged(UserError):
    """The loss or its gradient is not finite."""


def loop(experiment: Experiment, workdir: pathlib.Path) -> None:
    conf, options, data, mesh, source, objective, optimizer = experiment
    evaluation = evals.make(conf["evals"], objective, mesh, data.on_bad)
    checkpoint.claim(workdir, conf, source.info.fingerprint)
    checkpoints = checkpoint.Checkpoints(workdir, options.keep)
    stream = pipeline.stream(source, seed=options.seed, shuffle=data.shuffle, on_bad=data.on_bad)

    def batches(first, last):
        return pipeline.batches(stream, batch_size=data.batch_size, sharding=batch_sharding(mesh), first_step=first,
                                last_step=last, workers=data.workers)

    example = inputs(next(batches(0, 1))[0])
    born = jax.jit(lambda batch: state.create(objective, optimizer.tx, options.seed, batch))
    first = checkpoints.latest()
    if first is None:
        current = born(example)
    else:
        current = checkpoints.restore(first, abstract(born, example, mesh))
    start = first or 0
    counted = count_flops(objective, current, example)
    peak = flops.peak_flops(jax.devices()[0], conf["model"]["dtype"] if "dtype" in conf["model"] else "bfloat16")
    record = run_record(experiment, current, counted, peak)
    logger = log.Logger(workdir, record, first, options.steps, jax.process_index() == 0)
    say(logger, f"{record['objective']} on {source.info.name}: {record['n_params']:,} parameters,"
                f" {counted.model_total:.3g} FLOPs a step, mesh {dict(mesh.shape)}"
                + (f", resumed at step {start}" if first is not None else ""))
    clock = Clock(logger.wall_s)

    def evaluate(step: int, phase: str, baseline: str = "") -> None:
        cpu_s = clock.cpu()
        metrics = evaluation.evaluate(current.params, current.aux)
        metrics = {name + baseline: value for name, value in metrics.items()}
        if baseline:
            metrics |= evaluation.baseline_raw()
        if objective.show is not None and jax.process_index() == 0:
            shown = jax.jit(objective.show)(current.params, current.aux, example_shown, jax.random.key(options.seed))
            report.save_samples(workdir, step, jax.device_get(shown), source.info.decode)
        logger.point(**counters(step), phase=phase, split="eval", metrics=metrics, wall_s=clock.wall(), cpu_s=cpu_s)

    seen = {"tokens": state.exact(np.asarray(current.tokens))}

    def counters(step: int) -> dict[str, Any]:
        flops_model, examples = step * counted.model_total, step * data.batch_size
        return dict(step=step, examples=examples, tokens_seen=seen["tokens"], flops_model=flops_model,
                    flops_hw=step * counted.hw_total, tokens_per_flop=seen["tokens"] / flops_model if flops_model else None,
                    epochs=examples / len(source.examples))

    shown_rows = batch_shards(mesh) * math.ceil(8 / batch_shards(mesh))
    example_shown = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:shown_rows], batch_sharding(mesh)), example)
    step_fn = train_step(objective, optimizer.tx, options)
    interrupted = Interrupt()
    skipped, pending = 0, None

    def read(step: int, metrics) -> None:
        """Looks at the metrics of a step, when the next one is already on the device."""
        nonlocal skipped
        values = {k: float(v) for k, v in jax.device_get({k: v for k, v in metrics.items() if k != "tokens_seen"}).items()}
        seen["tokens"] = state.exact(np.asarray(metrics["tokens_seen"]))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise Diverged(f"the {'loss' if not math.isfinite(values['loss']) else 'gradient'} of step {step} is not finite."
                           f" {last_good(checkpoints)} Try a lower optim.learning_rate, a longer optim.warmup, optim.clip=1.0"
                           " or model.dtype='float32'")
        speed = clock.speed(step, seen["tokens"])
        mfu = speed.steps_per_s * counted.model_total / (peak * mesh.size) if peak else None
        logger.progress(step, loss=values["loss"], tokens_per_s=speed.tokens_per_s, mfu=mfu)
        if step % options.log_every == 0 or step == options.steps:
            values.pop("tokens")
            logger.point(**counters(step), lr=float(optimizer.learning_rate(step - 1)), phase=optimizer.phase(step),
                         split="train", metrics=values, wall_s=clock.wall(), cpu_s=clock.cpu(),
                         tokens_per_s=speed.tokens_per_s, mfu=mfu, bad_records=skipped)

    try:
        if start == 0:
            clock.pause(lambda: evaluate(0, "warmup", "@random_init"))
        for step, (batch, host) in enumerate(batches(start, options.steps), start + 1):
            current, metrics = step_fn(current, inputs(batch))
            skipped += host["skipped"]
            if pending is not None:
                read(*pending)
            pending = step, metrics
            last = step == options.steps
            stop = interrupted.asked or last
            if stop or step % options.save_every == 0 or step % options.eval_every == 0:
                read(*pending)  # a state is saved or judged only when its step is known to be sound
                pending = None
                if stop or step % options.save_every == 0:
                    clock.pause(functools.partial(checkpoints.save, current))
                if last or step % options.eval_every == 0:
                    clock.pause(functools.partial(evaluate, step, optimizer.phase(step)))
            if stop:
                break
    finally:
        checkpoints.close()
        logger.close()
        interrupted.restore()
    if jax.process_index() == 0:
        page = report.write(workdir)
        if interrupted.asked and not last:
            print(f"stopped at step {step} of {options.steps}, saved in {workdir}/checkpoints. To go on, run the same command again.")
        else:
            print(log.summary(workdir))
        print(f"report: {page}")


def inputs(batch: Batch) -> dict[str, jax.Array]:
    """What an objective sees of a batch: everything but the labels."""
    return {name: x for name, x in batch.items() if name != "label"}


def abstract(born: Callable, batch: Batch, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing it."""

    def concrete(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(concrete, jax.eval_shape(born, batch))


def run_record(experiment: Experiment, current: TrainState, counted: flops.Flops, peak: float | None) -> dict[str, Any]:
    """The first record of metrics.jsonl: what was run, on what, and what a step costs."""
    conf, options, data, mesh, source, *_ = experiment
    text = json.dumps(checkpoint.flat(conf), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return dict(
        run_id=f"{conf['objective']['name']}-{digest}-{options.seed}", config=conf, config_hash=digest, git_sha=git_sha(),
        objective=conf["objective"]["name"], modality=source.info.modality, dataset=source.info.name, seed=options.seed,
        n_params=flops.n_params(current.params), n_params_nonembedding=flops.n_params_nonembedding(current.params),
        flops_per_example={name: n / data.batch_size for name, n in counted.model.items()},
        flops_convention=flops.CONVENTION,
        batch_size=data.batch_size, total_steps=options.steps, device=jax.devices()[0].device_kind,
        device_count=mesh.size, peak_flops=peak,
        versions={"python": sys.version.split()[0]} | {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    )


def git_sha() -> str | None:
    """The commit of the code that runs, if it runs from a checkout."""
    here = pathlib.Path(__file__).parent
    asked = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return asked.stdout.strip() or None


def last_good(checkpoints: checkpoint.Checkpoints) -> str:
    step = checkpoints.latest()
    return "No checkpoint had been saved." if step is None else f"The last good checkpoint is step {step}."


def say(logger: log.Logger, line: str) -> None:
    if logger.show:
        print(line, flush=True)


class Speed(NamedTuple):
    steps_per_s: float
    tokens_per_s: float


class Clock:
    """Wall time of the run; time and speed of its steps alone, without evaluations and saves."""

    def __init__(self, earlier_s: float):
        self.began, self.paused, self.paused_cpu = time.monotonic() - earlier_s, 0.0, 0.0
        self.marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=50)

    def wall(self) -> float:
        return time.monotonic() - self.began

    def pause(self, action: Callable[[], None]) -> None:
        """Runs what is no step."""
        began, began_cpu = time.monotonic(), time.process_time()
        action()
        self.paused += time.monotonic() - began
        self.paused_cpu += time.process_time() - began_cpu

    def cpu(self) -> float:
        """CPU-seconds of this process in starting up and stepping."""
        return time.process_time() - self.paused_cpu

    def speed(self, step: int, tokens: int) -> Speed:
        """Over the last 50 steps, from the end of the first, which compiles."""
        self.marks.append((self.wall() - self.paused, step, tokens))
        (t0, s0, n0), (t1, s1, n1) = self.marks[0], self.marks[-1]
        return Speed((s1 - s0) / (t1 - t0), (n1 - n0) / (t1 - t0)) if t1 > t0 else Speed(0.0, 0.0)


class Interrupt:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False
        try:
            self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns the signals decides
            self.before = {}

    def ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
