"""What tests/peers compares is built as it is named; the peers themselves are not installed here."""

import pathlib
import sys

import jax
import pytest

from sslx import aot

sys.path.append(str(pathlib.Path(__file__).parent / "peers"))
import cases  # noqa: E402
import ours  # noqa: E402

# Parameters of GPT-2; 2 V D + L (3 D^2 + 3 D H) with half as many heads of keys; ViT-L with its decoder; ResNet-50 with
# its projector.
MILLIONS = {"gpt2": 124, "llama": 1169, "mae_l": 330, "simclr_50": 28}


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.INPUTS])
def test_a_case_is_built_as_it_is_named(name):
    step = aot.step_of(ours.config(name, "bfloat16", pathlib.Path()), jax.devices()[:1])
    n = sum(x.size for x in jax.tree.leaves(step.current.params))
    if name in cases.LARGE:
        assert n == pytest.approx(MILLIONS[name] * 1e6, rel=0.01)
    assert n > 1e6
