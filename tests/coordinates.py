"""The coordinate check of muP (Yang et al. 2022, appendix D): how far a few steps move every activation."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from experiments import CONFIGS, first_batch

from sslx.experiment import Experiment, build
from sslx.objectives import Objective
from sslx.optim import Optimizer

STEPS = 5


def experiment(name: str, changes: dict, rows: int = 4, length: int = 16) -> Experiment:
    """configs/<name>.py on one device, with fields such as "model.width" changed, on few tokens.

    Of many, a step has the mean direction, with which each aligns the less; only beyond as many widths does it show.
    """
    conf = CONFIGS[name].copy_and_resolve_references()
    conf.mesh, conf.data.batch_size = dict(data=1), rows
    for path, value in changes.items():
        section, field = path.split(".")
        conf[section][field] = value
    if "length" in conf.data.train:
        conf.data.train.length = length
    return build(conf, jax.devices()[:1])


def recorded(loss):
    """`loss`, with what every method of a module returns, by its path and how often it was called before, in aux."""

    def run(*arguments):
        found: dict[str, jax.Array] = {}

        def record(call, args, kwargs, context):
            result, module = call(*args, **kwargs), context.module
            inside = "blocks" in module.path or context.method_name == "<lambda>"  # scanned, with a trace of its own
            if isinstance(result, jax.Array) and not inside:
                root = module
                while isinstance(root.parent, nn.Module):
                    root = root.parent
                path = "/".join((type(root).__name__, *module.path, context.method_name))
                n = sum(name.rpartition(" ")[0] == path for name in found)
                found[f"{path} {n}"] = result.astype(jnp.float32)
            return result

        with nn.intercept_methods(record), mock.patch.object(nn, "jit", lambda body: body):  # traced where it is called
            value, (aux, _) = loss(*arguments)
        return value, (aux, found)

    return run


def changes_of(built: Experiment, seeds: int) -> dict[str, float]:
    """`changes` on the first batch of an experiment."""
    with jax.set_mesh(built.mesh):
        return changes(built.objective, built.optimizer, first_batch(built), seeds)


def changes(objective: Objective, optimizer: Optimizer, batch, seeds: int) -> dict[str, float]:
    """Mean |activation after STEPS steps - before| on the batch of these steps, averaged over seeds.

    What aux carries (a teacher, statistics) stays as it was.
    """
    gradient = jax.grad(recorded(objective.loss), has_aux=True)

    def moved(batch, seed):
        key = jax.random.fold_in(jax.random.key(0), seed)
        params, aux = objective.init(key, batch)

        def step(carry, _):
            params, opt_state = carry
            grads, (_, found) = gradient(params, aux, batch, key)
            return optimizer.update(grads, opt_state, params, key), found

        found = jax.lax.scan(step, optimizer.init(params), None, length=STEPS + 1)[1]
        return {name: jnp.abs(x[STEPS] - x[0]).mean() for name, x in found.items()}

    run = jax.jit(moved)
    found = [jax.device_get(run(batch, np.int32(seed))) for seed in range(seeds)]
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


def slopes(of_sizes: dict[int, dict[str, float]]) -> dict[str, float]:
    """d log change / d log size of every activation that moves, by least squares."""
    sizes, found = np.log(list(of_sizes)), list(of_sizes.values())
    moving = [name for name, x in found[0].items() if x]
    return {name: float(np.polyfit(sizes, np.log([x[name] for x in found]), 1)[0]) for name in moving}
