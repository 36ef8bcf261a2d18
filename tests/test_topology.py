"""Topologies: only slices that exist, as their makers and the compiler describe them, and meshes that lie on them."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import UserError
from sslx.topology import CUDA, GENERATIONS, LIBTPU, arrange, topology

libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is missing")
cuda = pytest.mark.skipif(not any(map(importlib.util.find_spec, CUDA.packages)), reason="JAX's CUDA plugin is missing")

TPUS, GPUS = ([g for g in GENERATIONS.values() if g.compiler is compiler] for compiler in (LIBTPU, CUDA))


@pytest.mark.parametrize("name, near", [("v5p:4x4x5", "v5p:4x4x4"), ("v5e:32x32", "v5e:"), ("v5p-256", "v5p:"),
                                        ("v7x:4x4x4", "v4:4x4x4"), ("0xv5e:4x4", "slices"), ("", "v4"),
                                        ("h100:16x9", "h100:16x8"), ("a100:600x8", "a100:")])
def test_what_does_not_exist_is_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=re.escape(near)):
        topology(name)


def test_the_number_of_slices_is_said_once():
    with pytest.raises(UserError, match="2 slices and slices=4"):
        topology("2xv5e:4x4", slices=4)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5e:4x4", "tpu"), ("h100:16x8", "cuda13")):
        with pytest.raises(UserError, match=rf'pip install "sslx\[{extra}\]"'):
            topology(name)


def test_rings_close_around_whole_cubes_and_the_full_side_of_a_pod():
    assert GENERATIONS["v5p"].links.wrap((4, 4, 8)) == (True, True, True)
    assert GENERATIONS["v5p"].links.wrap((2, 4, 4)) == (False, False, False)
    assert GENERATIONS["v5e"].links.wrap((8, 16)) == (False, True, False)


@libtpu
@pytest.mark.parametrize("generation", TPUS, ids=lambda g: g.name)
def test_the_compiler_knows_every_slice_and_its_memory(generation):
    for shape in generation.shapes:
        chips = math.prod(map(int, shape.split("x")))
        if chips <= 1024:
            found = topology(f"{generation.name}:{shape}")
            assert len(found.devices) == chips * generation.devices_per_chip
            assert {d.device_kind for d in found.devices} == {generation.device_kind}
            hosts = {d.process_index for d in found.devices}
            assert len(hosts) == math.ceil(chips / generation.chips_per_host)
    mesh = Mesh(np.asarray(topology(f"{generation.name}:{generation.shapes[1]}").devices), "d")
    huge = jax.ShapeDtypeStruct((mesh.size, 1 << 40), jnp.int8, sharding=NamedSharding(mesh, P("d")))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: x + 1).trace(huge).lower(lowering_platforms=("tpu",)).compile()
    limit = re.search(r"available HBM \((.*?)G\)", str(error.value))
    # Versions differ by 0.01.
    assert limit and float(limit.group(1)) == pytest.approx(generation.hbm_bytes / 2**30, abs=0.02)


@libtpu
@pytest.mark.parametrize("generation", TPUS, ids=lambda g: g.name)
def test_the_compiler_accepts_the_options_for_overlap(generation):
    mesh = Mesh(np.asarray(topology(f"{generation.name}:{generation.shapes[3]}").devices), "d")
    x = jax.ShapeDtypeStruct((mesh.size, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))
    gather = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
    gather.trace(x).lower(lowering_platforms=("tpu",)).compile(compiler_options=generation.overlap)


@cuda
@pytest.mark.parametrize("generation", GPUS, ids=lambda g: g.name)
def test_the_compiler_knows_every_gpu_its_hosts_and_the_options_for_overlap(generation):
    found = topology(f"{generation.name}:16x8")
    assert [d.process_index for d in found.devices] == [i // 8 for i in range(128)]
    assert {d.device_kind for d in found.devices} == {generation.device_kind}
    mesh = Mesh(np.asarray(found.devices), "d")
    x = jax.ShapeDtypeStruct((mesh.size, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))
    gather = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
    lowered = gather.trace(x).lower(lowering_platforms=("cuda",))
    for options in (generation.overlap, generation.compiler.control):
        assert "all-gather" in lowered.compile(compiler_options=options).as_text()


@libtpu
@pytest.mark.parametrize("name, shape", [
    ("v5p:4x4x4", (1, 16, 4)), ("v5p:4x4x8", (1, 8, 1, 16)), ("v5p:8x8x8", (64, 8)), ("v6e:16x16", (16, 16)),
    ("v4:4x4x4", (4, 4, 4)), ("tpu7x:4x4x4", (64, 2))])
def test_a_mesh_axis_lies_along_whole_dimensions(name, shape):
    slice_ = topology(name)
    mesh = arrange(shape, slice_.devices)
    assert sorted(d.id for d in mesh.flat) == sorted(d.id for d in slice_.devices)
    places = np.array([(*d.coords, d.core_on_chip) for d in mesh.flat]).reshape(*shape, 4)
    whole = np.ptp(places.reshape(-1, 4), axis=0) + 1
    for axis, size in enumerate(shape):
        groups = np.moveaxis(places, axis, 0).reshape(size, -1, 4)
        spans = np.ptp(groups, axis=0) + 1
        assert (np.prod(spans, axis=1) == size).all()  # a box
        assert ((spans == 1) | (spans == whole)).all()  # from end to end


@libtpu
def test_over_slices_only_the_first_axis_crosses():
    two = topology("2xv5e:4x4")
    assert topology("v5e:4x4", slices=2).name == two.name
    mesh = arrange((2, 4, 4), two.devices, two.slices)
    assert [{d.slice_index for d in part.flat} for part in mesh] == [{0}, {1}]
    with pytest.raises(UserError, match="multiple of 2; it is 1"):
        arrange((1, 32, 1), two.devices, two.slices)


@libtpu
def test_a_mesh_that_would_share_links_is_refused():
    with pytest.raises(UserError, match="1x8x8 does not lie on a slice of 4x4x4.* 1, 4, 16, 64"):
        arrange((1, 8, 8), topology("v5p:4x4x4").devices)


def test_cpus_keep_their_order():
    devices = jax.devices()
    assert arrange((2, 4), devices).ravel().tolist() == devices
    with pytest.raises(UserError, match="takes 6 devices; there are 8"):
        arrange((2, 3), devices)
