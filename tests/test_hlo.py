"""Compiled programs: real ones for absent TPUs and GPUs against counts by hand, and each piece of the syntax."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx import flops, hlo
from sslx.topology import CUDA, GENERATIONS, arrange, topology

libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is missing")
cuda = pytest.mark.skipif(not any(map(importlib.util.find_spec, CUDA.packages)), reason="JAX's CUDA plugin is missing")

AXES = ("data", "fsdp", "tensor")


# Real programs

def absent_mesh(name, shape, mode=AxisType.Explicit):
    slices = topology(name)
    devices = arrange(shape, slices.devices, slices.slices)
    return Mesh(devices, AXES, axis_types=(mode,) * 3), slices.generation


def compiled(fn, name, shape, *arguments, options=None, kernels=None, mode=AxisType.Explicit):
    """The analysis of fn(*arguments), each (shape, dtype, spec), compiled for a topology and mesh."""
    mesh, generation = absent_mesh(name, shape, mode)
    with jax.set_mesh(mesh):
        given = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p)) for s, d, p in arguments]
        lowered = jax.jit(fn).trace(*given).lower(lowering_platforms=(generation.compiler.platform,))
        program = lowered.compile(compiler_options=options)
    return hlo.analyze(program.as_text(), mesh, generation, kernels or {})


def of(program, kind, axes, smallest=1000):
    """(executions, bytes on the wire) of the collectives of a kind, but for scalars."""
    found = [c for c in program.collectives if c.kind == kind and c.axes == axes and c.largest_bytes >= smallest]
    return sum(c.count for c in found), sum(c.wire_bytes for c in found)


LAYERS, WIDTH = 6, 1024


def chain(ws, x):
    """Layers whose weights are gathered before use, as in ZeRO-3."""
    def layer(x, w):
        return jax.nn.gelu(x @ jax.sharding.reshard(w.astype(jnp.bfloat16), P())), None
    return jnp.mean(jax.lax.scan(layer, x, ws)[0].astype(jnp.float32) ** 2)


@functools.cache
def trained(name, shape, rows, options=()):
    """`chain` with its gradient."""
    return compiled(jax.value_and_grad(chain), name, shape,
                    ((LAYERS, WIDTH, WIDTH), jnp.float32, P(None, "fsdp")),
                    ((rows, WIDTH), jnp.bfloat16, P(("data", "fsdp"))), options=dict(options))


@libtpu
def test_a_scan_gathers_and_multiplies_once_a_layer():
    rows, n = 512, 16
    program = compiled(chain, "v5e:4x4", (1, n, 1), ((LAYERS, WIDTH, WIDTH), jnp.float32, P(None, "fsdp")),
                       ((rows, WIDTH), jnp.bfloat16, P("fsdp")))
    assert program.unknown_trips == program.unknown_kernels == ()
    assert program.flops == LAYERS * 2 * rows // n * WIDTH * WIDTH
    assert of(program, "all-gather", ("fsdp",)) == (LAYERS, LAYERS * WIDTH * WIDTH * 2 * (n - 1) // n)
    shards = LAYERS * WIDTH * WIDTH * 4 // n  # in float32; what is made of them stays on the chip
    assert shards <= program.hbm_bytes < 1.2 * shards


ROWS = 64 * 1024  # a thousand a device: products that take as long as gathering their weights
SIX = tuple(GENERATIONS["v5p"].overlap.items())


@libtpu
def test_the_gradient_is_scattered_and_what_is_offloaded_is_hidden():
    n = 64
    program = trained("v5p:4x4x4", (1, n, 1), ROWS, SIX)
    assert program.unknown_trips == ()
    assert program.flops == 3 * LAYERS * 2 * ROWS // n * WIDTH * WIDTH
    wire = LAYERS * WIDTH * WIDTH * 2 * (n - 1) // n
    assert of(program, "reduce-scatter", ("fsdp",)) == (LAYERS, wire)
    assert of(program, "all-gather", ("fsdp",)) == (LAYERS, wire)
    assert program.schedule.async_share > 0.99
    assert program.schedule.hidden_share > 0.5


@libtpu
def test_controls_read_zero_hidden():
    """What waits for itself, and what is offloaded by a compiler that schedules nothing beside it."""
    plain = trained("v5p:4x4x4", (1, 64, 1), ROWS).schedule
    assert (plain.async_share, plain.hidden_share) == (0, 0)
    assert plain.step_s == pytest.approx(plain.compute_s + plain.ici_s)
    idle = trained("v5p:4x4x4", (1, 64, 1), ROWS, (*SIX, ("xla_tpu_enable_latency_hiding_scheduler", False))).schedule
    assert idle.async_share > 0.99
    assert idle.hidden_share == 0


@libtpu
def test_tensor_parallel_products_are_reduced():
    rows, data, n = 512, 4, 4

    def mlps(ups, downs, x):
        def layer(x, weights):
            up, down = weights
            return jnp.einsum("bf,fd->bd", jax.nn.gelu(x @ up), down, out_sharding=P("data")), None
        return jax.lax.scan(layer, x, (ups, downs))[0]

    weight = (LAYERS, WIDTH, WIDTH)
    program = compiled(mlps, "v5e:4x4", (data, 1, n), (weight, jnp.bfloat16, P(None, None, "tensor")),
                       (weight, jnp.bfloat16, P(None, "tensor")), ((rows, WIDTH), jnp.bfloat16, P("data")))
    assert program.flops == LAYERS * 2 * 2 * (rows // data) * WIDTH * WIDTH // n
    assert of(program, "all-reduce", ("tensor",)) == (LAYERS, LAYERS * 2 * (n - 1) * (rows // data) * WIDTH * 2 // n)
    assert program.schedule.hidden_share == 0


@libtpu
def test_across_slices_the_shards_of_the_gradient_are_reduced():
    n = 16
    program = trained("2xv5e:4x4", (2, n, 1), 2 * n * 32)
    across = [c for c in program.collectives if c.network == "dcn" and c.largest_bytes > 1000]
    assert {(c.kind, c.axes, c.group) for c in across} == {("all-reduce", ("data",), 2)}
    assert sum(c.wire_bytes for c in across) == pytest.approx(LAYERS * WIDTH * WIDTH * 2 / n, rel=1e-3)
    # The 4 devices of a host send at once.
    assert program.schedule.dcn_s == pytest.approx(sum(c.wire_bytes for c in across) * 4 / 12.5e9, rel=1e-3)
    assert all(c.axes == ("fsdp",) for c in program.collectives if c.network == "ici")


@libtpu
def test_a_product_in_a_ring_is_a_loop_with_permutes():
    """`windowed_dot_general`: steps by 2, each with two shifts beside two products; some steps are peeled."""
    n, d, f = 16, 4096, 8192
    program = compiled(jnp.matmul, "v5e:4x4", (1, 1, n), ((d, d), jnp.bfloat16, P("tensor")),
                       ((d, f), jnp.bfloat16, P(None, "tensor")), mode=AxisType.Auto,
                       options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": 0})
    assert program.unknown_trips == ()
    assert program.flops == 2 * d * d * f // n
    count, wire = of(program, "collective-permute", ("tensor",))
    assert n - 1 <= count <= n + 1
    assert wire == count * d * d * 2 // n
    assert program.schedule.async_share == 1


@libtpu
def test_kernels_are_counted_as_given_and_of_branches_the_longest():
    def multiply(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def fn(x, y):
        kernel = pl.pallas_call(multiply, out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32), name="multiply")
        kernel = jax.shard_map(kernel, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), check_vma=False)
        x = jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(kernel(x.astype(jnp.bfloat16), y)), x.astype(jnp.float32))
        return jax.lax.cond(x.sum() > 0, lambda: x @ y.astype(jnp.float32), lambda: x * 2)

    arguments = ((1024, 256), jnp.bfloat16, P("fsdp")), ((256, 256), jnp.bfloat16, P())
    one = 2 * 256**3
    known = compiled(fn, "v5e:2x2", (1, 4, 1), *arguments, kernels={"multiply": one})
    assert (known.flops, known.unknown_kernels) == (5 * one + one, ())
    assert compiled(fn, "v5e:2x2", (1, 4, 1), *arguments).unknown_kernels == ("multiply",)


@pytest.mark.parametrize("groups, strides, padding", [(1, 1, 0), (1, 2, 0), (4, 1, 0), (1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("name", [pytest.param("v5e:2x2", marks=libtpu), pytest.param("h100:1x4", marks=cuda)])
def test_convolutions_and_their_gradients_agree_with_the_jaxpr(name, groups, strides, padding):
    def loss(kernel, x):
        y = jax.lax.conv_general_dilated(x, kernel, (strides, strides), [(padding, padding)] * 2,
                                         feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y.astype(jnp.float32) ** 2).sum()

    if groups > 1 and name.startswith("h100"):
        pytest.skip("every GPU computes all rows of a grouped convolution: the compiler gathers them")
    kernel, x = ((3, 3, 64 // groups, 128), jnp.bfloat16, P()), ((32, 17, 17, 64), jnp.bfloat16, P("fsdp"))
    step = jax.value_and_grad(loss, (0, 1))
    program = compiled(step, name, (1, 4, 1), kernel, x)
    counted = flops.count(step, *(jax.ShapeDtypeStruct(s, d) for s, d, _ in (kernel, x)))
    assert program.flops == counted.hw_total // 4


@cuda
@pytest.mark.parametrize("triton", [True, False], ids=["Triton", "cuBLAS"])
def test_gpus_gather_over_nvlink_and_reduce_between_hosts(triton):
    """Weights are shared by the eight of a host; the compiler sums a gradient whole, over both hosts, in one."""
    n, options = 8, {"xla_gpu_enable_triton_gemm": triton}
    program = trained("h100:2x8", (2, n, 1), 2 * n * 1024, tuple(options.items()))
    assert program.unknown_trips == program.unknown_kernels == ()
    assert program.flops == 3 * LAYERS * 2 * 1024 * WIDTH * WIDTH
    wire = LAYERS * WIDTH * WIDTH * 2 * (n - 1) // n
    assert of(program, "all-gather", ("fsdp",)) == (LAYERS, wire)
    assert of(program, "all-reduce", ("data", "fsdp")) == (LAYERS, LAYERS * 2 * WIDTH * WIDTH * 2 * 15 // 16)
    assert {c.network for c in program.collectives if c.axes == ("fsdp",)} == {"ici"}
    assert {c.network for c in program.collectives if "data" in c.axes} == {"dcn"}
    assert program.schedule.ici_s == pytest.approx(wire / 450e9, rel=1e-3)


@cuda
def test_control_of_gpus_reads_zero_hidden():
    generation = GENERATIONS["h100"]
    hides = trained("h100:2x8", (1, 16, 1), ROWS, tuple(generation.overlap.items())).schedule
    assert hides.async_share > 0.99 and hides.hidden_share > 0.1
    idle = trained("h100:2x8", (1, 16, 1), ROWS, tuple(generation.compiler.control.items())).schedule
    assert (idle.async_share, idle.hidden_share) == (0, 0)


def test_a_program_of_the_cpu():
    """Products along a sharded dimension are summed over its axis, in a loop whose trips the compiler states."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)

    def fn(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.einsum("bd,df->bf", x, w, out_sharding=x.aval.sharding), x)

    with jax.set_mesh(mesh):
        x, w = (jax.device_put(jnp.ones(shape), spec) for shape, spec in (((6, 8), P("data")), ((8, 8), P("tensor"))))
        text = jax.jit(fn).lower(x, w).compile().as_text()
    program = hlo.analyze(text, mesh, GENERATIONS["v5e"])
    assert program.unknown_trips == ()
    assert program.flops == 5 * 2 * 6 * 8 * 8 // 8
    assert of(program, "all-reduce", ("tensor",), smallest=1) == (5, 5 * 2 * 3 * (3 * 8 * 4) // 4)


@libtpu
@pytest.mark.parametrize("name, shape, kind, groups, links", [
    ("v5p:4x4x4", (1, 16, 4), "all-gather", "mesh['a'=16,'b'=4] {'b'}", 2),  # a closed ring, both ways round
    ("v5p:4x4x4", (1, 16, 4), "all-gather", "mesh['a'=16,'b'=4] {'a'}", 4),  # two rings at once
    ("v5p:4x4x4", (1, 16, 4), "all-reduce", "mesh['a'=64] {'a'}", 6),
    ("v5p:4x4x4", (1, 16, 4), "all-gather", "mesh['a'=16,'b'=4] {'b':(2)2}", 1),  # half a ring is a line
    ("v5e:4x4", (1, 4, 4), "all-gather", "mesh['a'=4,'b'=4] {'b'}", 1),  # no wrap-around
    ("v5e:4x4", (1, 4, 4), "all-gather", "mesh['a'=16] {'a'}", 2),
    ("tpu7x:4x4x4", (1, 64, 2), "all-gather", "mesh['a'=128] {'a'}", 6),  # both devices of a chip share what arrives
    ("tpu7x:4x4x4", (1, 64, 2), "all-gather", "mesh['a'=64,'b'=2] {'a'}", 3),  # each needs its own
    ("v5p:8x8x8", (64, 1, 8), "all-to-all", "mesh['a'=64,'b'=8] {'b'}", 7 / 8),  # 8 / 8 of it passes a link
])
def test_links_of_a_group(name, shape, kind, groups, links):
    mesh, generation = absent_mesh(name, shape)
    op = hlo.parse_op("x", f"bf16[8]{{0}} {kind}(%y), channel_id=1, replica_groups={groups}, dimensions={{0}}")
    route = hlo.Network(mesh, generation).route(kind, op)
    assert 1 / route.seconds == pytest.approx(links * generation.ici_bytes_s)


@libtpu
@pytest.mark.parametrize("kind, groups, network, seconds", [
    ("all-gather", "[4,4]<=[16]", "ici", 1 / 450e9),  # within a host
    ("all-to-all", "[4,4]<=[16]", "ici", 1 / 450e9),
    ("all-gather", "[1,16]<=[16]", "dcn", 1 / 400e9),  # those of a host pass on the same data, each a part of it
    ("all-reduce", "[4,4]<=[4,4]T(1,0)", "dcn", 4 / 400e9),  # each has data of its own
    ("all-to-all", "[1,16]<=[16]", "dcn", 12 / 15 * 4 / 400e9),  # 12 of 15 parts leave the host
])
def test_a_switch_joins_the_devices_of_a_host(kind, groups, network, seconds):
    """With TPUs of four hosts, which know their host as GPUs do."""
    devices = sorted(topology("v5e:4x4").devices, key=lambda d: d.process_index)
    mesh = Mesh(np.asarray(devices), "x")
    op = hlo.parse_op("x", f"bf16[8]{{0}} {kind}(%y), channel_id=1, replica_groups={groups}, dimensions={{0}}")
    route = hlo.Network(mesh, GENERATIONS["h100"]._replace(chips_per_host=4)).route(kind, op)
    assert (route.network, route.seconds) == (network, pytest.approx(seconds))


# The syntax

def spelled(text):
    op = hlo.parse_op("x", f"f32[8]{{0}} all-gather(%y), channel_id=1, {text}, dimensions={{0}}")
    return hlo.groups(op, 8).tolist()


@pytest.mark.parametrize("text", [
    "replica_groups={{0,2,4,6},{1,3,5,7}}",
    "replica_groups=[2,4]<=[4,2]T(1,0)",
    "replica_groups=mesh['a'=4,'b'=2] {'a'}",
    "replica_groups=mesh['x'=1,'a'=2,'b'=2,'c'=2] {'a','b'}",
    "replica_groups=mesh['a'=8] {'a':(1)4}",
    "replica_groups=mesh['b'=2,'a'=4], device_ids=([4,2]T(1,0)) {'a'}",
    "replica_groups=mesh['b'=2,'a'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}",
])
def test_spellings_of_the_same_groups(text):
    assert spelled(text) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_iota_pairs_and_all():
    assert spelled("replica_groups=[4,2]<=[8]") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert spelled("source_target_pairs={{0,1},{1,0}}") == [[0, 1], [1, 0]]
    assert spelled("replica_groups={}") == [list(range(8))]


def test_shapes_with_layouts_memory_spaces_and_kernel_metadata():
    module = hlo.parse("""HloModule m
%helper.1 (p: f32[]) -> f32[] {
  ROOT %p = f32[] parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[2,8]) -> (pred[], f32[4]) {
  %a = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="x"}
  %k = (s4[16]{0:T(8)}, /*index=1*/f32[4]{0:T(256)}) custom-call(%a), custom_call_target="tpu_custom_call", metadata={
}}}
  ROOT %out = (pred[], f32[4]{0}) tuple(%a, %k)
}
""")
    assert module.entry.name == "main" and list(module.computations) == ["helper.1", "main"]
    a, k, out = module.entry.ops.values()
    assert (a.shapes[0].dims, a.shapes[0].bytes, a.shapes[0].space) == ((2, 8), 32, 1)
    assert [s.bytes for s in k.shapes] == [8, 16] and k.operands == ("a",)
    assert [s.bytes for s in out.shapes] == [1, 16] and out is module.entry.root


def cpu_program(text, **rates):
    """The analysis of HLO for 8 devices in a row, at made-up rates: 1 where not given."""
    generation = GENERATIONS["v5e"]._replace(**dict(peak_flops=1.0, hbm_bytes_s=1e30, ici_bytes_s=1.0) | rates)
    return hlo.analyze(text, Mesh(np.asarray(jax.devices()), "x"), generation)


LOOP = """HloModule m
%condition (p: (s32[], s32[], f32[4,4])) -> pred[] {{
  %p = (s32[], s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] get-tuple-element(%p), index=1
  ROOT %go = pred[] compare({sides}), direction={direction}
}}

%body (q: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {{
  %q = (s32[], s32[], f32[4,4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %same = s32[] get-tuple-element(%q), index=1
  %x = f32[4,4]{{1,0}} get-tuple-element(%q), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%j, %step)
{inside}
  ROOT %r = (s32[], s32[], f32[4,4]) tuple(%next, %same, %y)
}}

ENTRY %main (n: s32[], w: f32[4,4]) -> f32[4,4] {{
  %n = s32[] parameter(0)
  %w = f32[4,4]{{1,0}} parameter(1)
  %start = s32[] constant({start})
  %limit = s32[] {limit}
  %init = (s32[], s32[], f32[4,4]) tuple(%start, %limit, %w)
{before}
  %loop = (s32[], s32[], f32[4,4]) while(%init), condition=%condition, body=%body
{after}
  ROOT %z = f32[4,4]{{1,0}} get-tuple-element(%loop), index=2
}}
"""
DOT = "  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"  # 128 FLOPs


def loop(start=0, step=1, limit="constant(3)", direction="LT", sides="%i, %bound", inside=DOT, before="", after=""):
    return LOOP.format(start=start, step=step, limit=limit, direction=direction, sides=sides, inside=inside,
                       before=before, after=after)


@pytest.mark.parametrize("start, step, bound, direction", [
    (0, 1, 7, "LT"), (3, 1, 7, "LT"), (1, 2, 8, "LT"), (0, 2, 7, "LE"), (6, -1, 0, "GT"), (6, -2, 1, "GE"),
    (2, 3, 11, "NE"), (9, 1, 7, "LT")])
def test_trips_are_those_of_the_loop(start, step, bound, direction):
    goes = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "NE": int.__ne__}[direction]
    trips = len(list(itertools.takewhile(lambda i: goes(i, bound), itertools.count(start, step))))
    program = cpu_program(loop(start, step, f"constant({bound})", direction))
    assert (program.flops, program.unknown_trips) == (128 * trips, ())
    turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}[direction]
    assert cpu_program(loop(start, step, f"constant({bound})", turned, "%bound, %i")).flops == 128 * trips


@pytest.mark.parametrize("change", [dict(limit="copy(%n)"), dict(step=-1), dict(step=0)])
def test_unknown_trips_are_named_and_counted_once(change):
    program = cpu_program(loop(**change))
    assert (program.flops, program.unknown_trips) == (128, ("loop",))


def test_in_a_loop_every_trip_waits_for_its_transfer():
    """A gather of 64 bytes puts 7 x 64 = 448 on the wire: 448 s, of which the product covers 128."""
    inside = f"""  %g = (f32[4,4], f32[32,4]) all-gather-start(%x), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}
{DOT}
  %d = f32[32,4]{{1,0}} all-gather-done(%g)"""
    program = cpu_program(loop(limit="constant(5)", inside=inside))
    assert program.collectives == (hlo.Collective("all-gather", ("x",), 8, 5, 5 * 448, 448, True, "ici"),)
    assert program.schedule == pytest.approx((5 * 448, 5 * 128, 5 * 448, 0, 5 * 320, 1, 128 / 448))


@pytest.mark.parametrize("product, flops", [
    ('%y = (f32[4,4]{1,0}, s8[4096]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", backend_config='
     '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}', 128),
    ('%y = (f32[4,4]{1,0}, s8[4096]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config='
     '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0","1"]}}}', 512),
    ('%y = (f32[4,4]{1,0}, u8[0]{0}) custom-call(%x, %x), custom_call_target="__cudnn$fmhaSoftmax"', None)])
def test_products_of_nvidias_libraries(product, flops):
    """On a 4 x 4 matrix; each reads it twice and writes it, 3 x 64 bytes, its work space apart."""
    program = cpu_program(loop(inside="  " + product))
    if flops is None:
        assert (program.flops, program.unknown_kernels) == (0, ("y",))
    else:
        assert (program.flops, program.unknown_kernels) == (3 * flops, ())
        assert program.hbm_bytes == pytest.approx(3 * 3 * 64, abs=3 * 12 + 1)  # and the loop's counter


def test_a_fusion_beside_others_is_waited_for_where_it_is_done():
    """It writes a row of 8 bytes into a stack of 64 rows: read and written are 16 bytes, and no more of the stack."""
    fused = """%fused (s: f32[64,2], r: f32[1,2]) -> f32[64,2] {
  %s = f32[64,2] parameter(0)
  %r = f32[1,2] parameter(1)
  %at = s32[] constant(0)
  ROOT %new = f32[64,2] dynamic-update-slice(%s, %r, %at, %at)
}

"""
    inside = """  %stack = f32[64,2]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %f = ((f32[64,2], f32[1,2]), f32[64,2], u32[]) fusion-start(%stack, %row), kind=kLoop, calls=%fused
""" + DOT.replace("f32[4,4]{1,0} dot(%x, %x)", "f32[4,4]{1,0:S(1)} dot(%near, %near)") + """
  %e = f32[64,2] fusion-done(%f)"""
    near = """  %near = f32[4,4]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %row = f32[1,2] custom-call(), custom_call_target="AllocateBuffer"
"""
    program = cpu_program(loop(inside=near + inside).replace("%condition (p", fused + "%condition (p", 1))
    assert program.flops == 3 * 128
    assert program.hbm_bytes == pytest.approx(3 * (8 + 8 + 8), abs=3 * 12 + 1)


def test_what_is_under_way_when_a_loop_begins_delays_its_first_trip():
    gather = "{}all-gather-start({}), channel_id=1, replica_groups=[1,8]<=[8]"
    inside = gather.format("  %g = (f32[4,4], f32[32,4]) ", "%x") + f"\n{DOT}\n  %d = f32[32,4] all-gather-done(%g)"
    before = gather.format("  %g0 = (f32[4,4], f32[32,4]) ", "%w")
    program = cpu_program(loop(inside=inside, before=before, after="  %d0 = f32[32,4] all-gather-done(%g0)"))
    assert program.schedule.step_s == pytest.approx(4 * 448)
    assert program.schedule.exposed_s == pytest.approx(4 * 448 - 3 * 128)


@pytest.mark.parametrize("spelling", ["collective", "GPU", "reduce-scatter"])
def test_what_waits_for_itself_hides_nothing(spelling):
    gather, fused = "channel_id=1, replica_groups=[1,8]<=[8]", ""
    inside = {
        "collective": f"  %g = f32[32,4] all-gather(%x), {gather}",
        "GPU": f'  %g = (f32[4,4], f32[32,4]) all-gather-start(%x), {gather}, backend_config={{"is_sync":true}}\n'
               "  %d = f32[32,4] all-gather-done(%g)",
        "reduce-scatter": "  %g = f32[1,4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
    }[spelling]
    if spelling == "reduce-scatter":  # how older TPU compilers spell it
        fused = f"""%all-reduce-scatter.1 (a: f32[4,4]) -> f32[1,4] {{
  %a = f32[4,4] parameter(0)
  %sum = f32[4,4] all-reduce(%a), {gather}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[1,4] dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={{1,4}}
}}

"""
    text = loop(inside=f"{inside}\n{DOT}").replace("%condition (p", fused + "%condition (p", 1)
    program = cpu_program(text)
    wire = 64 * 7 // 8 if spelling == "reduce-scatter" else 64 * 7
    kind = "reduce-scatter" if spelling == "reduce-scatter" else "all-gather"
    assert [(c.kind, c.wire_bytes, c.is_async) for c in program.collectives] == [(kind, 3 * wire, False)]
    assert program.schedule == pytest.approx((3 * (wire + 128), 3 * 128, 3 * wire, 0, 3 * wire, 0, 0))


def test_steps_of_a_gather_in_fusions_are_one_gather():
    """As on v5e: begun in one fusion, carried on beside the product in the next, ended in a third; one channel."""
    gather = "f32[32,4] all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8]"
    fused = f"""%first (a: f32[4,4]) -> f32[32,4] {{
  %a = f32[4,4]{{1,0:S(1)}} parameter(0)
  %g1 = {gather}
  ROOT %s = f32[32,4]{{1,0:S(1)}} custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}}

%second (a: f32[4,4], b: f32[4,4]) -> (f32[4,4], f32[32,4]) {{
  %a = f32[4,4]{{1,0:S(1)}} parameter(0)
  %b = f32[4,4]{{1,0:S(1)}} parameter(1)
  %g2 = {gather}
  %dot = f32[4,4]{{1,0:S(1)}} dot(%b, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (f32[4,4]{{1,0:S(1)}}, f32[32,4]{{1,0:S(1)}}) tuple(%dot, %g2)
}}

%third (a: f32[4,4]) -> f32[32,4] {{
  %a = f32[4,4]{{1,0:S(1)}} parameter(0)
  %g3 = {gather}
  ROOT %d = f32[32,4]{{1,0:S(1)}} custom-call(%g3), custom_call_target="AsyncCollectiveDone"
}}

"""
    inside = """  %one = f32[32,4] fusion(%x), kind=kCustom, calls=%first
  %two = (f32[4,4], f32[32,4]) fusion(%x, %x), kind=kOutput, calls=%second
  %y = f32[4,4]{1,0} get-tuple-element(%two), index=0
  %three = f32[32,4] fusion(%x), kind=kCustom, calls=%third"""
    program = cpu_program(loop(inside=inside).replace("%condition (p", fused + "%condition (p", 1))
    assert program.flops == 3 * 128
    assert program.collectives == (hlo.Collective("all-gather", ("x",), 8, 3, 3 * 448, 448, True, "ici"),)
    assert program.schedule.hidden_share == pytest.approx(128 / 448)


def test_waiting_for_a_copy_is_no_communication():
    """64 bytes from HBM to the chip at 0.25 bytes/s, beside a product of 128 s."""
    inside = f"""  %c = (f32[4,4]{{1,0:S(1)}}, f32[4,4]{{1,0}}, u32[]{{:S(2)}}) copy-start(%x)
{DOT.replace("%x, %x", "%near, %near").replace("f32[4,4]{1,0}", "f32[4,4]{1,0:S(1)}")}
  %e = f32[4,4]{{1,0:S(1)}} copy-done(%c)"""
    near = '  %near = f32[4,4]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"\n'
    program = cpu_program(loop(inside=near + inside), hbm_bytes_s=0.25)
    assert (program.schedule.step_s, program.schedule.exposed_s) == (pytest.approx(3 * 256, rel=0.2), 0)
    assert program.hbm_bytes == pytest.approx(3 * 64, abs=3 * 12 + 1)  # and the loop's counter


def test_a_stack_is_read_and_written_by_the_slice():
    """Of float32[100,16] a fusion reads row i, doubles it and writes it back: 64 bytes each way."""
    program = cpu_program("""HloModule m
%fused (s: f32[100,16], i: s32[]) -> f32[100,16] {
  %s = f32[100,16] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,16] dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,16}
  %twice = f32[1,16] add(%row, %row)
  ROOT %new = f32[100,16] dynamic-update-slice(%s, %twice, %i, %zero)
}

ENTRY %main (stack: f32[100,16], at: s32[], v: f32[16]) -> f32[100,16] {
  %stack = f32[100,16]{1,0} parameter(0)
  %at = s32[]{:S(6)} parameter(1)
  %v = f32[16]{0} parameter(2)
  %near = f32[16]{0:S(1)} copy(%v)
  %nearer = f32[16]{0:S(1)} negate(%near)
  ROOT %f = f32[100,16]{1,0} fusion(%stack, %at), kind=kLoop, calls=%fused
}
""", hbm_bytes_s=64.0)
    assert program.hbm_bytes == pytest.approx(64 + 64 + 64, abs=8)  # the copy reads 64; on the chip nothing counts
    assert program.schedule.step_s == pytest.approx(program.hbm_bytes / 64)
