"""FLOPs of a step of each objective: what the walker counts is what the architecture says, written out by hand.

The formulas give multiply-adds per matrix product, forward; a product with a gradient to both sides costs three times
that, one whose input is data twice, a teacher's once. B rows, T S tokens, D model, F hidden, V vocabulary, N patches.
"""

import math
from typing import NamedTuple

import jax
import pytest
from experiments import BATCH as B
from experiments import CONFIGS, abstract_state, experiment, first_batch

from sslx import train


class Need(NamedTuple):
    """FLOPs: of the mathematics; of masked pairs that run all the same; of what remat runs again."""

    model: float
    masked: float = 0
    again_dots: float = 0
    again_full: float = 0

    def __add__(self, other):
        return Need(*map(sum, zip(self, other, strict=True)))

    def __mul__(self, times):
        return Need(*(times * n for n in self))

    __rmul__ = __mul__


def trained(multiply_adds):
    """A product of which both sides have a gradient."""
    return Need(3 * 2 * multiply_adds)


def data_in(multiply_adds):
    """A product with data, which needs no gradient."""
    return Need(2 * 2 * multiply_adds)


def forward_only(multiply_adds):
    return Need(2 * multiply_adds)


def block(rows, T, D, F, causal=False, S=None, passes=3):
    """A transformer block on rows of T tokens, with attention onto S tokens of a memory if given.

    Under remat "dots" the two products of each attention run again; under "full" all but the last one of the MLP,
    whose result only enters the residual sum. Masked pairs run again too.
    """
    part = (T + 1) / (2 * T) if causal else 1
    weights = T * D * 3 * D + T * D * D  # q k v, out
    pairs, needed = 2 * T * T * D, part * 2 * T * T * D
    if S is not None:
        weights += T * D * D + S * D * 2 * D + T * D * D  # q, k v, out
        pairs, needed = pairs + 2 * T * S * D, needed + 2 * T * S * D
    up = down = T * D * F
    remat = passes == 3
    return 2 * rows * Need(passes * (weights + needed + up + down), passes * (pairs - needed),
                           remat * pairs, remat * (weights + pairs + up))


def crops(rows, source, size):
    """Rows of one channel of source x source pixels cut to size x size: rows, then columns."""
    return forward_only(rows * (size * source * source + size * size * source))


def mixture(model, T):
    """Experts of a block: what the router chose is needed, all their places run; remat runs all of it again, but for
    the shared expert's second product."""
    D, F, n = model.width, model.hidden, model.experts.n
    chosen = model.experts.top_k * T
    places = n * min(T, math.ceil(model.experts.capacity * chosen / n))
    expert, again = 2 * B * 3 * D * F, 2 * B * places * 3 * D * F
    routed = Need(3 * chosen * expert, 3 * (places - chosen) * expert, again, again)
    router = trained(B * T * D * n)._replace(again_full=2 * B * T * D * n)
    shared = trained(B * T * 3 * D * F)._replace(again_full=2 * B * T * 2 * D * F)
    return routed + router + model.experts.shared * shared


def causal_lm(model, objective, T):
    """A head that computes its logits in chunks computes them again."""
    D, V = model.width, model.vocab_size
    head = trained(B * T * D * V)._replace(masked=2 * B * T * D * V * (model.get("loss_chunks", 1) > 1))
    if model.get("experts"):
        return model.depth * (block(B, T, D, 0, causal=True) + mixture(model, T)) + head
    return model.depth * block(B, T, D, 4 * D, causal=True) + head


def masked_lm(model, objective, T):
    """The head scores the masked positions only."""
    D, V, masked = model.width, model.vocab_size, round(objective.rate * T)
    return model.depth * block(B, T, D, 4 * D) + trained(B * masked * D * V)


def span_corruption(model, objective, length):
    """A sentinel per span in the inputs and in the targets, and an end to both."""
    D, V, H = model.width, model.vocab_size, model.heads
    noise = round(objective.rate * length)
    spans = round(noise / objective.mean_span)
    S, T = length - noise + spans + 1, noise + spans + 1
    encoder = model.depth * block(B, S, D, 4 * D)
    decoder = model.depth * block(B, T, D, 4 * D, causal=True, S=S)
    biases = data_in((S * S + T * T) * 32 * H)  # 32 buckets of distance, once per stack
    return encoder + decoder + biases + trained(B * T * D * V)


def mae(model, objective, side):
    """The encoder sees the kept quarter of the patches, the decoder all."""
    D, d, P = model.width, objective.decoder_width, model.patch**2
    N = (model.image_size // model.patch) ** 2
    visible = N - round(objective.mask_ratio * N)
    encoder = data_in(B * visible * P * D) + model.depth * block(B, visible, D, 4 * D)
    blocks = objective.decoder_depth * block(B, N, d, 4 * d)
    decoder = trained(B * visible * D * d) + blocks + trained(B * N * d * P)
    return crops(B, side, model.image_size) + encoder + decoder


def conv(rows, side, stride, channels, features, need=trained):
    """A 3x3 convolution. Padding is no work, but the gradient of the kernel holds that of columns, and where the output
    is smaller than the kernel all products hold that of patches; none does of images that each output sees whole.
    """
    out = -(-side // stride)
    taps = sum(0 <= stride * o + k - 1 < side for o in range(out) for k in range(3))
    whole, small, pairs = stride == 1 and side <= 2, out < 3, rows * channels * features
    of_kernel = 0 if whole else taps * (3 * out - taps)
    of_forward = 9 * out**2 - taps**2 if small and not whole else 0
    model = need(pairs * taps**2).model
    forwards = model // (2 * pairs * taps**2) - 1  # and the gradient of what is no data
    return Need(model, 2 * pairs * (of_kernel + forwards * of_forward), again_full=2 * pairs * (taps**2 + of_forward))


def simclr(model, objective, side):
    """Two views of each image; each of the 2 B embeddings against all. Remat runs every convolution again."""
    rows, size = 2 * B, objective.view["size"]
    network = conv(rows, size, 2, 1, model.width, data_in)
    side_in, channels = size // 2, model.width
    for stage in range(len(model.stages)):
        out, stride = model.width * 2**stage, 1 if stage == 0 else 2
        side_out = -(-side_in // stride)
        network += conv(rows, side_in, stride, channels, out) + conv(rows, side_out, 1, out, out)
        if stage:
            shortcut = rows * side_out**2 * channels * out
            network += trained(shortcut)._replace(again_full=2 * shortcut)
        side_in, channels = side_out, out
    projector = trained(rows * (channels * objective.hidden + objective.hidden * objective.features))
    return crops(rows, side, size) + network + projector + trained(rows * rows * objective.features)


def dino(model, objective, side):
    """Student: two global and some local crops, forward and backward. Teacher: the global ones, forward."""
    D, P = model.width, model.patch**2
    hidden, neck, K = objective.hidden, objective.bottleneck, objective.n_prototypes
    head = D * hidden + hidden * hidden + hidden * neck + neck * K

    def student(rows, size):
        T = (size // model.patch) ** 2
        return data_in(rows * T * P * D) + model.depth * block(rows, T + 1, D, 4 * D) + trained(rows * head)

    def teacher(rows, size):
        T = (size // model.patch) ** 2
        blocks = model.depth * block(rows, T + 1, D, 4 * D, passes=1)
        return forward_only(rows * T * P * D) + blocks + forward_only(rows * head)

    large, small = objective.global_view["size"], objective.local_view["size"]
    n, m = large // model.patch, small // model.patch
    positions = data_in((m * n * n + m * m * n) * D)  # learned ones, resized for the local crops
    n_local = objective.n_local * B
    views = crops(2 * B, side, large) + crops(n_local, side, small)
    return views + teacher(2 * B, large) + student(2 * B, large) + student(n_local, small) + positions


FORMULAS = dict(causal_lm=causal_lm, masked_lm=masked_lm, span_corruption=span_corruption, mae=mae, simclr=simclr,
                dino=dino)
VARIANTS = [dict(scan=scan, remat=remat) for scan in (True, False) for remat in ("none", "dots", "full")]
RESNET_VARIANTS = [dict(remat=remat) for remat in ("none", "full")]
CASES = [(name, variant) for name, conf in CONFIGS.items() if conf.objective.name in FORMULAS
         for variant in (VARIANTS if "depth" in conf.model else RESNET_VARIANTS)]


def case_id(part):
    return part if isinstance(part, str) else "-".join(map(str, part.values()))


@pytest.mark.parametrize("name, variant", CASES, ids=case_id)
def test_walker_counts_what_the_architecture_needs(name, variant):
    built = experiment(name, **variant)
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        counted = train.count_flops(built.objective, abstract_state(built, batch), batch)
    conf, info = CONFIGS[name], built.source.info
    need = FORMULAS[conf.objective.name](conf.model, conf.objective, info.length or info.shape[0])
    again = {"none": 0, "dots": need.again_dots, "full": need.again_full}[variant.get("remat", "none")]
    assert counted.model_total == pytest.approx(need.model, rel=1e-3)
    assert counted.hw_total == pytest.approx(need.model + need.masked + again, rel=1e-3)


def test_every_formula_is_used():
    assert {conf.objective.name for conf in CONFIGS.values()} >= set(FORMULAS)
