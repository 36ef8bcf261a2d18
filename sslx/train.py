"""The training loop and the training step: the only ones, for every objective."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from sslx import checkpoint, distributed, experiment, flops, log, report, state
from sslx.clock import Clock, Interrupt
from sslx.config import UserError
from sslx.data import pipeline
from sslx.experiment import Experiment, build
from sslx.objectives import Batch, Objective
from sslx.optim import Optimizer
from sslx.sharding import batch_sharding, batch_shards, replicate, spec
from sslx.state import TrainState

N_SHOWN = 8  # examples in the pictures of the report
UPDATE = 2**32 - 1  # folded into a step's key for the optimizer; micro-batches count from 0


class Diverged(UserError):
    """The loss or its gradient is not finite."""

    status = 3


def run(conf: ml_collections.ConfigDict, workdir: str) -> bool:
    """Trains what `conf` describes in `workdir`, or goes on where a run of the same config stopped.

    True if the last step is done, False if an interruption came first. The state is saved in either case.
    Raises UserError for a mistake in the config, the data or the workdir; Diverged if the loss is no number.
    """
    built = build(conf)
    with jax.set_mesh(built.mesh):
        return loop(built, pathlib.Path(workdir))


def train_step(objective: Objective, optimizer: Optimizer, seed: int, accumulate: int = 1,
               options: dict[str, Any] | None = None) -> Callable:
    """(state, batch) -> (state, metrics), jitted with the compiler's `options`, the state donated."""

    def step(current: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), current.step)
        grads, aux, metrics = gradient(objective, current.params, current.aux, batch, key, accumulate)
        params, opt_state = optimizer.update(grads, current.opt_state, current.params, jax.random.fold_in(key, UPDATE))
        tokens = state.add_exactly(current.tokens, metrics["tokens"])
        new = TrainState(current.step + 1, tokens, params, aux, opt_state)
        # A copy: the state itself is donated to the next step before these are read.
        measured = metrics | {"grad_norm": optax.tree.norm(grads), "tokens_seen": jnp.copy(tokens)}
        return lying_as(new, current), measured

    return jax.jit(step, donate_argnums=0, compiler_options=options)


def lying_as(new, old):
    """What is carried keeps its sharding: the next step is the same program, and buffers are reused."""
    return jax.tree.map(lambda x, like: jax.sharding.reshard(x, jax.typeof(like).sharding), new, old)


def gradient(objective: Objective, params, aux, batch: Batch, key: jax.Array, accumulate: int):
    """(gradient, aux, metrics) of a batch, taken as `accumulate` micro-batches in turn.

    Micro-batch i has the rows i mod `accumulate`. Gradients, float32, and metrics are means, `tokens` is the sum.
    """
    grad_of = jax.value_and_grad(objective.loss, has_aux=True)
    if accumulate == 1:
        (_, (aux, metrics)), grads = grad_of(params, aux, batch, key)
        return optax.tree.cast(grads, jnp.float32), aux, metrics

    # The batch dimension splits with the rows first, so that every micro-batch lies on all devices.
    def split(x):
        return jnp.moveaxis(jnp.reshape(x, (-1, accumulate, *x.shape[1:]), out_sharding=spec("batch")), 1, 0)

    micro = jax.tree.map(split, batch)

    def body(carry, part):
        total, aux = carry
        i, rows = part
        (_, (new_aux, metrics)), grads = grad_of(params, aux, rows, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, total, grads), lying_as(new_aux, aux)), metrics

    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    (total, aux), metrics = jax.lax.scan(body, (start, aux), (jnp.arange(accumulate), micro))
    means = {name: values.sum(0) if name.endswith("tokens") else values.mean(0) for name, values in metrics.items()}
    return jax.tree.map(lambda g: g / accumulate, total), aux, means


def count_flops(objective: Objective, current: TrainState, batch: Batch) -> flops.Flops:
    """FLOPs of one step: forward and backward of all networks on the global batch."""
    grad_of = jax.value_and_grad(objective.loss, has_aux=True)
    key = jax.eval_shape(lambda: jax.random.key(0))  # nothing is computed: the devices may not be here
    return flops.count(grad_of, current.params, current.aux, batch, key)


def loop(built: Experiment, workdir: pathlib.Path) -> bool:
    """Steps from the newest checkpoint, or from the start, to the last step; logs, evaluates and saves on the way."""
    conf, options, data, mesh, source, objective, optimizer, evaluation = built
    stream = pipeline.stream(source, seed=options.seed, shuffle=data.shuffle, on_bad=data.on_bad)

    def batches(first: int, last: int, rows: int = data.batch_size) -> Iterator[tuple[Batch, dict[str, Any]]]:
        found = pipeline.batches(stream, batch_size=rows, sharding=batch_sharding(mesh), first_step=first,
                                 last_step=last, workers=data.workers)
        return (({name: x for name, x in batch.items() if name != "label"}, host) for batch, host in found)

    example = next(batches(0, 1))[0]
    unborn = state.abstract(objective, optimizer, options.seed, example)
    counted = count_flops(objective, unborn, example)
    # Only a config whose networks and loss can be traced lays claim to the workdir.
    checkpoint.claim(workdir, conf, source.info.fingerprint)
    checkpoints = checkpoint.Checkpoints(workdir, options.keep)
    resumed = checkpoints.latest()
    start = resumed or 0
    current = (state.create(objective, optimizer, options.seed, example) if resumed is None
               else checkpoints.restore(resumed, unborn))
    peak = flops.peak_flops(jax.devices()[0], conf["model"].get("dtype", "bfloat16"))
    record = experiment.record(built, current, counted, peak)
    logger = log.Logger(workdir, record, resumed, options.steps, jax.process_index() == 0)
    logger.say(f"{record['objective']} on {source.info.name}: {record['n_params']:,} parameters,"
               f" {counted.model_total:.3g} FLOPs a step, mesh {dict(mesh.shape)}"
               + ("" if resumed is None else f", resumed at step {start}"))
    if options.overlap and not built.compiler_options:
        logger.say(f"run.overlap: no options are known that would change anything on {mesh.size} x"
                   f" {record['device']}")
    if start == options.steps:
        logger.say(f"this run is finished: step {start} of {options.steps} was saved, nothing is left to train")
    step_fn = train_step(objective, optimizer, options.seed, options.accumulate, built.compiler_options)
    show = objective.show and jax.jit(objective.show)
    n_shown = batch_shards(mesh) * math.ceil(N_SHOWN / batch_shards(mesh))
    shown_batch = next(batches(0, 1, n_shown))[0]
    clock, interrupted = Clock(logger.wall_s), Interrupt(start)
    tokens_seen = state.exact(np.asarray(current.tokens))
    # Each process counts the bad records of its rows, process 0 on top of those before the resume.
    bad_records = 0 if resumed is None or jax.process_index() else checkpoints.bad_records(resumed)

    def point(step: int, split: str, metrics: dict[str, float], bad_records: int, **fields: Any) -> None:
        spent, examples = step * counted.model_total, step * data.batch_size
        logger.point(step=step, examples=examples, tokens_seen=tokens_seen, flops_model=spent,
                     flops_hw=step * counted.hw_total, tokens_per_flop=tokens_seen / spent if spent else None,
                     epochs=examples / len(source.examples), phase=optimizer.phase(step), split=split, metrics=metrics,
                     bad_records=distributed.total(bad_records), wall_s=clock.wall(), **fields)

    def evaluate(step: int) -> None:
        cpu_s, suffix = clock.cpu(), "" if step else "@random_init"
        metrics = {name + suffix: x for name, x in evaluation.evaluate(current.params, current.aux).items()}
        if not step:
            metrics |= evaluation.baseline_raw()
        if show:
            pictures = show(current.params, current.aux, shown_batch, jax.random.key(options.seed))
            pictures = jax.tree.map(replicate, pictures)  # of several processes each has a part
            if logger.show:
                report.save_samples(workdir, step, jax.device_get(pictures), source.info.decode)
        point(step, "eval", metrics, bad_records, cpu_s=cpu_s)

    def read(step: int, metrics: dict[str, jax.Array], bad_records: int) -> None:
        """Looks at the metrics of a step, normally when the next one is already on the device."""
        nonlocal tokens_seen
        values = jax.device_get(metrics)
        tokens_seen = state.exact(values.pop("tokens_seen"))
        numbers = {name: float(x) for name, x in values.items() if name != "tokens"}
        check_finite(step, numbers, checkpoints.latest())
        speed = clock.speed(step, tokens_seen)
        mfu = speed.steps_per_s * counted.model_total / (peak * mesh.size) if peak else None
        logger.progress(step, loss=numbers["loss"], tokens_per_s=speed.tokens_per_s, mfu=mfu)
        if step % options.log_every == 0 or step == options.steps:
            point(step, "train", numbers, bad_records, lr=float(optimizer.learning_rate(step - 1)), cpu_s=clock.cpu(),
                  tokens_per_s=speed.tokens_per_s, mfu=mfu)

    pending, step = None, start
    with contextlib.ExitStack() as closing:
        for close in (interrupted.restore, logger.close, checkpoints.close):
            closing.callback(close)
        if start == 0:
            clock.pause(lambda: evaluate(0))
        for step, (batch, host) in enumerate(batches(start, options.steps), start + 1):
            current, metrics = distributed.settle(step_fn(current, batch))
            bad_records += host["skipped"]
            if pending:
                read(*pending)
            pending = step, metrics, bad_records
            stop = interrupted.stops_after(step) or step == options.steps
            save = stop or step % options.save_every == 0
            judge = step == options.steps or step % options.eval_every == 0
            if save or judge:  # only when the metrics of the very step are known to be sound
                read(*pending)
                pending = None
            if judge:  # before saving: a checkpoint says that the log is complete up to its step
                clock.pause(functools.partial(evaluate, step))
            if save:
                clock.pause(functools.partial(checkpoints.save, current, distributed.total(bad_records)))
            if stop:
                break
    finish(workdir, logger, step, options.steps)
    return step == options.steps


def finish(workdir: pathlib.Path, logger: log.Logger, step: int, steps: int) -> None:
    """What a run ends with: a table of its evaluations, or how to go on; and the report."""
    if not logger.show:
        return
    page = report.write(workdir)
    if step < steps:
        logger.say(f"stopped at step {step} of {steps}, saved in {workdir}. To go on, run the same command again.")
    else:
        logger.say(log.summary(workdir))
    logger.say(f"report: {page}")


def check_finite(step: int, metrics: dict[str, float], saved: int | None) -> None:
    """Raises Diverged, with what to try, if the loss or the gradient of a step is not finite."""
    for name, what in (("loss", "loss"), ("grad_norm", "gradient")):
        if not math.isfinite(metrics[name]):
            last = "No checkpoint had been saved." if saved is None else f"The last good checkpoint is of step {saved}."
            raise Diverged(f"the {what} of step {step} is not finite. {last} Try a lower optim.learning_rate, a longer"
                           " optim.warmup, optim.clip=1.0 or model.dtype='float32'")
