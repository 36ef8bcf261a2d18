"""Compiling for slices that are not here, with the real compilers of TPUs and GPUs."""

import importlib.util
import json
import math
import re
import runpy

import jax
import pytest
from experiments import CONFIGS, PODS, ROOT

from sslx import aot, command, train
from sslx.config import changed
from sslx.optim import DECAYED
from sslx.sharding import RULES
from sslx.topology import CUDA, GENERATIONS, topology

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install 'sslx[tpu]'")

QUICKSTART = ["--config", f"{ROOT}/configs/quickstart.py:debug", "--config.data.batch_size=16"]
KEYS = {"fits", "topology", "devices", "hbm_peak_bytes", "hbm_limit_bytes", "memory", "flops_per_device",
        "flops_model_per_device", "collectives", "compute_s", "ici_s", "dcn_s", "mfu_if_hidden", "mfu_if_exposed",
        "async_share", "hidden_share", "step_s", "compile_s"}


def topology_of(path) -> str:
    """The slice that a pod's config names in its own text."""
    return re.search(r"--topology (\S+)", path.read_text())[1]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The JSON of the command for 16 chips that share all weights."""
    out = tmp_path_factory.mktemp("aot") / "report.json"
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=16"]
    assert aot.main([*QUICKSTART, *mesh, "--topology", "v5e:4x4", "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_report_has_the_documented_keys(sharded):
    assert sharded.keys() >= KEYS
    assert (sharded["topology"], sharded["devices"], sharded["fits"]) == ("v5e:4x4", 16, True)
    assert 0 < sharded["hbm_peak_bytes"] < sharded["hbm_limit_bytes"]
    assert sharded["memory"].keys() >= {"parameters", "optimizer", "activations", "temporaries"}


def test_compiled_flops_are_the_counted_ones(sharded):
    assert sharded["unknown_trips"] == sharded["unknown_kernels"] == []
    assert sharded["flops_per_device"] == pytest.approx(sharded["flops_hw_per_device"], rel=0.01)


def test_every_weight_is_gathered_over_its_axis(sharded):
    gathers = [c for c in sharded["collectives"] if c["kind"] == "all-gather"]
    assert gathers and all(c["axes"] == ["fsdp"] and c["group"] == 16 for c in gathers)
    # Each bfloat16 weight comes from 15 of 16 devices at least once, and at most once for each pass and lookup.
    weights = sharded["memory"]["parameters"] * 16 / 4 * 2 * 15 / 16
    assert 0.9 * weights < sum(c["wire_bytes"] for c in gathers) < 3 * weights


def test_roofline_is_an_interval(sharded):
    assert 0 < sharded["mfu_if_exposed"] <= sharded["mfu_if_hidden"] < 1
    assert sharded["compute_s"] <= sharded["step_s"] <= 1.001 * sum(
        sharded[k] for k in ("compute_s", "ici_s", "dcn_s"))


def test_overlap_reaches_the_compiler(tmp_path):
    out, shares = tmp_path / "report.json", []
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--topology", "v5p:2x2x1"]
    for flags in ([], ["--overlap"]):
        assert aot.main([*QUICKSTART, *mesh, *flags, "--json", str(out)]) == 0
        shares.append(json.loads(out.read_text())["async_share"])
    assert shares[0] < 0.1 and shares[1] > 0.5


def parsed(*flags):
    return command.parse("aot", "", aot.FLAGS, [*QUICKSTART, "--topology", "v5p:2x2x1", *flags])[0]


def test_the_flag_and_the_field_of_the_config_are_one_switch():
    devices = topology("v5p:2x2x1").devices

    def options(devices, *flags):
        return aot.step_of(parsed(*flags), devices).built.compiler_options

    assert options(devices) == {}
    assert options(devices, "--config.run.overlap=True") == GENERATIONS["v5p"].overlap != {}
    assert options(devices[:1], "--config.run.overlap") == {}  # nothing talks
    assert options(jax.devices("cpu"), "--config.run.overlap") == {}


def test_what_a_remedy_prints_can_be_typed():
    conf = parsed()
    changes = aot.lighter(conf)
    assert {"run.accumulate": 2} in changes and {"optim.parameters": "bfloat16"} in changes
    for change in changes:
        typed = parsed(*aot.flags_of(change).split())
        assert typed.to_dict() == changed(conf, change).to_dict()
        assert typed.to_dict() != conf.to_dict()


def test_twice_the_calls_of_a_loss_are_twice_the_steps_of_its_schedule():
    conf = CONFIGS["byol_fashion_mnist"]
    assert {"run.accumulate": 2, "objective.steps": 2 * conf.objective.steps} in aot.lighter(conf)


def test_parameters_in_bfloat16_take_half_the_memory():
    devices = topology("v5p:2x2x1").devices

    def held(*flags):
        step = aot.step_of(parsed(*flags), devices)
        with jax.set_mesh(step.built.mesh):
            return aot.held_bytes(step)

    wide, narrow = held(), held("--config.optim.parameters=bfloat16")
    assert 0.5 < narrow["parameters"] / wide["parameters"] < 0.52  # but for norms
    assert narrow["optimizer"] == wide["optimizer"]


def test_a_slice_that_does_not_exist_is_refused(capsys):
    assert aot.main([*QUICKSTART, "--topology", "v5e:32x32"]) == 2
    assert "'v5e:32x32' does not exist" in capsys.readouterr().err


@pytest.mark.skipif(not any(map(importlib.util.find_spec, CUDA.packages)), reason="JAX's CUDA plugin is missing")
def test_gpus_run_the_counted_flops_with_cudnn_attention_and_reduce_between_hosts(tmp_path):
    out, text = tmp_path / "report.json", ["--config", f"{ROOT}/configs/causal_1b.py:debug"]
    longer = ["--config.model.max_length=256", "--config.data.synthetic.length=256", "--config.data.batch_size=16"]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=8"]
    assert aot.main([*text, *longer, *mesh, "--topology", "h100:2x8", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found.keys() >= KEYS and found["unknown_trips"] == found["unknown_kernels"] == []
    assert found["flops_per_device"] == pytest.approx(found["flops_hw_per_device"], rel=0.01)
    assert {c["network"] for c in found["collectives"] if c["axes"] == ["fsdp"]} == {"ici"}
    assert {c["network"] for c in found["collectives"] if "data" in c["axes"]} == {"dcn"}
    assert 0 < found["hbm_peak_bytes"] < found["hbm_limit_bytes"]


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_helps(capsys):
    flags = ["--config.data.batch_size=1048576", "--config.model.scan=True"]
    assert aot.main([*QUICKSTART, *flags, "--topology", "v5e:2x2"]) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "GiB too much; what helps most:" in said
    assert len(re.findall(r"^    --config\.", said, re.M)) == 3


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_pod_config_is_built_and_counted_for_its_slice(path):
    step = aot.step_of(runpy.run_path(str(path))["get_config"](), topology(topology_of(path)).devices)
    with jax.set_mesh(step.built.mesh):
        counted = train.count_flops(step.built.objective, step.current, step.batch)
    assert counted.hw_total >= counted.model_total > 1e14
    replicas = step.built.mesh.shape["data"]
    for where, x in jax.tree_util.tree_leaves_with_path(step.current.params):
        if where[-1].key in DECAYED and x.size > 1e6:  # a matrix lies over all devices of a replica
            everywhere = aot.local_bytes(x) * step.built.mesh.size
            assert everywhere == replicas * x.size * x.dtype.itemsize, jax.tree_util.keystr(where)


# Passes through the network whose gradients are summed: DINO's crops of two sizes go through one after the other.
BACKWARD = {"dino_vit_g": 2}
PROJECTION = 128  # of SimCLR, by default


def least_wire_bytes(name, step):
    """What a device must send at least, given how weights and rows lie, and bfloat16: an analytic count.

    Every weight that is cut n ways is gathered for the forward and the backward pass, and its gradient scattered, each
    (n - 1) / n of it; over r replicas a gradient is reduced, 2 (r - 1) / r of what a device has. Tokens go to their
    experts and back in three passes (forward, recomputed, backward), 1 - 1 / n of them each time. Every device scores
    its views against the projections of all, float32, whose gradient is scattered.
    """
    mesh, conf, sent = step.built.mesh.shape, step.built.config, 0.0

    def devices(*axes):
        return math.prod(mesh[axis] for axis in axes)

    for path, x in jax.tree_util.tree_leaves_with_path(step.current.params):
        cut = [(axes,) if isinstance(axes, str) else axes for axes in x.sharding.spec if axes]
        gathered = [axes for axes in cut if axes in (RULES["embed"], (RULES["expert_embed"],))]
        n, held = devices(*sum(gathered, ())), 2 * x.size / devices(*sum(cut, ()))
        r = devices(*{"data", "fsdp", "expert"} - set(sum(cut, ())))
        moves = 2 if path[-1].key == "embedding" else 3  # looked up, it is not needed again
        sent += BACKWARD.get(name, 1) * held * (moves * (n - 1) + 2 * (r - 1) / r)
    if mesh["expert"] > 1:
        model, (rows, T) = conf["model"], next(iter(step.batch.values())).shape
        experts = model["experts"]["n"]
        places = experts * math.ceil(1.25 * model["experts"]["top_k"] * T / experts)
        tokens = rows / devices("data", "fsdp", "expert") * places
        sent += 6 * model["depth"] * 2 * tokens * model["width"] * (1 - 1 / mesh["expert"])
    if conf["objective"]["name"] == "simclr":
        sent += 2 * 4 * 2 * conf["data"]["batch_size"] * PROJECTION * (1 - 1 / devices("data", "fsdp", "expert"))
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_pod_config_fits_its_slice_and_sends_what_it_must(path):
    slice_ = topology(topology_of(path))
    conf = changed(runpy.run_path(str(path))["get_config"](), {"run.overlap": True})
    step = aot.step_of(conf, slice_.devices)
    found = aot.report(step, slice_)
    assert found["fits"] and found["unknown_trips"] == found["unknown_kernels"] == []
    assert found["flops_per_device"] == pytest.approx(found["flops_hw_per_device"], rel=0.01)
    assert found["wire_bytes"] <= 1.2 * least_wire_bytes(path.stem, step)
    for c in found["collectives"]:  # nothing large goes over more devices than what it is cut over
        assert c["group"] == math.prod(found["mesh"][axis] for axis in c["axes"])
        assert c["largest_bytes"] < 2**20 or any(
            set(c["axes"]) <= {axes} | set(axes or ()) for axes in RULES.values()), c


@pytest.mark.slow
@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_nothing_is_hidden_without_the_scheduler(path):
    slice_ = topology(topology_of(path))
    conf = changed(runpy.run_path(str(path))["get_config"](), {"run.overlap": True})
    assert aot.report(aot.step_of(conf, slice_.devices), slice_, control=True)["hidden_share"] == 0
