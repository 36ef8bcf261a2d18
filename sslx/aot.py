"""python -m sslx.aot --config configs/X.py[:arg] --topology v5p:4x4x4 [--config.a.b=value]
                   [--overlap] [--control] [--search] [--json F]

Compiles the train step of a config with the real compiler for TPUs or GPUs that are not here, and reports whether it
fits, what fills the memory, every collective, and how fast a step can be: between all communication hidden and all
exposed. Nothing is run. Rows have the shape of config.data.synthetic if the config has it, else of data.train.

--overlap  is --config.run.overlap: the options that let communication run beside computation (sslx/topology.py).
--control  compiles with the scheduler that hides latencies off: nothing may be hidden then.
--search   tries meshes, rematerialization policies and batch sizes, and ranks those that fit.
"""

import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from sslx import command, experiment, flops, hlo, state, train
from sslx.command import Flag, told
from sslx.config import UserError, changed
from sslx.data import pipeline
from sslx.experiment import Experiment
from sslx.sharding import RULES, batch_sharding
from sslx.state import TrainState
from sslx.topology import Topology, topology

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class Step(NamedTuple):
    """A train step for devices that are not here: what it is made of, and the arguments to trace it with."""

    built: Experiment
    current: TrainState
    batch: dict[str, Any]


def step_of(conf: ml_collections.ConfigDict, devices: list[Any]) -> Step:
    """The step of `conf` on `devices`, without data and evaluations. The mesh must be set where it is traced."""
    return abstract_step(experiment.build(offline(conf), devices))


def offline(conf: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config without evaluations and, if it has config.data.synthetic, without data."""
    conf = conf.copy_and_resolve_references()
    with conf.unlocked():
        if conf.data.get("synthetic"):
            conf.data.train = dict(conf.data.synthetic, name="synthetic")
        conf.evals = {}
    return conf


def abstract_step(built: Experiment) -> Step:
    """The step of what is built, of which nothing is computed."""
    one = pipeline.stream(built.source, seed=built.run.seed).rows(np.zeros(1, int))
    row = pipeline.inputs(one, built.objective.reads)
    rows, lying = built.data.batch_size, batch_sharding(built.mesh)
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=lying)
                             for name, x in row.items()}
    with jax.set_mesh(built.mesh):
        return Step(built, state.abstract(built.objective, built.optimizer, built.run.seed, batch), batch)


def report(step: Step, target: Topology, control: bool = False) -> dict[str, Any]:
    """What the compiler makes of a step for the devices of `target`: the JSON of the command.

    control: without the scheduler that hides latencies.

    Bytes, FLOPs and seconds are those of one device and one step.
    """
    built, generation = step.built, target.generation
    began = time.monotonic()
    with jax.set_mesh(built.mesh):
        counted = train.count_flops(built.objective, step.current, step.batch)
        held = held_bytes(step)
        fn: Any = train.step_of(built)
        traced = fn.trace(step.current, step.batch)
        lowered = traced.lower(lowering_platforms=(generation.compiler.platform,))
        kernels = flops.kernels(traced.jaxpr.jaxpr)
        found: dict[str, Any] = dict(
            topology=target.name, devices=built.mesh.size, mesh=dict(built.mesh.shape),
            batch_size=built.data.batch_size, hbm_limit_bytes=generation.hbm_bytes, peak_flops=generation.peak_flops,
            flops_model_per_device=counted.model_total / built.mesh.size,
            flops_hw_per_device=counted.hw_total / built.mesh.size)
        try:
            compiled = lowered.compile(compiler_options=generation.compiler.control if control else {})
        except jax.errors.JaxRuntimeError as error:
            used = out_of_memory(error)
            return dict(fits=False, **found, hbm_peak_bytes=used, memory=held, compile_s=time.monotonic() - began)
    compile_s = time.monotonic() - began
    memory = compiled.memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    program = hlo.analyze(compiled.as_text(), built.mesh, generation, kernels)
    schedule = program.schedule
    at_peak = generation.peak_flops
    hidden = max(schedule.compute_s, schedule.ici_s, schedule.dcn_s)
    exposed = schedule.compute_s + schedule.ici_s + schedule.dcn_s
    model = found["flops_model_per_device"]
    return dict(
        fits=peak <= generation.hbm_bytes, **found, hbm_peak_bytes=peak,
        memory=held | dict(temporaries=memory.temp_size_in_bytes, code=memory.generated_code_size_in_bytes),
        flops_per_device=program.flops, hbm_bytes=program.hbm_bytes,
        collectives=[c._asdict() for c in program.collectives],
        wire_bytes=sum(c.wire_bytes for c in program.collectives),
        matmul_s=program.flops / at_peak, compute_s=schedule.compute_s, ici_s=schedule.ici_s, dcn_s=schedule.dcn_s,
        mfu_if_hidden=model / at_peak / hidden, mfu_if_exposed=model / at_peak / exposed,
        async_share=schedule.async_share, hidden_share=schedule.hidden_share, step_s=schedule.step_s,
        unknown_trips=list(program.unknown_trips), unknown_kernels=list(program.unknown_kernels), compile_s=compile_s)


def held_bytes(step: Step) -> dict[str, int]:
    """Bytes of a device by what they hold.

    `activations` are what the forward pass keeps for the backward pass, before the compiler reuses buffers; they are
    a part of the `temporaries`.
    """
    current, objective = step.current, step.built.objective

    def kept(params, aux, batch):
        return jax.vjp(lambda p: objective.loss(p, aux, batch, jax.random.key(0))[0], params)[1]

    residuals = jax.eval_shape(kept, current.params, current.aux, step.batch)
    micro = step.built.run.accumulate
    return dict(parameters=local_bytes(current.params), optimizer=local_bytes(current.opt_state),
                aux=local_bytes(current.aux), batch=local_bytes(step.batch),
                activations=local_bytes([x for x in jax.tree.leaves(residuals) if of_rows(x)]) // micro)


def of_rows(x: jax.ShapeDtypeStruct) -> bool:
    """Whether an array is cut along the batch: an activation."""
    return x.sharding is not None and any(axes == RULES["batch"] for axes in x.sharding.spec)


def local_bytes(tree: Any) -> int:
    """Bytes of a device's part of all arrays."""
    def local(x):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(local(x) for x in jax.tree.leaves(tree))


def out_of_memory(error: Exception) -> int:
    """The bytes that the compiler says a device would need; other errors are raised again."""
    # After and before buffers are assigned.
    found = (re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", str(error))
             or re.search(r"temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM", str(error)))
    if not found:
        raise error
    return int(float(found[1]) * UNITS[found[2]])


def flags_of(changes: dict[str, Any]) -> str:
    """What to put on the command line for these changes."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def lighter(conf: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """Changes of a config that may need less memory."""
    model, mesh = conf.model, conf.mesh
    batch, accumulate, calls = conf.data.batch_size, conf.run.get("accumulate", 1), conf.objective.get("steps")
    of_calls = {} if calls is None else {"objective.steps": 2 * calls}
    tries: list[dict[str, Any]] = [{"data.batch_size": batch // 2}, {"run.accumulate": 2 * accumulate} | of_calls,
                                   {"optim.moments": "bfloat16"}, {"optim.parameters": "bfloat16"}]
    if mesh.get("fsdp", 1) == 1:
        tries.append({"mesh.data": 1, "mesh.fsdp": -1})
    if "remat" in model and model.remat != "full":
        tries.append({"model.remat": "full"})
    if "vocab_size" in model:
        tries.append({"model.loss_chunks": 4 * model.get("loss_chunks", 1)})
    if "heads" in model:
        tries.append({"mesh.tensor": 2 * mesh.get("tensor", 1)})
    return tries


def remedies(conf: ml_collections.ConfigDict, target: Topology, control: bool) -> list[dict[str, Any]]:
    """The three changes of a config that need the least memory, each compiled."""
    found = []
    for changes in lighter(conf):
        try:
            result = report(step_of(changed(conf, changes), target.devices), target, control)
        except UserError:
            continue  # a mesh or a batch that cannot be
        found.append(dict(change=flags_of(changes), **{k: result[k] for k in ("fits", "hbm_peak_bytes")}))
    return sorted(found, key=lambda r: r["hbm_peak_bytes"])[:3]


def candidates(conf: ml_collections.ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Changes of mesh, rematerialization and batch: what recomputes and communicates least comes first."""
    remats = ("none", "dots", "attention", "full") if "remat" in conf.model else (None,)
    widest = min(devices, conf.model.get("kv_heads") or conf.model.get("heads", 1))
    for remat in remats:
        for times in (1, 2, 4):
            for tensor in (2**i for i in range(widest.bit_length())):
                yield {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": tensor,
                       "data.batch_size": times * conf.data.batch_size} | ({"model.remat": remat} if remat else {})


def search(conf: ml_collections.ConfigDict, target: Topology, control: bool, limit: int = 8) -> list[dict[str, Any]]:
    """Reports of the first `limit` candidates that may fit, best rows per second first, each with its `change`.

    Compiled is only what a slice can carry and whose weights, optimizer and activations fit by themselves.
    """
    found: list[dict[str, Any]] = []
    for changes in candidates(conf, len(target.devices)):
        if sum(r["fits"] for r in found) >= limit:
            break
        try:
            step = step_of(changed(conf, changes), target.devices)
        except UserError:
            continue  # a mesh that does not lie on the slice, a batch or a width that does not divide
        with jax.set_mesh(step.built.mesh):
            held = sum(held_bytes(step).values())
        if held > target.generation.hbm_bytes:
            continue
        result = report(step, target, control) | dict(change=flags_of(changes))
        found.append(result)
        print(f"{result['change']}: " + ("fits" if result["fits"] else "does not fit"), flush=True)
    if not found:
        raise UserError(f"no mesh, rematerialization or batch that was thought of fits {target.name}: take more"
                        " devices, or a smaller model or batch")
    return sorted(found, key=lambda r: (not r["fits"], -r["batch_size"] / r.get("step_s", math.inf)))


def ranking(found: list[dict[str, Any]]) -> str:
    """The reports of a search for people."""
    lines = [f"{'rows/s':>10} {'step ms':>9} {'MFU':>6} {'peak GiB':>9}  change"]
    for r in found:
        speed = (f"{r['batch_size'] / r['step_s']:>10.1f} {r['step_s'] * 1e3:>9.1f}"
                 f" {r['flops_model_per_device'] / r['peak_flops'] / r['step_s']:>6.1%}"
                 if r["fits"] else f"{'does not fit':>27}")
        lines.append(f"{speed} {r['hbm_peak_bytes'] / 2**30:>9.2f}  {r['change']}")
    return "\n".join([*lines, "as scheduled by the compiler; never run"])


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    mesh = " ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1) or "one device"
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines = [f"{found['topology']}, {found['devices']} devices, mesh {mesh}: {verdict},"
             f" {gib(found['hbm_peak_bytes'])} of {gib(found['hbm_limit_bytes'])} a device",
             "  of these " + ", ".join(f"{name} {gib(n)}" for name, n in found["memory"].items() if n)]
    if not found["fits"]:
        over = found["hbm_peak_bytes"] - found["hbm_limit_bytes"]
        lines += [f"  {gib(over)} too much; what helps most:"]
        return "\n".join(lines + [f"    {r['change']:<40} {gib(r['hbm_peak_bytes'])}" + (", fits" if r["fits"] else "")
                                  for r in found["remedies"]])
    lines += [f"  {found['flops_per_device']:.4g} FLOPs compiled, {found['flops_hw_per_device']:.4g} counted with and"
              f" {found['flops_model_per_device']:.4g} without recomputation",
              f"  {'collective':<20}{'axes':<20}{'count':>7}{'on the wire':>14}  beside computation"]
    lines += [f"  {c['kind']:<20}{'+'.join(c['axes']):<20}{c['count']:>7}{gib(c['wire_bytes']):>14}  "
              + ("yes" if c["is_async"] else "no") + (f" ({c['network']})" if c["network"] != "ici" else "")
              for c in sorted(found["collectives"], key=lambda c: -c["wire_bytes"])]
    lines += [f"  a step: {found['compute_s'] * 1e3:.1f} ms of computation ({found['matmul_s'] * 1e3:.1f} at peak),"
              f" {found['ici_s'] * 1e3:.1f} ms of links, {found['dcn_s'] * 1e3:.1f} ms between slices",
              f"  MFU from {found['mfu_if_exposed']:.1%} (all communication exposed) to"
              f" {found['mfu_if_hidden']:.1%} (all hidden)",
              f"  as scheduled {found['step_s'] * 1e3:.1f} ms: {found['async_share']:.1%} of the bytes asynchronous,"
              f" {found['hidden_share']:.1%} of the link time hidden",
              f"  compiled in {found['compile_s']:.0f} s; never run"]
    for name in ("unknown_trips", "unknown_kernels"):
        if found[name]:
            lines.append(f"  {name.replace('_', ' ')}: {', '.join(found[name])}")
    return "\n".join(lines)


FLAGS = {
    "topology": Flag(str, "The slice, such as v5p:4x4x4, or several: 2xv5e:16x16; or GPUs: h100:16x8.", required=True),
    "overlap": Flag(bool, "Options that let communication run beside computation."),
    "control": Flag(bool, "The scheduler that hides latencies is off."),
    "search": Flag(bool, "Tries meshes, remat policies and batch sizes."),
    "json": Flag(str, "File for the report."),
}


@told
def main(arguments: list[str]) -> int:
    """Parses flags, compiles, prints the report. Returns 0 if it fits, 1 if it does not, 2 for a mistake."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    conf, flags = command.parse("aot", __doc__, FLAGS, arguments)
    target, control = topology(flags["topology"]), flags["control"]
    if flags["overlap"]:
        conf = changed(conf, {"run.overlap": True})
    if flags["search"]:
        found: Any = search(conf, target, control)
    else:
        found = report(step_of(conf, target.devices), target, control)
        if not found["fits"]:
            found["remedies"] = remedies(conf, target, control)
    print(ranking(found) if flags["search"] else table(found))
    if flags["json"]:
        pathlib.Path(flags["json"]).write_text(json.dumps(found, indent=1) + "\n")
    best = found[0] if isinstance(found, list) else found
    return 0 if best["fits"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
