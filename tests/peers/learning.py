"""python tests/peers/learning.py [METHOD ...] [--steps 300] [--seeds 0,1,2] [--json F]

What configs/METHOD_fashion_mnist.py learns here and what lightly's parts learn in PyTorch: the same network (SimCLR's
ResNet), images in the same order, views to the bit, optimizer and schedule, so many steps. kNN-5 / linear probe by the
evaluations of the config, on all test images, and the CPU-seconds of both, without compilation and evaluation; those of
the peer hold the views, which sslx makes for it: means over all seeds of F, and the median of their ratios. What F has
is not run again. Wants `pip install -e .[peers]`; on one core: `taskset -c 0`.
"""

import argparse
import copy
import itertools
import json
import pathlib
import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from lightly import loss as losses
from lightly.models import modules, utils
from lightly.utils.scheduler import cosine_schedule
from torch import nn

from sslx import experiment, platforms, state, train
from sslx.evals import Subject, knn, probe

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
Views = list[torch.Tensor]


class ResNet(nn.Module):
    """The network of sslx/models/resnet.py with basic blocks and the stem "small_stride2"."""

    def __init__(self, stages: tuple[int, ...], width: int):
        super().__init__()
        self.stem, channels, blocks = normed(1, width, 3, 2), width, []
        for i, n in enumerate(stages):
            for j in range(n):
                blocks.append(Residual(channels, width * 2**i, 2 if i and not j else 1))
                channels = width * 2**i
        self.blocks, self.features = nn.Sequential(*blocks), channels

    def forward(self, x):
        return self.blocks(self.stem((x - 0.5) / 0.25).relu()).mean((2, 3))


class Residual(nn.Module):
    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.first, self.second = normed(channels, features, 3, stride), normed(features, features, 3, 1)
        self.shortcut = nn.Identity() if channels == features else normed(channels, features, 1, stride)

    def forward(self, x):
        return (self.shortcut(x) + self.second(self.first(x).relu())).relu()


def normed(channels: int, features: int, kernel: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(channels, features, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(features))


class Made(NamedTuple):
    """The modules beside the network, the loss of (network, views, step), and the network that is judged."""

    beside: list[nn.Module]
    loss: Callable[[nn.Module, Views, int], torch.Tensor]
    judged: Callable[[nn.Module], nn.Module] = lambda net: net


# Each is made of (features of the network, config.objective, steps).


def simclr(D: int, o: Any, steps: int) -> Made:
    head, criterion = modules.SimCLRProjectionHead(D, o.hidden, o.features), losses.NTXentLoss(o.temperature)
    return Made([head], lambda net, views, step: criterion(*(head(net(x)) for x in views)))


def with_teacher(net: nn.Module, head: nn.Module, held: list[nn.Module], momentum: float) -> Callable:
    """A copy of both that has followed them a step further; `held` keeps it."""
    held += [] if held else map(copy.deepcopy, (net, head))
    for student, teacher in zip((net, head), held, strict=True):
        utils.update_momentum(student, teacher, momentum)
    return lambda x: held[1](held[0](x)).detach()


def moco(D: int, o: Any, steps: int) -> Made:
    head, held = modules.MoCoProjectionHead(D, o.hidden, o.features), []
    criterion = losses.NTXentLoss(o.temperature, memory_bank_size=(o.queue, o.features))

    def loss(net, views, step):
        teacher = with_teacher(net, head, held, o.momentum)
        q, k = ([f(x) for x in views] for f in (lambda x: head(net(x)), teacher))
        return (criterion(q[0], k[1]) + criterion(q[1], k[0])) / 2

    return Made([head], loss)


def nnclr(D: int, o: Any, steps: int) -> Made:
    head = modules.NNCLRProjectionHead(D, o.hidden, o.features)
    predictor = modules.NNCLRPredictionHead(o.features, o.predictor, o.features)
    bank, criterion = modules.NNMemoryBankModule(size=(o.queue, o.features)), losses.NTXentLoss(o.temperature)

    def loss(net, views, step):
        z = [head(net(x)) for x in views]
        p, near = [predictor(x) for x in z], [bank(x.detach(), update=i == 1) for i, x in enumerate(z)]
        return (criterion(near[0], p[1]) + criterion(near[1], p[0])) / 2

    return Made([head, predictor], loss)


def byol(D: int, o: Any, steps: int) -> Made:
    head, held = modules.BYOLProjectionHead(D, o.hidden, o.features), []
    predictor = modules.BYOLPredictionHead(o.features, o.hidden, o.features)
    criterion = losses.NegativeCosineSimilarity()

    def loss(net, views, step):
        teacher = with_teacher(net, head, held, cosine_schedule(step, steps, *o.momentum))
        p, z = [predictor(head(net(x))) for x in views], [teacher(x) for x in views]
        return (criterion(p[0], z[1]) + criterion(p[1], z[0])) / 2

    return Made([head, predictor], loss)


def simsiam(D: int, o: Any, steps: int) -> Made:
    head = modules.SimSiamProjectionHead(D, o.features, o.features)
    predictor = modules.SimSiamPredictionHead(o.features, o.bottleneck, o.features)
    criterion = losses.NegativeCosineSimilarity()

    def loss(net, views, step):
        z = [head(net(x)) for x in views]
        return (criterion(predictor(z[0]), z[1].detach()) + criterion(predictor(z[1]), z[0].detach())) / 2

    return Made([head, predictor], loss)


def barlow_twins(D: int, o: Any, steps: int, criterion: nn.Module | None = None) -> Made:
    head = modules.BarlowTwinsProjectionHead(D, o.features, o.features)
    criterion = criterion or losses.BarlowTwinsLoss()
    return Made([head], lambda net, views, step: criterion(*(head(net(x)) for x in views)))


def vicreg(D: int, o: Any, steps: int) -> Made:
    return barlow_twins(D, o, steps, losses.VICRegLoss())


def swav(D: int, o: Any, steps: int) -> Made:
    head = modules.SwaVProjectionHead(D, o.hidden, o.features)
    prototypes = modules.SwaVPrototypes(o.features, o.n_prototypes, n_steps_frozen_prototypes=steps // 20)
    criterion = losses.SwaVLoss()

    def loss(net, views, step):
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(head(net(x))), step) for x in views]
        return criterion(scores[:2], scores[2:])

    return Made([head, prototypes], loss)


def dino(D: int, o: Any, steps: int) -> Made:
    head, of_teacher = (modules.DINOProjectionHead(D, o.hidden, o.bottleneck, o.n_prototypes) for _ in range(2))
    of_teacher.load_state_dict(head.state_dict())  # with its weight norm it cannot be copied
    held: list[nn.Module] = []
    criterion = losses.DINOLoss(o.n_prototypes, *o.teacher_temperature, o.temperature_warmup,
                                center_momentum=o.centre_momentum)

    def loss(net, views, step):
        held.extend([] if held else [copy.deepcopy(net), of_teacher])
        teacher = with_teacher(net, head, held, cosine_schedule(step, steps, *o.momentum))
        head.last_layer.weight_v.requires_grad_(step >= steps // 20)  # its prototypes wait
        return criterion([teacher(x) for x in views[:2]], [head(net(x)) for x in views], epoch=step)

    return Made([head], loss, lambda net: held[0])


def projector(D: int, o: Any, depth: int, norm: nn.Module | None) -> modules.heads.ProjectionHead:
    """`depth` layers, `norm` after the last."""
    sizes = [D, *[o.hidden] * (depth - 1)]
    return modules.heads.ProjectionHead([*((a, b, nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(sizes)),
                                         (sizes[-1], o.features, norm, None)])


def w_mse(D: int, o: Any, steps: int) -> Made:
    head = projector(D, o, 2, nn.BatchNorm1d(o.features, affine=False))

    def loss(net, views, step):
        criterion = losses.WMSELoss(o.features, eps=o.shrinkage, w_size=len(views[0]) // o.groups)
        return criterion(torch.cat([head(net(x)) for x in views]))

    return Made([head], loss)


def lejepa(D: int, o: Any, steps: int) -> Made:
    head, criterion = projector(D, o, 3, None), losses.LeJEPALoss(o.weight, sigreg_num_vectors=o.directions)

    def loss(net, views, step):
        z = [head(net(x)) for x in views]
        return criterion(global_proj=torch.stack(z[:2]), local_proj=torch.stack(z[2:]))

    return Made([head], loss)


METHODS = dict(simclr=simclr, moco=moco, nnclr=nnclr, byol=byol, simsiam=simsiam, barlow_twins=barlow_twins,
               vicreg=vicreg, w_mse=w_mse, swav=swav, dino=dino, lejepa=lejepa)


def built_of(name: str, steps: int, seed: int) -> experiment.Experiment:
    conf, of_resnet = (runpy.run_path(str(CONFIGS / f"{n}_fashion_mnist.py"))["get_config"]() for n in (name, "simclr"))
    conf.model = of_resnet.model
    conf.evals.labelled.test.limit = None
    conf.run.update(steps=steps, seed=seed)
    conf.optim.update(steps=steps, warmup=steps // 20)
    if "steps" in conf.objective:
        conf.objective.steps = steps
    if name == "swav":  # its queue is another's step at lightly
        conf.objective.queue = 0
    if name == "nnclr":  # lightly's loss
        conf.objective.within = True
    if "freeze_prototypes" in conf.optim:
        conf.optim.freeze_prototypes = steps // 20
    return experiment.build(conf, jax.devices()[:1])


def learnt(features: Callable[[np.ndarray], np.ndarray], built: experiment.Experiment) -> dict[str, float]:
    """kNN and probe of images' features, in per cent."""
    subject = Subject(lambda batch: features(batch["image"]), None, built.evaluation.splits, 500)
    return {"knn": 100 * knn.make(k=5)(subject)["knn/accuracy"],
            "probe": 100 * probe.make()(subject)["probe/accuracy"]}


def ours(built: experiment.Experiment, steps: int) -> dict[str, float]:
    batches = built.batches(0, steps)
    first = next(built.batches(0, 1))[0]
    current = state.create(built.objective, built.optimizer, built.run.seed, first)
    step = train.step_of(built)
    step(jax.tree.map(lambda x: x.copy(), current), first)  # compiled
    began = time.process_time()
    for batch, _ in batches:
        current, _ = step(current, batch)
    jax.block_until_ready(current)
    spent = time.process_time() - began
    encode = jax.jit(lambda images: built.objective.encode(current.params, current.aux, {"image": images}))
    return {"cpu_s": spent} | learnt(lambda images: np.asarray(encode(images)), built)


def drawn(built: experiment.Experiment, steps: int) -> Iterator[Views]:
    """The crops that each step of `ours` has drawn, as `train.train_step` and `joint.objective` split its key."""
    @jax.jit
    def crops(i, batch):
        key = jax.random.split(jax.random.fold_in(jax.random.key(built.run.seed), i))[0]
        shown = built.objective.show(None, None, batch, key)
        return [x for caption, x in shown.items() if caption != "input"]

    crops(0, next(built.batches(0, 1))[0])
    for i, (batch, _) in enumerate(built.batches(0, steps)):
        yield [channels_first(x) for x in crops(i, batch)]


def channels_first(images) -> torch.Tensor:
    """Images with channels before places, as PyTorch counts them, which lie last in memory as they did."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def theirs(name: str, built: experiment.Experiment, steps: int) -> dict[str, float]:
    torch.manual_seed(built.run.seed)
    conf = built.config
    net = ResNet(conf["model"]["stages"], conf["model"]["width"])
    net = net.to(memory_format=torch.channels_last)  # a tenth faster
    options = argparse.Namespace(**conf["objective"])
    made = METHODS[name](net.features, options, steps)
    parameters = [p for module in (net, *made.beside) for p in module.parameters()]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=conf["optim"]["weight_decay"]),
              dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)]
    optimizer, views = torch.optim.AdamW(groups), drawn(built, steps)
    began = time.process_time()
    for i, batch in enumerate(views):
        for group in optimizer.param_groups:
            group["lr"] = float(built.optimizer.learning_rate(i))
        loss = made.loss(net, batch, i)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if "clip" in conf["optim"]:
            nn.utils.clip_grad_norm_(parameters, conf["optim"]["clip"])
        optimizer.step()
    spent = time.process_time() - began
    judged = made.judged(net).eval()

    @torch.no_grad()
    def features(images):
        return judged(channels_first(np.float32(images) / 255)).numpy()

    return {"cpu_s": spent} | learnt(features, built)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/peers/learning.py", usage=__doc__)
    parser.add_argument("methods", nargs="*", default=[], choices=[*METHODS, []])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    platforms.prepare()
    platforms.enable_compilation_cache()
    torch.set_num_threads(1)
    everything: dict[str, Any] = {}  # by steps, method, side and seed
    if given.json and given.json.exists():
        everything = json.loads(given.json.read_text())
    seeds = given.seeds.split(",")
    print("| kNN-5 / probe, CPU-seconds | seeds | sslx | lightly | CPU |\n|---|---|---|---|---|")
    for name in given.methods or METHODS:
        found = everything.setdefault(str(given.steps), {}).setdefault(name, {"sslx": {}, "lightly": {}})
        for seed in seeds:
            if seed in found["lightly"]:
                continue
            built = built_of(name, given.steps, int(seed))
            with jax.set_mesh(built.mesh):
                found["sslx"][seed] = ours(built, given.steps)
                found["lightly"][seed] = theirs(name, built, given.steps)
            if given.json:
                given.json.write_text(json.dumps(everything, indent=1) + "\n")
        means = {side: {k: statistics.fmean(run[k] for run in runs.values()) for k in ("knn", "probe", "cpu_s")}
                 for side, runs in found.items()}
        cells = [f"{m['knn']:.1f} / {m['probe']:.1f}, {m['cpu_s']:.0f}" for m in means.values()]
        ratio = statistics.median(found["lightly"][seed]["cpu_s"] / run["cpu_s"] for seed, run in found["sslx"].items())
        print(f"| {name} | {len(found['sslx'])} | {' | '.join(cells)} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
