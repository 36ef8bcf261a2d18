"""Bad steps are told from sound ones, and a single flipped bit from none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import MESHES

from sslx import guards
from sslx.sharding import make_mesh

SPIKE = 3.0


def history(values_N2):
    recent = guards.no_history()
    for loss, norm in values_N2:
        bad, _, recent = guards.judge(recent, jnp.float32(loss), jnp.float32(norm), None)
        assert not bad
    return recent


@pytest.fixture(scope="module")
def sound():
    """300 steps' (loss, norm), more than the window."""
    return np.random.default_rng(0).normal([3.0, 1.0], [0.3, 0.1], (300, 2)).astype(np.float32)


def test_limit_is_mean_and_deviations_of_the_window(sound):
    _, limits_2, _ = guards.judge(history(sound), jnp.float32(3), jnp.float32(1), SPIKE)
    window = sound[-guards.WINDOW:].astype(np.float64)
    np.testing.assert_allclose(limits_2, window.mean(0) + SPIKE * window.std(0), rtol=1e-5)


@pytest.mark.parametrize(("loss", "norm", "expected"), [
    (3.0, 1.0, None),
    (0.1, 0.0, None),  # far below is welcome
    (np.nan, 1.0, "the loss of step 7 is not finite"),
    (3.0, np.inf, "the gradient of step 7 is not finite"),
    (5.0, 1.0, "the loss of step 7 is 5, above"),
    (3.0, 2.0, "the gradient's norm of step 7 is 2, above"),
])
def test_bad_steps_leave_the_history_as_it_was(sound, loss, norm, expected):
    before = history(sound[:40])
    bad, limits_2, after = guards.judge(before, jnp.float32(loss), jnp.float32(norm), SPIKE)
    assert bool(bad) == (expected is not None)
    if expected:
        np.testing.assert_array_equal(after, before)
        assert guards.reason(7, loss, norm, np.asarray(limits_2)).startswith(expected)
    else:
        np.testing.assert_array_equal(after[:, -1], np.float32([loss, norm]))
        np.testing.assert_array_equal(after[:, :-1], before[:, 1:])


def test_no_spike_before_enough_steps_are_known(sound):
    few = history(sound[:guards.FEWEST - 1])
    assert not guards.judge(few, jnp.float32(100), jnp.float32(100), SPIKE)[0]
    assert guards.judge(history(sound[:guards.FEWEST]), jnp.float32(100), jnp.float32(1), SPIKE)[0]
    assert guards.judge(few, jnp.float32(np.nan), jnp.float32(1), SPIKE)[0]


def test_bad_steps_are_counted_over_resumes_and_roll_backs():
    events = [{"event": "skipped", "step": 5}, {"event": "skipped", "step": 30},
              {"event": "rolled back", "step": 8, "bad_step": 12, "passed_over": [11, 12]}]
    met = guards.Met(events, 20, 2)  # resumed at 20: step 30 is yet to come
    assert met.over == {11, 12} and [met.passed_over(step) for step in (10, 11, 20)] == [0, 1, 2]
    assert not met.too_many(20)
    met.bad(21)
    assert met.too_many(21) and not met.too_many(5 + guards.WINDOW)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_flipped_bit_changes_the_checksum(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(1).integers(0, 2, 24), dtype))
    whole = int(guards.checksum(jnp.asarray(x)))
    for i in range(x.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            flipped = x.copy()
            flipped.view(np.uint8)[i] ^= 1 << bit
            assert int(guards.checksum(jnp.asarray(flipped))) != whole, (i, bit)


@pytest.fixture
def tree():
    """Parameters on 2 x 2 x 2 devices: a sharded matrix and a whole vector, each on several devices."""
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), MESHES["2x2x2"], strict=True)))
    with jax.set_mesh(mesh):
        specs = {"kernel": jax.P("fsdp", "tensor"), "scale": jax.P()}
        values = {"kernel": np.arange(32, dtype=np.float32).reshape(8, 4), "scale": np.ones(3, np.float32)}
        yield {name: jax.device_put(x, jax.NamedSharding(mesh, specs[name])) for name, x in values.items()}


def with_flip(x, device):
    """The same array, where one device holds another last bit of its first value."""
    parts = []
    for shard in x.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.view(np.uint32).reshape(-1)[0] ^= 1
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@pytest.mark.parametrize("name", ["kernel", "scale"])
def test_a_replica_with_another_bit_is_named(tree, name):
    guards.check_replicas(3, tree)
    device = jax.devices()[5]
    with pytest.raises(guards.Corrupted, match=rf"params\['{name}'\] differ between replicas after step 3.*cpu:5"):
        guards.check_replicas(3, tree | {name: with_flip(tree[name], device)})


def test_a_step_that_gives_other_bits_the_second_time_is_named(tree):
    first = guards.checksums(tree)
    guards.check_again(3, first, guards.checksums(tree))
    again = tree | {"kernel": with_flip(tree["kernel"], jax.devices()[6])}
    with pytest.raises(guards.Corrupted, match=r"step 3, computed twice, .*\['kernel'\] on .*cpu:6"):
        guards.check_again(3, first, guards.checksums(again))
