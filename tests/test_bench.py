"""What the bench says of a step is consistent, its waiting is real waiting, its lines are lines of the source."""

import inspect
import json
import time

import jax
import jax.numpy as jnp
import pytest
from command import CONFIGS
from experiments import experiment
from growth import __main__ as growth

from sslx import aot, bench, command, profile, train
from sslx.data import Source

QUICKSTART = ["--config", f"{CONFIGS / 'quickstart.py'}:debug"]


def test_figures_of_a_step_agree(tmp_path, capsys):
    assert bench.main([*QUICKSTART, "--steps=3", f"--profile={tmp_path / 'trace'}", f"--json={tmp_path / 'f'}"]) == 0
    found = json.loads((tmp_path / "f").read_text())
    step_s = found["step_s"]
    assert 0 < step_s["low"] <= step_s["median"] <= step_s["high"] and found["steps"] == 3
    assert found["tokens_per_s"] == pytest.approx(64 * found["examples_per_s"])
    assert found["tokens_per_s"] == pytest.approx(8 * 64 / step_s["median"])
    assert found["model_flops_per_s"] == pytest.approx(found["flops_per_step"] / found["devices"] / step_s["median"])
    assert found["mfu"] == pytest.approx(found["model_flops_per_s"] / found["ceiling"]) and found["hfu"] >= found["mfu"]
    assert found["trace_s"] + found["compile_s"] < found["first_step_s"] and found["mfu_of_sheet"] is None
    assert 0 <= found["waited_share"] <= 1 and found["peak_bytes"] > found["temporary_bytes"] > 0
    shares = [line["share"] for line in found["dearest"]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6
    products = [line["where"] for line in found["dearest"] if line["does"] == "dot_general"]
    assert products and all(where.startswith("layers.py:") for where in products)
    shown = capsys.readouterr().out
    assert "waiting for data" in shown and found["dearest"][0]["where"] in shown


class Slow:
    """Examples that take their time."""

    def __init__(self, examples, seconds):
        self.examples, self.seconds = examples, seconds

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return self.examples[index]


@pytest.mark.parametrize("seconds, low, high", [(0.0, 0.0, 0.3), (0.2, 0.7, 1.0)])
def test_waiting_is_for_the_data(seconds, low, high):
    built = experiment("quickstart")
    examples = Slow(built.source.examples, seconds) if seconds else built.source.examples
    with jax.set_mesh(built.mesh):
        found = bench.of_steps(built._replace(source=Source(examples, built.source.info)), 6, time.monotonic(), None)
    assert low <= found["waited_share"] <= high


def test_input_alone():
    built = experiment("quickstart")
    examples, info = built.source
    fast, slow = (bench.of_data(built._replace(source=Source(Slow(examples, seconds), info)), 4)
                  for seconds in (0.0, 0.01))
    assert slow["examples_per_s"] <= 200 < fast["examples_per_s"]  # two threads, 10 ms each
    assert fast["units_per_s"] == pytest.approx(64 * fast["examples_per_s"])
    assert fast["bytes_per_s"] == pytest.approx(4 * fast["units_per_s"])


def test_lines_are_those_of_the_source():
    def product(x):
        y = jnp.tanh(x)
        return y @ y  # here

    program = jax.jit(product).lower(jnp.ones((64, 64))).compile().as_text()
    lines, first = inspect.getsourcelines(product)
    here = first + next(i for i, line in enumerate(lines) if "here" in line)
    assert (f"test_bench.py:{here}", "dot_general") in profile.origins(program).values()
    assert (f"test_bench.py:{here - 1}", "tanh") in profile.origins(program).values()


@pytest.mark.parametrize("flags, words", [(["--steps=1"], "--steps is 1"), (["--config.model.width=63"], "heads"),
                                          ([f"--profile={__file__}"], "is a file")])
def test_mistakes(flags, words, capsys):
    assert bench.main([*QUICKSTART, *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", growth.AXES)
def test_what_grows_is_what_is_named(name):
    """Every point of tests/growth is a config that can be built, and costs more FLOPs than the one before."""
    axis = growth.AXES[name]
    for variant in axis.variants:
        costs = []
        for value in axis.values[:2]:
            conf, _ = command.parse("bench", "", bench.FLAGS, growth.flags(axis, value, variant))
            step = aot.step_of(conf, jax.devices()[:1])
            with jax.set_mesh(step.built.mesh):
                costs.append(train.count_flops(step.built.objective, step.current, step.batch))
        assert costs[0].model_total < costs[1].model_total <= costs[1].hw_total
