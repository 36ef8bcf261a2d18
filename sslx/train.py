"""The training loop and the training step: the only ones, for every objective."""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from sslx import branches, checkpoint, distributed, energy, experiment, flops, guards, log, report, state, workdir
from sslx.checkpoint import Checkpoints
from sslx.clock import Clock, Interrupt
from sslx.data import pipeline
from sslx.encoders import encoder_of
from sslx.experiment import Experiment, build
from sslx.guards import Diverged
from sslx.objectives import Batch, Objective
from sslx.optim import Optimizer
from sslx.sharding import batch_sharding, batch_shards, replicate, spec
from sslx.state import TrainState
from sslx.watchdog import SLACK_S, Watchdog

N_SHOWN = 8  # examples in the pictures of the report
MOST_SAVING = 0.05  # of the time of training
UPDATE = 2**32 - 1  # folded into a step's key for the optimizer; micro-batches count from 0


def run(conf: ml_collections.ConfigDict, folder: str, began: float | None = None) -> bool:
    """Trains what `conf` describes in `folder`, or goes on where a run of the same config stopped.

    True if the last step is done, False if an interruption came first. The state is saved in either case. `began`: when
    the process did, on the monotonic clock. Raises UserError for a mistake in the config, the data or the workdir;
    Diverged if the loss is no number.
    """
    began = time.monotonic() if began is None else began
    built = build(conf)
    with jax.set_mesh(built.mesh):
        return loop(built, pathlib.Path(folder), began)


def train_step(objective: Objective, optimizer: Optimizer, seed: int, accumulate: int = 1,
               options: dict[str, Any] | None = None, spike: float | None = None, skip: bool = False) -> Callable:
    """(state, batch) -> (state, metrics), jitted with the compiler's `options`, the state donated.

    `bad` among the metrics says whether the step is (`guards.judge`, which takes `spike`); with `skip` a bad one leaves
    params, aux and opt_state as they were.
    """

    def step(current: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), current.step)
        grads, aux, metrics = gradient(objective, current.params, current.aux, batch, key, accumulate)
        params, opt_state = optimizer.update(grads, current.opt_state, current.params, jax.random.fold_in(key, UPDATE))
        tokens, grad_norm = state.add_exactly(current.tokens, metrics["tokens"]), optax.tree.norm(grads)
        bad, limits_2, recent = guards.judge(current.recent, metrics["loss"], grad_norm, spike)
        new = TrainState(current.step + 1, tokens, params, aux, opt_state, recent)
        new = lying_as(new, current)
        if skip:
            kept = dict(params=current.params, aux=current.aux, opt_state=current.opt_state)
            moved = {name: getattr(new, name) for name in kept}
            new = new._replace(**jax.tree.map(lambda old, x: jnp.where(bad, old, x), kept, moved))
        # A copy: the state itself is donated to the next step before these are read. The rate is taken here too: of a
        # schedule outside a program every operation is compiled by itself, at the first point of the log.
        return new, metrics | dict(grad_norm=grad_norm, tokens_seen=jnp.copy(tokens), bad=bad, limits=limits_2,
                                   lr=optimizer.learning_rate(current.step))

    return jax.jit(step, donate_argnums=0, compiler_options=options)


def step_of(built: Experiment) -> Callable:
    """The `train_step` that a config describes."""
    run = built.run
    return train_step(built.objective, built.optimizer, run.seed, run.accumulate, built.compiler_options, run.spike,
                      run.on_bad_step == "skip")


def lying_as(new, old):
    """What is carried keeps its sharding: the next step is the same program, and buffers are reused."""
    return jax.tree.map(lambda x, like: jax.sharding.reshard(x, jax.typeof(like).sharding), new, old)


def gradient(objective: Objective, params, aux, batch: Batch, key: jax.Array, accumulate: int):
    """(gradient, aux, metrics) of a batch, taken as `accumulate` micro-batches in turn.

    Micro-batch i has the rows i mod `accumulate`. Gradients, float32, and metrics are means, `tokens` is the sum.
    """
    if accumulate == 1:
        (_, (aux, metrics)), grads = loss_and_gradient(objective, params, aux, batch, key)
        return optax.tree.cast(grads, jnp.float32), aux, metrics

    # The batch dimension splits with the rows first, so that every micro-batch lies on all devices.
    def split(x):
        return jnp.moveaxis(jnp.reshape(x, (-1, accumulate, *x.shape[1:]), out_sharding=spec("batch")), 1, 0)

    micro = jax.tree.map(split, batch)

    def body(carry, part):
        total, aux = carry
        i, rows = part
        (_, (new_aux, metrics)), grads = loss_and_gradient(objective, params, aux, rows, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, total, grads), lying_as(new_aux, aux)), metrics

    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    (total, aux), metrics = jax.lax.scan(body, (start, aux), (jnp.arange(accumulate), micro))
    means = {name: values.sum(0) if name.endswith("tokens") else values.mean(0) for name, values in metrics.items()}
    return jax.tree.map(lambda g: g / accumulate, total), aux, means


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective: Objective, params, aux, batch: Batch, key: jax.Array):
    """((loss, (aux, metrics)), gradient); jitted, to be traced once for the count of FLOPs and for the step."""
    return jax.value_and_grad(objective.loss, has_aux=True)(params, aux, batch, key)


def count_flops(objective: Objective, current: TrainState, batch: Batch) -> flops.Flops:
    """FLOPs of one step: forward and backward of all networks on the global batch."""
    # As in the step, that both are one trace. Nothing is computed: the devices may not be here.
    key = jax.eval_shape(lambda step: jax.random.fold_in(jax.random.key(0), step), current.step)
    return flops.count(functools.partial(loss_and_gradient, objective), current.params, current.aux, batch, key)


def loop(built: Experiment, folder: pathlib.Path, began: float) -> bool:
    """Steps from the newest checkpoint, or from the start, to the last step; logs, evaluates and saves on the way."""
    conf, options, data, mesh, source, objective, optimizer, evaluation = built
    process, rows_B = jax.process_index(), pipeline.local_rows(batch_sharding(mesh), data.batch_size)
    trunk = branches.trunk_of(options)
    fresh = not checkpoint.steps(folder / "checkpoints")
    if trunk and fresh:
        branches.check(trunk, conf, source.info.fingerprint)
    example = next(built.batches(0, 1))[0]
    unborn = state.abstract(objective, optimizer, options.seed, example)
    encoder = encoder_of(options, unborn) if fresh and not trunk else None
    counted = count_flops(objective, unborn, example)
    # Only a config whose networks and loss can be traced lays claim to the workdir.
    with workdir.locked(folder):
        workdir.claim(folder, conf, source.info.fingerprint)
        checkpoints = Checkpoints(folder, options.keep, options.keep_every, options.keep_best, options.keep_at)
        origin = trunk.step if trunk else 0

        def restored(saved: int | None) -> tuple[TrainState, int]:
            """(state, bad records passed over): each process counts those of its rows, process 0 on top of earlier."""
            if saved is not None:
                current, bad = checkpoints.restore(saved, unborn), checkpoints.bad_records(saved)
            elif trunk:
                current, bad = trunk.restore(unborn)
            else:
                current, bad = state.create(objective, optimizer, options.seed, example), 0
                current = encoder.adopted(current) if encoder else current
            return current, 0 if process else bad

        resumed = checkpoints.latest()
        current, bad_records = restored(resumed)
        step = start = origin if resumed is None else resumed
        history = trunk.history() if trunk and resumed is None else []
        events = [r for r in history if r["kind"] == "event"] if resumed is None else log.events(folder)
        met = guards.Met(events, start, options.max_bad_steps)
        peak = flops.peak_flops(jax.devices()[0], conf["model"].get("dtype", "bfloat16"))
        record = experiment.record(built, current, counted, peak)
        logger = log.Logger(folder, record, resumed, options.steps, process == 0, history)
        logger.say(f"{record['objective']} on {source.info.name}: {record['n_params']:,} parameters,"
                   f" {counted.model_total:.3g} FLOPs a step, mesh {dict(mesh.shape)}"
                   + (f", resumed at step {start}" if resumed is not None else
                      f", branched from {trunk.workdir} at step {start}" if trunk else ""))
        if options.overlap and not built.compiler_options:
            logger.say(f"run.overlap: no options are known that would change anything on {mesh.size} x"
                       f" {record['device']}")
        if start == options.steps:
            logger.say(f"this run is finished: step {start} of {options.steps} was saved, nothing is left to train")
        step_fn = step_of(built)
        show = objective.show and jax.jit(objective.show)
        n_shown = batch_shards(mesh) * math.ceil(N_SHOWN / batch_shards(mesh))
        shown_batch = next(built.batches(0, 1, n_shown))[0]
        clock = Clock(logger.earlier, began, energy.meter(), logger.earlier_j, logger.earlier_cpu_s)
        interrupted = Interrupt(start)
        watchdog = Watchdog(options.hang_s, folder / "stacks")
        tokens_seen = state.exact(np.asarray(current.tokens))

        def point(step: int, split: str, metrics: dict[str, float], bad_records: int, **fields: Any) -> None:
            done = step - met.passed_over(step)
            spent, examples = done * counted.model_total, done * data.batch_size
            energy_j = distributed.total(clock.energy_j)
            if math.isfinite(energy_j):
                fields |= {"energy_j": energy_j, "joules_per_token": energy_j / tokens_seen if tokens_seen else None}
            logger.point(step=step, examples=examples, tokens_seen=tokens_seen, flops_model=spent,
                         flops_hw=done * counted.hw_total, flops_6nd=6 * record["n_params_nonembedding"] * tokens_seen,
                         tokens_per_flop=tokens_seen / spent if spent else None,
                         epochs=examples / len(source.examples), phase=optimizer.phase(step), split=split,
                         metrics=metrics, bad_records=distributed.total(bad_records), wall_s=clock.wall(),
                         spent=clock.spent, **fields)

        def evaluate(step: int) -> dict[str, float]:
            clock.charge("step" if step else "start_up")
            watchdog.feed(f"evaluating at step {step}", SLACK_S)
            cpu_s, suffix = clock.cpu(), "" if step else "@random_init"
            found = evaluation.evaluate(current.params, current.aux)
            checkpoints.score(found)  # that there is one is to be known before the first step
            metrics = {name + suffix: x for name, x in found.items()}
            if not step:
                metrics |= evaluation.baseline_raw()
            if show:
                pictures = show(current.params, current.aux, shown_batch, jax.random.key(options.seed))
                pictures = jax.tree.map(replicate, pictures)  # of several processes each has a part
                if logger.show:
                    report.save_samples(folder, step, jax.device_get(pictures), source.info.decode)
            clock.charge("eval")
            point(step, "eval", metrics, bad_records, cpu_s=cpu_s)
            if metrics.get("collapsed"):
                logger.event("collapsed", step, **{k: metrics[k] for k in ("rankme", "feature_std")})
                if options.on_collapse == "stop":
                    raise Diverged(f"the features of step {step} are collapsed (run.on_collapse='stop'): see rankme and"
                                   f" feature_std in {logger.path}")
            return found

        def read(step: int, metrics: dict[str, jax.Array], bad_records: int) -> None:
            """Looks at the metrics of a step, normally when the next one is already on the device."""
            nonlocal tokens_seen
            values = jax.device_get(metrics)
            tokens_seen = state.exact(values.pop("tokens_seen"))
            bad, limits_2, lr = (values.pop(name) for name in ("bad", "limits", "lr"))
            numbers = {name: float(x) for name, x in values.items() if name != "tokens"}
            if bad:
                meet(step, guards.reason(step, numbers["loss"], numbers["grad_norm"], limits_2))
            speed = clock.speed(step, tokens_seen)
            mfu, hfu = (speed.steps_per_s * n / (peak * mesh.size) if peak else None
                        for n in (counted.model_total, counted.hw_total))
            logger.progress(step, loss=numbers["loss"], tokens_per_s=speed.tokens_per_s, mfu=mfu)
            if step % options.log_every == 0 or step == options.steps:
                point(step, "train", numbers, bad_records, lr=float(lr), cpu_s=clock.cpu(),
                      tokens_per_s=speed.tokens_per_s, mfu=mfu, hfu=hfu)

        def meet(step: int, why: str) -> None:
            """A bad step: the state is as if it had not been, or the loop rolls back, or the run ends."""
            met.bad(step)
            if options.on_bad_step == "stop" or met.too_many(step):
                raise Diverged(f"{why}. {advice(checkpoints.latest(), met.too_many(step))}")
            if options.on_bad_step == "rollback":
                raise guards.BadStep(step, why)
            logger.event("skipped", step, why=why, batch=step - 1)

        def roll_back(bad: guards.BadStep) -> tuple[int, TrainState, int]:
            """(step, state, bad records) of the newest sound checkpoint."""
            saved = checkpoints.newest_sound()
            to = origin if saved is None else saved
            over = met.pass_over(bad.step, to)
            if logger.show:
                clock.rewind(logger.rewind(to, "rolled back", clock.wall(), why=bad.why, bad_step=bad.step,
                                           passed_over=over))
            logger.say(f"{bad.why}: rolled back to step {to}; steps {over[0]} to {over[1]} are passed over")
            return to, *restored(saved)

        def save(step: int, score: float | None) -> None:
            clock.charge("step")
            watchdog.feed(f"saving step {step}", SLACK_S)
            checkpoints.save(current, distributed.total(bad_records), score)
            clock.charge("save")

        def due(step: int) -> bool:
            """Whether it is time for a checkpoint; of several processes, by the clock of one."""
            minutes = options.save_minutes
            return (minutes is not None and step % options.log_every == 0
                    and distributed.agreed(time.monotonic() - checkpoints.saved_at > 60 * minutes))

        pending, stop = None, step == options.steps
        with contextlib.ExitStack() as closing:
            for close in (watchdog.close, interrupted.restore, logger.close, checkpoints.close):
                closing.callback(close)
            if start == 0 and options.eval_first:
                evaluate(0)
            clock.charge("start_up")
            watchdog.feed("compiling the step", SLACK_S)
            while not stop:
                try:
                    for batch, host in built.batches(step, options.steps):
                        step += 1
                        # A device that still computes does not wait for data.
                        busy = pending and not pending[1]["loss"].is_ready()
                        clock.charge("step" if busy else "data")
                        if options.record_examples:
                            log.record_examples(folder, process, step, rows_B.tolist(), host["index"].tolist())
                        bad_records += host["skipped"]
                        if step in met.over:
                            measured, current = None, pass_over(current)
                        else:
                            expected = (step % (options.recompute_every or math.inf) == 0
                                        and guards.checksums(step_fn(jax.tree.map(jnp.copy, current), batch)[0]))
                            current, metrics = distributed.settle(step_fn(current, batch))
                            measured = step, metrics, bad_records
                            if expected:
                                guards.check_again(step, expected, guards.checksums(current))
                        if step - 1 == start:
                            clock.charge("compile")
                        watchdog.feed(f"step {step + 1}")
                        if pending:
                            read(*pending)
                        pending = measured
                        stop = interrupted.stops_after(step) or step == options.steps
                        judge = step == options.steps or step % options.eval_every == 0
                        keep = (stop or step % options.save_every == 0 or step in options.keep_at or due(step)
                                or (judge and options.keep_best is not None))
                        if pending and (keep or judge):  # only when the metrics of the very step are known to be sound
                            read(*pending)
                            pending = None
                        if step % (options.check_replicas_every or math.inf) == 0:
                            guards.check_replicas(step, current.params)
                        # Evaluated before it is saved: a checkpoint says that the log is complete up to its step.
                        found = evaluate(step) if judge else {}
                        if keep:
                            save(step, checkpoints.score(found))
                            watchdog.feed(f"step {step + 1}")
                        if stop:
                            break
                except guards.BadStep as bad:
                    pending = current = None  # type: ignore[assignment]  # room for the state that is restored
                    step, current, bad_records = roll_back(bad)
                    stop = step == options.steps
        finish(folder, logger, step, options.steps, clock)
    return step == options.steps


@functools.partial(jax.jit, donate_argnums=0)
def pass_over(current: TrainState) -> TrainState:
    """The state after a step whose batch is not used."""
    return current._replace(step=current.step + 1)


def finish(folder: pathlib.Path, logger: log.Logger, step: int, steps: int, clock: Clock) -> None:
    """What a run ends with: a table of its evaluations, or how to go on; the report; where the time went."""
    if not logger.show:
        return
    page = report.write(folder)
    if step < steps:
        logger.say(f"stopped at step {step} of {steps}, saved in {folder}. To go on, run the same command again.")
    else:
        logger.say(log.summary(folder))
    spent, wall = clock.spent, clock.wall()
    logger.say("time: " + ", ".join(f"{kind} {spent[kind] / wall:.0%}" for kind in spent if spent[kind] > wall / 200))
    saving = spent["save"] / max(spent["save"] + spent["step"] + spent["data"], 1e-9)
    if saving > MOST_SAVING and spent["save"] > 10:  # seconds
        logger.say(f"saving took {saving:.0%} of the time of training: a larger run.save_every would cost less")
    logger.say(f"report: {page}")


def advice(saved: int | None, too_many: bool) -> str:
    """What to do about a bad step."""
    last = "No checkpoint had been saved" if saved is None else f"The last good checkpoint is of step {saved}"
    often = f" More than run.max_bad_steps of the last {guards.WINDOW} steps were bad." if too_many else ""
    return (f"{last}.{often} Try a lower optim.learning_rate, a longer optim.warmup, optim.clip=1.0 or"
            " model.dtype='float32'" + ("" if too_many else "; or run.on_bad_step='skip' or 'rollback'"))
