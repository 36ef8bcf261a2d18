"""FLOPs: every kind of equation against a count by hand."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sslx import flops
from sslx.config import UserError
from sslx.layers import Conv
from sslx.sharding import make_mesh


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def total(fn, *args):
    return flops.count(fn, *args).model_total


def test_matmul_and_batched_dot():
    assert total(jnp.matmul, f32(3, 5), f32(5, 7)) == 2 * 3 * 5 * 7
    assert total(lambda a, b: jnp.einsum("bthk,bshk->bhts", a, b), f32(2, 3, 4, 5), f32(2, 6, 4, 5)) == (
        2 * (2 * 4) * 3 * 6 * 5)
    assert total(jax.vmap(jnp.matmul), f32(4, 3, 5), f32(4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_gradient_is_twice_the_forward_pass():
    w = f32(5, 7)
    loss = lambda w, x: jnp.tanh(x @ w).sum()  # noqa: E731
    forward = 2 * 3 * 5 * 7
    assert total(jax.value_and_grad(loss), w, f32(3, 5)) == 2 * forward  # x is data: it has no gradient
    assert total(jax.value_and_grad(loss, (0, 1)), w, f32(3, 5)) == 3 * forward


CONVS = [  # spatial size, kernel, stride, padding, dilation, groups
    (8, 3, 1, "SAME", 1, 1), (8, 3, 1, "VALID", 1, 1), (9, 3, 2, "SAME", 1, 1), (16, 4, 4, "VALID", 1, 1),
    (8, 1, 2, "VALID", 1, 1), (11, 3, 1, "SAME", 2, 1), (8, 3, 2, "SAME", 1, 2), (8, 3, 1, "SAME", 1, 4),
    (13, 7, 2, "SAME", 1, 1),
]


@pytest.mark.parametrize("size, kernel, stride, padding, dilation, groups", CONVS)
def test_conv_and_both_gradients_cost_the_same(size, kernel, stride, padding, dilation, groups):
    def conv(x, w):
        return jnp.sin(jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)).sum()

    x, w = f32(2, size, size, 4), f32(kernel, kernel, 4 // groups, 8)
    reach = dilation * (kernel - 1) + 1
    out = math.ceil(size / stride) if padding == "SAME" else (size - reach) // stride + 1
    before = max(0, (out - 1) * stride + reach - size) // 2
    meeting = sum(0 <= o * stride + dilation * k - before < size for o in range(out) for k in range(kernel))
    assert (meeting == out * kernel) == (padding == "VALID")
    forward = 2 * 2 * 8 * (4 // groups) * meeting**2
    assert total(conv, x, w) == forward
    assert total(jax.value_and_grad(conv, 1), x, w) == 2 * forward
    assert total(jax.value_and_grad(conv, (0, 1)), x, w) == 3 * forward


@pytest.mark.parametrize("n_in, n_kernel, stride, pad, dilate_in, dilate_kernel", [
    (8, 3, 1, (0, 0), 1, 1), (8, 3, 2, (1, 1), 1, 1), (5, 4, 1, (3, 3), 2, 1), (9, 2, 1, (1, 2), 1, 3),
    (4, 4, 3, (0, 0), 4, 1)])
def test_taps_are_what_a_convolution_of_ones_adds_up(n_in, n_kernel, stride, pad, dilate_in, dilate_kernel):
    y = jax.lax.conv_general_dilated(jnp.ones((1, 1, n_in)), jnp.ones((1, 1, n_kernel)), (stride,), [pad],
                                     (dilate_in,), (dilate_kernel,))
    taps = flops.taps(n_in, n_kernel, y.shape[-1], stride, pad[0], dilate_in, dilate_kernel)
    assert taps == int(y.sum()) and taps <= math.prod(y.shape) * n_kernel


@pytest.mark.parametrize("side, stride, taps", [
    (4, 1, 3 * 4 - 2),  # both ends miss one of three
    (4, 2, 3 * 2 - 1),  # the first of two outputs misses one; a product of patches, which multiplies the padding
    (2, 1, 4), (1, 1, 1),  # a product with whole images
])
def test_padding_is_no_work(side, stride, taps):
    conv = Conv(8, 3, stride)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        x = f32(2, side, side, 4)
        params = jax.eval_shape(conv.init, jax.random.key(0), x)
        counted = flops.count(conv.apply, params, x)
    out = -(-side // stride)
    assert counted.model_total == 2 * 2 * 8 * 4 * taps**2
    assert counted.hw_total == 2 * 2 * 8 * 4 * (3 * out if stride == 2 else taps)**2


def test_transposed_conv_does_not_count_the_zeros_that_it_inserts():
    x, w = f32(2, 8, 4), f32(4, 4, 6)
    transposed = lambda x, w: jax.lax.conv_transpose(x, w, (4,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))  # noqa
    assert total(transposed, x, w) == 2 * 2 * 8 * 4 * 4 * 6  # every input position meets every tap


def test_scan_multiplies_by_its_length():
    def loss(w, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0].sum()

    forward = 3 * 2 * 4 * 8 * 8
    assert total(loss, f32(3, 8, 8), f32(4, 8)) == forward
    assert total(jax.value_and_grad(loss), f32(3, 8, 8), f32(4, 8)) == 3 * forward


def test_constant_loop_is_counted_and_a_while_loop_is_an_error():
    assert total(lambda x: jax.lax.fori_loop(0, 5, lambda _, h: h @ x, x), f32(4, 4)) == 5 * 2 * 4**3
    loop = lambda x: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ x, x)  # noqa: E731
    with pytest.raises(UserError, match="while loop in outer/inner"):
        flops.count(lambda x: jax.named_scope("outer")(jax.jit(jax.named_scope("inner")(loop)))(x), f32(4, 4))


def test_a_while_loop_without_products_costs_nothing():
    assert total(lambda key: jax.random.poisson(key, 2.0, (4,)), jax.random.key(0)) == 0


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(jnp.sin(nn.Dense(16, name="up")(x))), None


class Net(nn.Module):
    remat: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(4, name="head")(stack(name="encoder")(x, None)[0])


def test_remat_adds_one_forward_pass_to_the_hardware_count_only():
    def counted(remat):
        net = Net(remat)
        params = jax.eval_shape(net.init, jax.random.key(0), f32(2, 8))
        return flops.count(jax.value_and_grad(lambda p, x: net.apply(p, x).sum()), params, f32(2, 8))

    plain, remat = counted(False), counted(True)
    forward, head = 3 * 2 * 2 * (8 * 16 + 16 * 8), 2 * 2 * 8 * 4
    assert plain.model == plain.hw == {"encoder": 3 * forward, "head": 3 * head}
    assert remat.model == plain.model
    # The last product of a block is an output that no gradient needs: it is not computed again.
    assert remat.hw == {"encoder": 3 * forward + forward // 2, "head": 3 * head}


def test_nested_remat_leaves_the_model_count_alone():
    f = lambda x: jnp.sin(jnp.sin(x @ x) @ x)  # noqa: E731
    nested = jax.checkpoint(lambda x: jax.checkpoint(f)(f(x)))
    plain = flops.count(jax.value_and_grad(lambda x: f(f(x)).sum()), f32(4, 4))
    remat = flops.count(jax.value_and_grad(lambda x: nested(x).sum()), f32(4, 4))
    assert remat.model == plain.model
    assert remat.hw_total > plain.hw_total == plain.model_total == 12 * 2 * 4**3


def test_cond_counts_its_largest_branch():
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert total(lambda i, x: jax.lax.switch(i, branches, x), 0, f32(4, 4)) == 2 * 2 * 4**3


def test_custom_derivatives_are_seen_into():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g @ jnp.eye(7)))
    g = jax.custom_jvp(jnp.matmul)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0] @ primals[1]))
    forward = 2 * 3 * 5 * 7
    assert total(f, f32(3, 5), f32(5, 7)) == total(g, f32(3, 5), f32(5, 7)) == forward
    gradient = jax.value_and_grad(lambda *a: f(*a).sum(), (0, 1))
    assert total(gradient, f32(3, 5), f32(5, 7)) == 3 * forward + 2 * 5 * 7 * 7
    assert total(jax.value_and_grad(lambda *a: g(*a).sum()), f32(3, 5), f32(5, 7)) == 2 * forward


def test_what_no_output_needs_is_not_counted():
    assert total(lambda x: jax.jit(lambda x: (x @ x, x @ x @ x))(x)[0], f32(4, 4)) == 2 * 4**3


def test_linear_solve_counts_what_runs():
    solve = lambda x: jax.lax.custom_linear_solve(lambda y: x @ y, x[0], lambda _, b: x @ (x @ b), symmetric=True)  # noqa
    assert total(solve, f32(4, 4)) == 2 * 2 * 4 * 4


@pytest.mark.parametrize("manual", [{"a", "b"}, {"a"}])
def test_shard_map_is_counted_on_global_shapes(manual):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names=manual,
                           check_vma=False)
    once = 2 * 8 * 6 * 4
    copies = 2 if "b" in manual else 1  # nothing is sharded over b: each of its devices does the work
    assert total(jax.jit(mapped), f32(8, 6), f32(6, 4)) == copies * once


def test_explicit_sharding_has_global_shapes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w = jax.device_put(jnp.ones((16, 4)), P("data")), jnp.ones((4, 4))
        assert total(jax.value_and_grad(lambda w, x: jnp.sin(x @ w).sum()), w, x) == 2 * 2 * 16 * 4 * 4


@pytest.mark.parametrize("remat", [False, True])
def test_causal_attention_is_counted_causally_in_the_model(remat):
    B, T, H, K = 2, 7, 3, 4

    def attention(q, k, v):
        with flops.scaled(T + 1, 2 * T):
            p = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
            return jnp.einsum("bhts,bshk->bthk", p, v)

    attend = jax.checkpoint(attention) if remat else attention
    counted = flops.count(jax.value_and_grad(lambda *a: attend(*a).sum(), (0, 1, 2)), *[f32(B, T, H, K)] * 3)
    pairs = T * (T + 1) // 2
    assert counted.model_total == 3 * 2 * (2 * B * H * pairs * K)
    assert counted.hw_total == (7 if remat else 6) * (2 * B * H * T * T * K)
    assert counted.full_total == 6 * (2 * B * H * T * T * K)


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_attention_equals_the_plain_products(causal, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # only traced: a GPU is needed to run it
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    B, T, H, K = 2, 64, 3, 16
    q = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)

    def loss(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn").astype(jnp.float32).sum()

    counted = flops.count(jax.value_and_grad(loss, (0, 1, 2)), q, q, q)
    product = 2 * B * H * K * (T * (T + 1) // 2 if causal else T * T)
    full = 2 * B * H * K * T * T
    assert counted == flops.Flops({"loss": 6 * product}, {"loss": 7 * product}, {"loss": 6 * full})


def test_a_kernel_needs_a_formula():
    def square(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    kernel = pl.pallas_call(square, out_shape=f32(8, 8), name="square")
    with pytest.raises(UserError, match="'square' in teacher"):
        flops.count(jax.named_scope("teacher")(kernel), f32(8, 8))
    formula = lambda eqn: (2 * eqn.invars[0].aval.shape[0] ** 3, 9)  # noqa: E731
    counted = flops.count(kernel, f32(8, 8), formulas={"square": formula})
    assert counted == ({"loss": 2 * 8**3}, {"loss": 9}, {"loss": 2 * 8**3})


def test_padding_is_no_work_in_any_count_of_the_model():
    def product(x):
        with flops.padded(3, 4):
            return x @ x

    assert flops.count(product, f32(8, 8)) == ({"loss": 768}, {"loss": 1024}, {"loss": 768})


def test_components_are_the_outermost_names():
    class Top(nn.Module):
        def setup(self):
            self.encoder, self.projector = nn.Dense(4), nn.Dense(2)

        def features(self, x):
            return self.encoder(x)

        def __call__(self, x):
            return self.projector(self.features(x))

    top = Top()
    params = top.init(jax.random.key(0), jnp.ones((3, 8)))

    def loss(params, x):
        with jax.named_scope("teacher"):
            target = jax.lax.stop_gradient(top.apply(params, x))
        features = top.apply(params, x, method="features")
        z = top.apply(params, x) + nn.Dense(2).apply({"params": {"kernel": features.T @ features[:, :2],
                                                                 "bias": jnp.zeros(2)}}, features)
        return ((z - target) @ z.T).sum()

    model = flops.count(jax.value_and_grad(loss), params, f32(3, 8)).model
    encoder, projector = 2 * 3 * 8 * 4, 2 * 3 * 4 * 2
    assert set(model) == {"teacher", "encoder", "projector", "Dense", "loss"}
    assert model["teacher"] == encoder + projector
    assert model["encoder"] == 2 * 2 * encoder  # both calls; the input has no gradient
    assert model["projector"] == 3 * projector


@pytest.mark.parametrize("numerator, denominator", [(0, 2), (3, 2)])
def test_scaled_takes_a_part(numerator, denominator):
    with pytest.raises(ValueError, match="numerator"):
        flops.scaled(numerator, denominator)


def test_parameters():
    params = {"embedding": {"table": f32(10, 4)}, "head": [f32(4, 3), f32(3)]}
    assert flops.n_params(params) == 55
    assert flops.n_params_nonembedding(params) == 15


def test_peaks():
    class Device:
        def __init__(self, platform, device_kind):
            self.platform, self.device_kind = platform, device_kind

    assert flops.peak_flops(Device("gpu", "NVIDIA H100 80GB HBM3"), jnp.bfloat16) == 989.4e12
    assert flops.peak_flops(Device("gpu", "NVIDIA H100 80GB HBM3"), jnp.float32) is None
    assert flops.peak_flops(Device("tpu", "TPU v5 lite"), jnp.float32) == 197e12
    assert flops.peak_flops(Device("gpu", "an unknown card"), jnp.bfloat16) is None


def test_simulated_devices_share_the_measured_peak_of_the_cpu():
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):  # as in the training loop
        peak = flops.peak_flops(jax.devices()[0], np.float32)
    assert peak == flops.measured_peak("float32") / len(jax.devices())
    assert 1e8 < flops.measured_peak("float32") < 1e15
