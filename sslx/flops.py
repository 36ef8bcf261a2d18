"""FLOPs by walking the jaxpr of the very function that is trained, and the peaks of devices.

Counted are matrix products and convolutions, one multiply-add as two FLOPs, on global shapes. Zeros that a
convolution pads with or dilates by are no work, as what a mask hides is none, so that a convolution and its two
gradients cost the same however a compiler writes them; published counts include the padding (ResNet-50: 3 % more).
Left out are elementwise work, softmax, norms, FFTs, matrix decompositions and the optimizer. There is no formula per
architecture.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from sslx.config import UserError

CONVENTION = ("2 FLOPs per multiply-add of dot_general and conv (padding is none), all networks and both passes; "
              "model: masked attention by the pairs needed, no recomputation; hw: what runs; full attention: as model, "
              "masked or not; 6nd: 6 x parameters without embeddings x tokens seen (Kaplan et al. 2020)")

UNSCOPED = "loss"  # what an objective computes in no scope is its loss

# What `jax.checkpoint` computes a second time, as named by JAX in the name stack.
RECOMPUTED = "rematted_computation"

# kernel name -> (model FLOPs, hardware FLOPs) of one equation
Formula = Callable[[JaxprEqn], tuple[int, int]]


class Flops(NamedTuple):
    """FLOPs by component.

    model: what the mathematics needs: masked attention by the pairs that are not masked, no recomputation.
    hw:    what runs: recomputation and masked products included.
    full:  as `model`, but attention by all T x S pairs, masked or not, as many papers count it.
    """

    model: dict[str, int]
    hw: dict[str, int]
    full: dict[str, int]

    @property
    def model_total(self) -> int:
        return sum(self.model.values())

    @property
    def hw_total(self) -> int:
        return sum(self.hw.values())

    @property
    def full_total(self) -> int:
        return sum(self.full.values())


class Cost(NamedTuple):
    """One product: where it stands, outermost scope first, and what it costs."""

    scopes: tuple[str, ...]
    model: int
    hw: int
    full: int


def count(fn: Callable, *args: Any, formulas: Mapping[str, Formula] | None = None) -> Flops:
    """FLOPs of one call of `fn(*args)`, e.g. of `jax.value_and_grad(loss)`; nothing is run.

    `args` are arrays or `jax.ShapeDtypeStruct`s. `formulas` adds to FORMULAS what the walker cannot
    see into, by the name of the Pallas kernel or of the primitive. What no output needs is not counted.

    Raises UserError at a kernel without a formula, and at products in a while loop, whose number of
    trips is not known.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    flops = Flops({}, {}, {})
    for cost in walk(live, (), FORMULAS | dict(formulas or {})):
        name = component(cost.scopes)
        for total, part in zip(flops, (cost.model, cost.hw, cost.full), strict=True):
            total[name] = total.get(name, 0) + part
    return flops


def kernels(traced: Jaxpr) -> dict[str, int]:
    """Hardware FLOPs of one call on one device of each kernel in a program that FORMULAS count, by its name."""
    found: dict[str, int] = {}

    def visit(jaxpr: Jaxpr, scopes: tuple[str, ...]) -> None:
        for eqn in jaxpr.eqns:
            inside, name = scopes + scope_names(eqn), kernel_name(eqn)
            if name in FORMULAS:
                # Compiled, cuDNN's attention goes by the name inside JAX's wrapper.
                found[name.removesuffix("_wrapper")] = needed(inside, FORMULAS[name](eqn)[1])
            for inner in jaxprs_in_params(eqn.params):
                visit(inner, inside)

    visit(traced, ())
    return found


def component(scopes: tuple[str, ...]) -> str:
    """The component that a product belongs to: the outermost scope with a name of its own.

    Linen names an unnamed module after its class, so a capital means "no name of its own" and the next
    scope decides (`Top/encoder/mlp` is `encoder`; `Net/Dense_0` is `Net`, there being nothing else).
    In no scope at all: "loss".
    """
    named = [s for s in scopes if not s[0].isupper()]
    return (named or list(scopes) or [UNSCOPED])[0].split(".")[0]


def scaled(numerator: int, denominator: int, unmasked: int | None = None) -> Any:
    """A `jax.named_scope` in which the model count of every product is numerator / denominator of it.

    For a mask: of the T x T pairs of causal attention (T + 1) / (2 T) are needed, in the backward pass
    too, so `with scaled(T + 1, 2 * T):` goes around Q K^T and P V, or around a fused kernel that skips
    what the mask hides and whose formula does not know the mask. The full count is unmasked / denominator of
    the product: more than all of it where plain products leave out some of what the mask hides.
    """
    if not 0 < numerator <= denominator:
        raise ValueError(f"scaled({numerator}, {denominator}): takes 0 < numerator <= denominator")
    return jax.named_scope(f"flops:{numerator}:{denominator}:{unmasked or denominator}")


def padded(numerator: int, denominator: int) -> Any:
    """As `scaled`, for operands that hold padding and not for a mask: the full count leaves it out too."""
    return scaled(numerator, denominator, numerator)


def summing() -> Any:
    """A `jax.named_scope` of products that only add up, such as with ones: they count as the sums they are."""
    return jax.named_scope(SUM)


SUM = "flops:sum"
SCALED = re.compile(r"flops:(\d+):(\d+):(\d+)")


# The walk

def walk(jaxpr: Jaxpr, scopes: tuple[str, ...], formulas: Mapping[str, Formula]) -> Iterator[Cost]:
    """The products of a jaxpr that stands in `scopes`: an inner jaxpr's scopes go on from its equation's."""
    for eqn in jaxpr.eqns:
        yield from equation(eqn, scopes + scope_names(eqn), formulas)


def equation(eqn: JaxprEqn, scopes: tuple[str, ...], formulas: Mapping[str, Formula]) -> list[Cost]:
    """The products of one equation."""
    primitive, kernel = eqn.primitive.name, kernel_name(eqn)
    if kernel in formulas:
        return [kernel_cost(scopes, *formulas[kernel](eqn), UNMASKED.get(kernel, formulas[kernel])(eqn)[0])]
    if primitive == "dot_general":
        return [] if SUM in scopes else [product_cost(scopes, dot_flops(eqn))]
    if primitive == "conv_general_dilated":
        return [product_cost(scopes, conv_flops(eqn))]
    if primitive in OPAQUE:
        raise UserError(f"the FLOPs of {kernel!r} in {place(scopes)} cannot be counted: give flops.count"
                        f" formulas={{{kernel!r}: f}} with f(eqn) -> (model FLOPs, hardware FLOPs)")
    if primitive == "custom_linear_solve":
        return list(walk(eqn.params["jaxprs"].solve.jaxpr, scopes, formulas))
    inner = [list(walk(j, scopes, formulas)) for j in jaxprs_in_params(eqn.params)]
    if primitive == "cond":
        return max(inner, key=lambda branch: sum(c.hw for c in branch))
    costs = [c for part in inner for c in part]
    if primitive == "while" and costs:
        raise UserError(f"the FLOPs of a while loop in {place(scopes)} cannot be counted, as its number of trips"
                        " is not known: use jax.lax.scan, or fori_loop with constant bounds")
    times = trips(eqn)
    return [Cost(c.scopes, c.model * times, c.hw * times, c.full * times) for c in costs]


# These multiply matrices, and their equations do not show how.
OPAQUE = frozenset({
    "pallas_call", "ffi_call", "triton_kernel_call", "ragged_dot_general", "ragged_dot", "scaled_dot",
    "scaled_matmul", "scaled_matmul_wrapper", "cudnn_fusion",
    "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper",
    "dot_product_attention_fp8_fwd_wrapper", "dot_product_attention_fp8_bwd_wrapper",
})


def kernel_name(eqn: JaxprEqn) -> str:
    name = eqn.params.get("name") if eqn.primitive.name == "pallas_call" else None
    return name or eqn.primitive.name


def trips(eqn: JaxprEqn) -> int:
    """How many times the inner jaxprs of an equation run, over all devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":  # shapes inside are those of one device
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return 1


def scope_names(eqn: JaxprEqn) -> tuple[str, ...]:
    """The scopes of an equation without the transformations around them: `transpose(jvp(a))/b` is a, b.

    What einsum (`ab,bc->ac`) and Pallas (the kernel's name) leave in the stack is no scope.
    """
    kernel = kernel_name(eqn)
    parts = (re.sub(r"^(\w+\()+|\)+$", "", part) for part in str(eqn.source_info.name_stack).split("/"))
    return tuple(part for part in parts if part and "->" not in part and part != kernel)


def place(scopes: tuple[str, ...]) -> str:
    return "/".join(scopes) or "the outermost scope"


def product_cost(scopes: tuple[str, ...], flops: int) -> Cost:
    """A product that the walker sees: recomputed it is no model FLOPs, in a `scaled` scope a part of them."""
    return cost(scopes, flops, flops, flops)


def kernel_cost(scopes: tuple[str, ...], model: int, hw: int, full: int) -> Cost:
    """Products counted by a formula: a kernel that a `scaled` scope stands around runs no more than is needed."""
    return cost(scopes, model, needed(scopes, hw), full)


def cost(scopes: tuple[str, ...], model: int, hw: int, full: int) -> Cost:
    """What is left of `model` and `full` where the scopes say that not all is needed, or that it runs again."""
    if RECOMPUTED in scopes:
        return Cost(names(scopes), 0, hw, 0)
    return Cost(names(scopes), needed(scopes, model), hw, needed(scopes, full, masked=False))


def needed(scopes: tuple[str, ...], flops: int, masked: bool = True) -> int:
    """The part of a product that the scopes around it say is needed, by a mask or if there were none."""
    for part in filter(None, map(SCALED.fullmatch, scopes)):
        numerator, denominator, unmasked = map(int, part.groups())
        flops = flops * (numerator if masked else unmasked) // denominator
    return flops


def names(scopes: tuple[str, ...]) -> tuple[str, ...]:
    """The scopes that people gave, without those that only mark."""
    return tuple(s for s in scopes if s != RECOMPUTED and not SCALED.fullmatch(s))


# Products

def shape(variable: Any) -> tuple[int, ...]:
    """The shape of an operand or result of an equation."""
    return variable.aval.shape


def dot_flops(eqn: JaxprEqn) -> int:
    """2 x batch x M x N x K of a dot_general."""
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs, out = shape(eqn.invars[0]), shape(eqn.outvars[0])
    return 2 * math.prod(out) * math.prod(lhs[d] for d in contracting)


def conv_flops(eqn: JaxprEqn) -> int:
    """2 x batch x C_out x C_in / groups x taps along each spatial dimension."""
    lhs, rhs, out = map(shape, (*eqn.invars[:2], eqn.outvars[0]))
    d, p = eqn.params["dimension_numbers"], eqn.params
    flops = 2 * out[d.out_spec[0]] * out[d.out_spec[1]] * rhs[d.rhs_spec[1]]
    for n, (i, k, o) in enumerate(zip(d.lhs_spec[2:], d.rhs_spec[2:], d.out_spec[2:], strict=True)):
        flops *= taps(lhs[i], rhs[k], out[o], p["window_strides"][n], p["padding"][n][0], p["lhs_dilation"][n],
                      p["rhs_dilation"][n])
    return flops


@functools.cache
def taps(n_in: int, n_kernel: int, n_out: int, stride: int, pad: int, in_dilation: int = 1,
         kernel_dilation: int = 1) -> int:
    """Pairs of an output and a kernel position, along one dimension, that meet an element of the input."""
    meeting = 0
    for at in (np.arange(n_out) * stride + k * kernel_dilation - pad for k in range(n_kernel)):
        meeting += int(np.sum((at >= 0) & (at <= (n_in - 1) * in_dilation) & (at % in_dilation == 0)))
    return meeting


def cudnn_attention(products: int, recomputed: int, masked: bool = True) -> Formula:
    """The formula of a cuDNN attention kernel: so many T x S x K products are needed, and run again.

    The kernel skips what a causal mask or a sliding window hides, so both counts leave it out, if `masked`.
    """
    def formula(eqn: JaxprEqn) -> tuple[int, int]:
        query, key = map(shape, eqn.invars[:2])
        time_axis, head_axis = (1, 2) if eqn.params["layout"] == 0 else (2, 1)
        T, S, H, K = query[time_axis], key[time_axis], query[head_axis], query[3]
        causal = masked and "CAUSAL" in eqn.params["mask_type"].name
        window = (masked and eqn.params["sliding_window_length"]) or T + S
        pairs = sum(min(t + 1, S, window) for t in range(T)) if causal else T * S
        flops = 2 * query[0] * H * K * pairs
        return products * flops, (products + recomputed) * flops

    return formula


def splash_attention(products: int, recomputed: int) -> Formula:
    """The formula of a splash attention kernel over all T x S pairs; a `scaled` scope around it says how many count."""

    def formula(eqn: JaxprEqn) -> tuple[int, int]:
        query, key = [s for s in map(shape, eqn.invars) if len(s) >= 3 and s[-1] == shape(eqn.outvars[-1])[-1]][:2]
        flops = 2 * math.prod(query) * key[-2]
        return products * flops, (products + recomputed) * flops

    return formula


FORMULAS: dict[str, Formula] = {
    "dot_product_attention_fwd_wrapper": cudnn_attention(products=2, recomputed=0),
    "dot_product_attention_bwd_wrapper": cudnn_attention(products=4, recomputed=1),
    **{f"splash_mha_fwd{segmented}_{residuals}": splash_attention(products=2, recomputed=0)
       for segmented in ("", "_segmented") for residuals in ("residuals", "no_residuals")},
    **{f"splash_mha_dkv{segmented}_no_residuals": splash_attention(products=4, recomputed=1)
       for segmented in ("", "_segmented")},
}

# Of kernels whose formulas leave out what a mask hides: by all pairs.
UNMASKED: dict[str, Formula] = {
    "dot_product_attention_fwd_wrapper": cudnn_attention(products=2, recomputed=0, masked=False),
    "dot_product_attention_bwd_wrapper": cudnn_attention(products=4, recomputed=1, masked=False),
}


# Parameters

def n_params(params: Any) -> int:
    """The number of parameters in a pytree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def n_params_nonembedding(params: Any) -> int:
    """The number of parameters without the leaves whose path holds "embedding"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(math.prod(x.shape) for path, x in leaves if "embedding" not in jax.tree_util.keystr(path))


# Devices

# Dense bfloat16 FLOP/s by `jax.Device.device_kind`, from the makers' data sheets (half of what a sheet gives
# "with sparsity"). A TPU v2, v3 or 7x chip is two JAX devices; each has half of the chip.
PEAKS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(device: jax.Device, dtype: Any) -> float | None:
    """Peak FLOP/s of one device for dense products of `dtype`; None if not known.

    Of the data sheet for 16-bit types, and for float32 on a TPU, which by default multiplies it in
    bfloat16. A CPU has no sheet: it is measured, once, and simulated devices share what was
    measured.
    """
    if device.platform == "cpu":
        return measured_peak(jnp.dtype(dtype).name) / len(jax.local_devices(backend="cpu"))
    return sheet_flops(device, dtype)


def sheet_flops(device: jax.Device, dtype: Any) -> float | None:
    """`peak_flops` of the data sheet; None also for a CPU, which has none."""
    halves = jnp.dtype(dtype).itemsize == 2 or (device.platform == "tpu" and jnp.dtype(dtype) == jnp.float32)
    return PEAKS.get(device.device_kind) if halves else None


@functools.cache
def measured_peak(dtype: str) -> float:
    return ceiling(jax.local_devices(backend="cpu")[0], dtype)


def ceiling(device: jax.Device, dtype: Any, seconds: float = 0.2) -> float:
    """FLOP/s of a device, or of a whole CPU, in the fastest of the large products done in `seconds` (at least two)."""
    size = 1024 if device.platform == "cpu" else 8192
    best, runs = math.inf, 0
    with jax.set_mesh(Mesh(np.asarray([device]), ("one",))):  # whatever mesh the caller has set
        x = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
        matmul = jax.jit(jnp.matmul)
        matmul(x, x).block_until_ready()
        end = time.perf_counter() + seconds
        while runs < 2 or time.perf_counter() < end:
            start = time.perf_counter()
            matmul(x, x).block_until_ready()
            best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * size**3 / best
