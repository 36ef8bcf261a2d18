"""A fuzz of configs and flags: what is malformed is a readable error that names the field, before anything compiles.

What is malformed is decided here by `DOMAINS`, a table of what every field takes that knows nothing of the code, and
by `CONTRADICTIONS`, of fields that do not go together. All draws are seeded.
"""

import copy
import inspect
import json
import math
import pathlib
import random
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import command as process
import jax
import ml_collections
import pytest
from command import CONFIGS

from sslx import command, config, experiment, main, state, train
from sslx.config import UserError

COMPILED = "/jax/core/compile/backend_compile_duration"
N = {"typo": 35, "missing": 35, "hostile": 130, "swapped": 30, "unknown": 15}  # with CONTRADICTIONS and FLAGS over 300


def whole(least: int, end: float = 2**31) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and least <= v < end


def real(holds: Callable[[float], bool] = lambda x: True) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and math.isfinite(float32(v)) and holds(v)


def float32(value: float) -> float:
    return value if abs(value) < 3.5e38 else math.inf


def pair(holds: Callable[[float, float], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(map(real(), v)) and holds(*v)


def every(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (tuple, list)) and len(v) > 0 and all(map(holds, v))


def one_of(*options: Any) -> Callable[[Any], bool]:
    return lambda v: type(v) is str and v in options


def is_bool(v: Any) -> bool:
    return type(v) is bool


def is_str(v: Any) -> bool:
    return type(v) is str


def is_section(v: Any) -> bool:
    return isinstance(v, dict)


count, natural, positive = whole(1), whole(0), real(lambda x: x > 0)
nonnegative, share = real(lambda x: x >= 0), real(lambda x: 0 <= x <= 1)
part, decay = real(lambda x: 0 < x < 1), real(lambda x: 0 <= x < 1)
dtype = one_of("float32", "bfloat16")
attention = {"width!": count, "depth!": count, "heads!": count, "hidden?": count, "norm": one_of("layer", "rms"),
             "mlp": one_of("gelu", "swiglu"), "bias": is_bool, "scan": is_bool, "dtype": dtype,
             "remat": one_of("none", "dots", "attention", "full"), "base?": is_section}

momenta = pair(lambda a, b: 0 <= a <= 1 and 0 <= b <= 1)
# What a field of an objective takes, by its name. Whether it is required, or may be None, its signature says.
OF_OBJECTIVES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("view", "second", "global_view", "local_view"), is_section),
    **dict.fromkeys(("steps", "hidden", "features", "bottleneck", "patch_bottleneck",
                     "predictor", "depth", "chunks", "n_global", "n_prototypes", "iterations", "queue", "groups",
                     "directions", "matches", "local_features", "decoder_width", "decoder_depth", "decoder_heads",
                     "sample_length"), count),
    **dict.fromkeys(("n_local", "temperature_warmup", "queue_from", "gram_from", "gram_every"), natural),
    **dict.fromkeys(("temperature", "scale", "student_temperature", "assignment_temperature", "furthest", "mean_span"),
                    positive),
    **dict.fromkeys(("off_diagonal", "patch_weight", "koleo_weight", "gram_weight"), nonnegative),
    **dict.fromkeys(("rate",), part),
    **dict.fromkeys(("weight", "whole_weight", "shrinkage", "centre_momentum", "mask_probability", "replace", "random"),
                    share),
    **dict.fromkeys(("symmetric", "shared_head", "normalize_target", "whole_word", "locked", "batch_norm",
                     "within"), is_bool),
    "momentum": momenta, "mask_ratio": pair(lambda a, b: 0 <= a <= b <= 1),
    "clusters": every(count), "knots": whole(2), "bias": real(),
    "teacher_temperature": pair(lambda a, b: a > 0 and b > 0),
    "weights": lambda v: every(nonnegative)(v) and len(v) == 3,
}

# What an option takes that is not in the table, by its annotation: a new objective is tested as it is.
ANNOTATED = [(config.Count, count), (config.Natural, natural), (config.Steps, natural), (config.Positive, positive),
             (config.Nonnegative, nonnegative), (config.Share, share), (bool, is_bool), (str, is_str)]

# What each section takes: {field: domain}; "!" for what is required, "?" for what may be None.
DOMAINS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "mesh": dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), lambda v: v == -1 or count(v)),
    "run": {"steps!": count, "seed": whole(0, 2**32), "overlap": is_bool,
            "save_minutes?": positive, "spike?": positive, "max_bad_steps": natural, "hang_s": nonnegative,
            "on_bad_step": one_of("stop", "skip", "rollback"), "on_collapse": one_of("warn", "stop"),
            "record_examples": is_bool, "eval_first": is_bool, "trunk?": is_str, "trunk_step?": count,
            "encoder_from?": is_str, "encoder_step?": count, "encoder_of": one_of("student", "teacher"),
            "keep_at": lambda v: isinstance(v, (tuple, list)) and all(map(count, v)),
            "keep_best?": lambda v: is_str(v) and v[:4] in ("min:", "max:") and len(v) > 4 and "\n" not in v,
            **dict.fromkeys(("keep_every?", "check_replicas_every?", "recompute_every?"), count),
            **dict.fromkeys(("accumulate", "log_every", "eval_every", "save_every", "keep"), count)},
    "data": {"batch_size!": count, "train!": is_section, "synthetic?": is_section, "shuffle": is_bool,
             "workers": natural, "on_bad": one_of("skip", "stop")},
    "optim": {"steps!": count, "learning_rate!": positive,
              "optimizer": one_of("adamw", "lion", "sgd", "lars", "lamb"),
              "schedule": one_of("cosine", "wsd", "constant"), "warmup": natural, "decay": natural, "final": share,
              "weight_decay": nonnegative, "final_weight_decay?": nonnegative,
              "layer_decay": share, "freeze_prototypes": natural,
              "b1": decay, "b2": decay, "momentum": decay, "clip?": positive,
              "moments": dtype, "parameters": dtype},
    "models/transformer": {**attention, "vocab_size!": count, "max_length!": count, "kv_heads?": count,
                           "position": one_of("learned", "rope", "none"), "qk_norm": is_bool, "window?": count,
                           "experts?": is_section, "tied": is_bool, "loss_chunks": count},
    "models/encdec": {**attention, "vocab_size!": count, "decoder_depth?": count, "tied": is_bool,
                      "position": one_of("relative", "rope"), "loss_chunks": count},
    "models/vit": {**attention, "image_size!": count, "patch!": count, "pool": one_of("cls", "mean"),
                   "position": one_of("learned", "sincos", "rope"), "qk_norm": is_bool, "registers": natural,
                   "layer_scale?": positive, "drop": share, "drop_group": count},
    "models/resnet": {"stages": every(count), "width": count, "bottleneck": is_bool, "dtype": dtype,
                      "stem": one_of("imagenet", "small", "small_stride2"), "remat": one_of("none", "full"),
                      "base?": is_section},
    "models/convnext": {"stages": every(count), "width": count, "stem": count, "layer_scale": positive, "dtype": dtype,
                        "remat": one_of("none", "full"), "base?": is_section},
    "models/two_towers": {"image!": is_section, "text!": is_section, "dtype": dtype},
    "experts": {"n!": count, "top_k": count, "capacity": positive, "shared": natural, "balance": nonnegative},
    "objectives/moco": {"momentum": share},
    "objectives/mae": {"mask_ratio": part},
    "objectives/swav": {"queue": natural},
    "view": {"size!": count, "scale": pair(lambda a, b: 0 < a <= b <= 1), "ratio": pair(lambda a, b: 0 < a <= b),
             "blur_sigma": pair(lambda a, b: 0 < a <= b), "hue": real(lambda d: 0 <= d <= 0.5),
             **dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), share),
             **dict.fromkeys(("brightness", "contrast", "saturation"), nonnegative)},
    "data/text": {"path": is_str, "split": one_of("train", "heldout", "all"), "length!": count, "tokenizer": is_str,
                  "documents": is_bool, "heldout": decay, "limit?": whole(1, math.inf), "text_field": is_str,
                  "label_field": is_str, "labels": one_of("none", "package", "field")},
    "data/synthetic": {"modality!": one_of("text", "image"), "length": natural, "vocab_size": natural,
                       "size": natural, "channels": natural, "n": count},
    "data/digits": {"split!": one_of("train", "test"), "captions": natural},
    "data/captions": {"path!": is_str, "size!": count, "length!": count, "split": one_of("train", "heldout", "all"),
                      "heldout": decay, "tokenizer": is_str},
    "evals": {"batch_size?": count, "labelled?": is_section},
    "evals/heldout": {"batches": count, "source": is_section},
    "evals/copying": {"batches": count},
    "evals/probe": {"l2": every(positive), "select": part, "tolerance": positive, "max_iterations": count},
    "evals/retrieval": {"k": every(count), "rows": count, "source": is_section},
    "evals/zero_shot": {"templates": every(lambda v: is_str(v) and "{}" in v)},
    "evals/knn": {"k": count, "chunk": count},
    "evals/collapse": {"split": one_of("train", "test", "heldout"), "rows": whole(2), "min_rankme": positive,
                       "min_feature_std": positive, "of": one_of("features", "projections")},
}
# Options of an evaluation stand in its file, `source` beside them; the rest is what sslx itself supplies.
SUPPLIED = {"model", "info", "n_examples", "devices", "on_bad", "growth"}


def of_objective(path: pathlib.Path) -> dict[str, Callable[[Any], bool]]:
    """DOMAINS of an objective: by the names of its fields, but for what it has of its own."""
    make = config.load("objectives", path.stem)
    known, found = OF_OBJECTIVES | DOMAINS.get(f"objectives/{path.stem}", {}), {}
    annotated = {name: holds for hint, holds in ANNOTATED for name in config.fields(make, hint)}
    for name, parameter in inspect.signature(make).parameters.items():
        if name not in SUPPLIED:
            mark = "!" if parameter.default is parameter.empty else "?" if parameter.default is None else ""
            found[name + mark] = (annotated | known)[name]
    return found


DOMAINS |= {f"objectives/{path.stem}": of_objective(path)
            for path in (CONFIGS.parent / "sslx/objectives").glob("*.py") if config.has_make(path)}

HOSTILE = (0, -1, -2, 2**31, 10**400, 1.5, -0.5, math.nan, math.inf, -math.inf, 1e39, True, None, "8", "", "tpyo", [],
           (), {}, {"a": 1}, [1, 2, 3], (1.0, 0.5), b"x", {1, 2}, ...)


class Case(NamedTuple):
    """A debug config with an edit that makes it malformed; an error names one of `names`."""

    kind: str
    config: str
    edit: str
    conf: dict[str, Any]
    names: tuple[str, ...]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    rng = random.Random(0)
    words = ["lorem", "ipsum", "dolor", "sit", "amet"]
    lines = [{"text": " ".join(rng.choices(words, k=60)), "label": i % 3} for i in range(400)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


CORPUS = "<corpus>"  # stands for the path of the fixture until a case is run


def debug(name: str) -> dict[str, Any]:
    """The debug variant of a config, on few documents where it reads Python's library."""
    conf = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]("debug").to_dict()

    def on_corpus(section: Any) -> None:
        for value in section.values():
            if isinstance(value, dict):
                on_corpus(value)
        if section.get("path") == "stdlib":
            section.update(path=CORPUS, heldout=0.3)
        if section.get("labels") == "package":
            section["labels"] = "field"

    on_corpus(conf)
    return conf


BASE = {path.stem: debug(path.stem) for path in sorted(CONFIGS.glob("*.py"))}


def placed(value: Any, corpus: str) -> Any:
    if isinstance(value, dict):
        return {k: placed(v, corpus) for k, v in value.items()}
    return corpus if value == CORPUS and isinstance(value, str) else value


def sections(conf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(path, section, key of DOMAINS) of all sections of a config."""
    for key in ("mesh", "run", "data", "optim", "evals"):
        yield key, conf[key], key
    model, objective = conf["model"], conf["objective"]
    yield "model", model, f"models/{model['name']}"
    yield "objective", objective, f"objectives/{objective['name']}"
    yield "data.train", conf["data"]["train"], f"data/{conf['data']['train']['name']}"
    if conf["data"].get("synthetic"):
        yield "data.synthetic", conf["data"]["synthetic"], "data/synthetic"
    if model.get("experts"):
        yield "model.experts", model["experts"], "experts"
    for tower in ("image", "text"):
        if tower in model:
            yield f"model.{tower}", model[tower], f"models/{model[tower]['name']}"
    for view in ("view", "global_view", "local_view"):
        if view in objective:
            yield f"objective.{view}", objective[view], "view"
    for name, section in conf["evals"].items():
        if name == "labelled":
            yield from ((f"evals.labelled.{k}", s, f"data/{s['name']}") for k, s in section.items())
        elif name != "batch_size":
            yield f"evals.{name}", section, f"evals/{name}"
            if "source" in section:
                yield f"evals.{name}.source", section["source"], f"data/{section['source']['name']}"


def fields(domain: str) -> dict[str, tuple[Callable[[Any], bool], bool]]:
    """{field: (what it takes, whether it is required)}."""
    def takes(key, holds):
        return (lambda v: v is None or holds(v)) if key.endswith("?") else holds

    return {key.rstrip("!?"): (takes(key, holds), key.endswith("!")) for key, holds in DOMAINS[domain].items()}


def at(conf: dict[str, Any], path: str) -> dict[str, Any]:
    for key in path.split("."):
        conf = conf[key]
    return conf


def misspelt(key: str, rng: random.Random) -> str:
    i = rng.randrange(len(key))
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz_")
    return rng.choice([key[:i] + key[i + 1:], key[:i] + letter + key[i:], key[:i] + key[i:i + 2][::-1] + key[i + 2:],
                       key[:i] + letter + key[i + 1:], key.upper()])


def mutations(kind: str, n: int, seed: int = 0) -> Iterator[Case]:
    """`n` configs with one thing wrong, of a kind."""
    rng = random.Random(f"{kind} {seed}")
    made: set[str] = set()
    while len(made) < n:
        name = rng.choice(sorted(BASE))
        conf = copy.deepcopy(BASE[name])
        path, section, domain = rng.choice(list(sections(conf)))
        known = fields(domain)
        key = rng.choice(sorted(known)) if known else "name"
        match kind:
            case "typo":
                top = rng.random() < 0.2
                where, valid = (conf, set(conf)) if top else (section, {*known, "name", "labelled", *section})
                key = rng.choice(sorted(where, key=str)) if where else "name"
                wrong = misspelt(key, rng)
                if wrong in valid or not wrong or not key:
                    continue
                where[wrong] = where.pop(key, 1)
                edit, names = f"{'config' if top else path}.{key} -> {wrong}", (wrong, key)
            case "missing":
                required = [k for k, (_, needed) in known.items() if needed and k in section]
                if "name" in section:
                    required.append("name")
                if rng.random() < 0.25 or not required:
                    key = rng.choice(sorted(conf))
                    del conf[key]
                    edit = f"no {key}"
                else:
                    key = rng.choice(sorted(required))
                    del section[key]
                    edit = f"no {path}.{key}"
                names = (key,)
            case "hostile":
                value = rng.choice(HOSTILE)
                if not known or known[key][0](value):
                    continue
                section[key] = value
                edit, names = f"{path}.{key} = {value!r:.40}", (key,)
            case "swapped":
                value = rng.choice([3, "x", 2.5, [1], True])
                if "." in path:
                    parent, _, key = path.rpartition(".")
                    at(conf, parent)[key] = value
                else:
                    conf[path], key = value, path
                edit, names = f"{path} = {value!r}", (key,)
            case "unknown":
                named = [p for p, s, _ in sections(conf) if "name" in s]
                path = rng.choice(named)
                section = at(conf, path)
                wrong = rng.choice(["", "no_such", "../main", "__init__", 3, None, misspelt(section["name"], rng)])
                if wrong == section["name"]:
                    continue
                section["name"] = wrong
                edit, names = f"{path}.name = {wrong!r}", ("name", repr(wrong))
        if f"{name}: {edit}" not in made:
            made.add(f"{name}: {edit}")
            yield Case(kind, name, edit, conf, names)


# (config, {field: value}, names of which the error has one): fields that do not go together.
CONTRADICTIONS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("quickstart", {"model.heads": 5}, ("model.heads",)),
    ("quickstart", {"model.heads": 64}, ("model.heads",)),  # an odd head has no pairs to turn
    ("causal_70b", {"model.kv_heads": 3}, ("model.kv_heads",)),
    ("causal_70b", {"model.kv_heads": 8}, ("model.kv_heads",)),
    ("span_text", {"model.heads": 3}, ("model.heads",)),
    ("span_text", {"model.position": "rope", "model.heads": 64}, ("model.heads",)),
    ("quickstart", {"model.base": {"width": 30}}, ("model.base.width",)),
    ("quickstart", {"model.base": {"tied": False}}, ("model.base.tied",)),
    ("simclr_rn50", {"model.base": {"stages": (3, 4, 6)}}, ("model.base.stages",)),
    ("quickstart", {"model.vocab_size": 100}, ("model.vocab_size",)),
    ("quickstart", {"model.max_length": 8}, ("model.max_length",)),
    ("quickstart", {"data.train.length": 512}, ("model.max_length",)),
    ("causal_7b", {"model.loss_chunks": 7}, ("model.loss_chunks",)),
    ("moe_text", {"model.experts.top_k": 9}, ("model.experts.top_k",)),
    ("moe_text", {"model.experts.n": 3, "mesh.data": 4, "mesh.expert": 2}, ("mesh.expert",)),
    ("moe_text", {"model.experts": {}}, ("model.experts.n",)),
    ("quickstart", {"mesh.data": 1, "mesh.tensor": 8}, ("mesh.tensor",)),
    ("mae_fashion_mnist", {"mesh.data": 1, "mesh.tensor": 8}, ("mesh.tensor",)),
    ("quickstart", {"mesh.data": 1, "mesh.fsdp": 8, "model.width": 36, "model.heads": 2}, ("mesh",)),
    ("quickstart", {"mesh.data": 1, "mesh.context": 8, "data.train.length": 60}, ("mesh.context",)),
    ("quickstart", {"mesh.data": 4, "mesh.context": 2, "evals.heldout.source.length": 33}, ("mesh.context",)),
    ("dino_fashion_mnist", {"mesh.data": 4, "mesh.context": 2}, ("mesh.context",)),
    *[("quickstart", dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True)), ("mesh",))
      for shape in ((3, 1, 1), (16, 1, 1), (2, 2, 1), (8, 8, 1), (-1, 3, 1), (-1, -1, 1), (1, 1, 1), (2**30, 2, 4))],
    ("quickstart", {"data.batch_size": 12}, ("data.batch_size",)),
    ("quickstart", {"run.accumulate": 3}, ("run.accumulate",)),
    ("quickstart", {"run.accumulate": 16}, ("run.accumulate",)),
    ("byol_fashion_mnist", {"run.accumulate": 2}, ("objective.steps", "run.accumulate")),
    ("byol_fashion_mnist", {"run.steps": 48}, ("objective.steps", "run.steps")),
    ("dinov3_fashion_mnist", {"objective.gram_from": 0}, ("objective.gram_from", "gram_weight")),
    ("dinov3_fashion_mnist", {"objective.gram_anchor": 9}, ("objective.gram_from", "gram_anchor")),
    ("simclr_rn50", {"objective.chunks": 5}, ("objective.chunks",)),
    ("deepcluster_fashion_mnist", {"objective.clusters": (32, 3000)}, ("objective.clusters", "1437 examples")),
    ("deepcluster_fashion_mnist", {"objective.passes": 0.01, "objective.clusters": (33,)}, ("objective.passes",)),
    ("mae_fashion_mnist", {"evals.collapse": {"of": "projections"}}, ("evals.collapse", "projections")),
    ("dinov2_fashion_mnist", {"evals.collapse": {"of": "projections"}}, ("evals.collapse", "projections")),
    ("w_mse_fashion_mnist", {"objective.groups": 8, "objective.features": 3}, ("objective.groups", "8 devices")),
    ("lejepa_fashion_mnist", {"objective.n_global": 1, "objective.n_local": 0}, ("objective.n_local",)),
    ("mae_fashion_mnist", {"model.patch": 3}, ("model.patch",)),
    ("mae_fashion_mnist", {"model.image_size": 16}, ("model.image_size",)),
    ("mae_fashion_mnist", {"objective.view.size": 16}, ("objective.view.size",)),
    ("mae_fashion_mnist", {"objective.mask_ratio": 0.001}, ("objective.mask_ratio",)),
    ("mae_fashion_mnist", {"objective.mask_ratio": 0.999}, ("objective.mask_ratio",)),
    ("mae_fashion_mnist", {"objective.decoder_heads": 3}, ("objective.decoder_heads",)),
    ("mae_fashion_mnist", {"objective.decoder_width": 34, "objective.decoder_heads": 2}, ("objective.decoder_width",)),
    ("mae_fashion_mnist", {"model.width": 66, "model.heads": 2}, ("model.width",)),
    ("mae_vit_h", {"model.heads": 5}, ("model.heads",)),
    ("dino_fashion_mnist", {"objective.local_view.size": 5}, ("model.patch",)),
    ("dino_vit_g", {"data.train.size": 15}, ("model.patch",)),
    ("dino_vit_g", {"evals.labelled.test.size": 15}, ("model.patch",)),
    ("dino_vit_g", {"evals.labelled.test.channels": 1}, ("evals", "channels")),
    ("mlm_text", {"objective.replace": 0.8, "objective.random": 0.3}, ("objective.random",)),
    ("span_text", {"objective.mean_span": 0.01, "objective.rate": 0.5, "data.train.length": 400}, ("sentinels",)),
    ("span_text", {"data.train.length": 1}, ("length", "tokens")),
    ("quickstart", {"optim.warmup": 100}, ("optim.warmup",)),
    ("quickstart", {"optim.schedule": "wsd", "optim.decay": 24, "optim.warmup": 1}, ("optim.decay",)),
    ("causal_text", {"objective": {"name": "span_corruption"}}, ("objective.name",)),  # a decoder alone
    ("causal_text", {"objective": {"name": "mae", "view": {"size": 8}}}, ("objective.name",)),
    ("causal_text", {"objective": {"name": "simclr", "view": {"size": 8}}}, ("objective.name",)),
    ("causal_text", {"objective": {"name": "rotation"}}, ("objective.name",)),
    ("span_text", {"objective": {"name": "causal_lm"}}, ("objective.name",)),
    ("span_text", {"objective": {"name": "masked_lm"}}, ("objective.name",)),
    ("mae_fashion_mnist", {"objective": {"name": "causal_lm"}}, ("objective.name",)),
    ("rotation_fashion_mnist", {"objective": {"name": "mae", "view": {"size": 8}}}, ("objective.name",)),
    ("causal_text", {"data.train": {"name": "digits", "split": "train"}}, ("data.train.name",)),
    ("rotation_fashion_mnist", {"data.train": {"name": "text", "path": CORPUS, "length": 8}}, ("data.train.name",)),
    ("causal_text", {"evals.heldout.source": {"name": "digits", "split": "test"}}, ("evals",)),
    ("mae_fashion_mnist", {"evals.labelled.test": {"name": "text", "path": CORPUS, "length": 8}}, ("evals",)),
    ("causal_7b", {"evals.heldout.source.vocab_size": 300}, ("evals", "vocab_size")),
    ("causal_7b", {"evals.heldout.source.length": 65}, ("model.max_length",)),
    ("mae_fashion_mnist", {"evals.labelled": {}}, ("evals.labelled.",)),
    ("quickstart", {"evals.probe": {}}, ("evals.labelled.",)),
    ("quickstart", {"evals.heldout": {"batches": 2}}, ("evals.heldout.source",)),
    ("quickstart", {"evals.batch_size": 4}, ("evals.batch_size",)),
    ("mae_fashion_mnist", {"evals.knn.k": 10_000}, ("evals.knn",)),
    ("quickstart", {"evals.heldout.source.limit": 3}, ("evals.batch_size", "evals.heldout")),
    ("mae_fashion_mnist", {"evals.knn.name": "probe"}, ("evals.knn.name",)),
    ("mae_fashion_mnist", {"evals.knn.source": {"name": "digits", "split": "test"}}, ("evals.knn.source",)),
    ("mae_fashion_mnist", {"evals.nothing": {}}, ("nothing",)),
    ("quickstart", {"data.train.path": "/no/such/folder"}, ("path",)),
    ("quickstart", {"data.train.path": "no/such/*.txt"}, ("path",)),
    ("quickstart", {"data.train.tokenizer": "/no/such/tokenizer.json"}, ("tokenizer",)),
    ("quickstart", {"data.train.labels": "package"}, ("labels",)),
    ("quickstart", {"data.train": {"name": "tokens", "path": "/no/such/tokens", "length": 64}}, ("path",)),
    ("mae_fashion_mnist", {"data.train": {"name": "idx", "path": "/no/such", "split": "train"}}, ("path",)),
    ("mae_fashion_mnist", {"data.train": {"name": "folder", "path": "/no/such", "size": 8}}, ("path",)),
    ("mae_vit_h", {"data.train": {"name": "arrayrecord", "path": "/no/such", "size": 16}}, ("path",)),
    ("quickstart", {"data.train": {"name": "mixture", "sources": {}, "weights": {}}}, ("weights", "sources")),
]

# (flags beside a sound --config and --workdir, what the error names).
FLAGS: list[tuple[str, str]] = [
    ("--config.model.width=abc", "config.model.width"), ("--config.model.width=", "config.model.width"),
    ("--config.model.width=1e3", "config.model.width"), ("--config.model.width=3.5", "config.model.width"),
    ("--config.model.width=0", "config.model.width"), ("--config.model.width", "config.model.width"),
    ("--config.model.width=None", "config.model.width"), ("--config.model.widht=3", "widht"),
    ("--config.model.width.x=3", "width.x"), ("--config.model.width[0]=3", "width[0]"),
    ("--config.model=3", "config.model"),
    ("--config.model={}x", "config.model"), ("--config.nosuch=1", "nosuch"), ("--config.nosuch.a=1", "nosuch"),
    ("--config..width=3", "config..width"), ("--config.=3", "config."), ("--config.model.1x=3", "1x"),
    ("--config.model.a-b=3", "a-b"), ("--config.model[0]=3", "config.model"), ("--config.model.items=3", "items"),
    ("--config.model.__class__=3", "__class__"), ("--config.model.keys=3", "keys"),
    ("--config.model.bias=maybe", "config.model.bias"), ("--config.optim.clip=nan", "config.optim.clip"),
    ("--config.optim.clip=inf", "config.optim.clip"), ("--config.optim.learning_rate=-1", "learning_rate"),
    ("--config.optim.learning_rate=1e39", "learning_rate"), ("--config.run.keep=1e400", "config.run.keep"),
    ("--config.run.keep=[1,2]", "config.run.keep"), ("--config.run.keep=open('x')", "config.run.keep"),
    ("--config.run.keep=0", "config.run.keep"), ("--config.run.accumulate=two", "config.run.accumulate"),
    ("--config.model.experts={'n':", "config.model.experts"), ("--config.mesh=(1,2", "config.mesh"),
    ("--config.mesh.data=7", "mesh"), ("--config.data.train.name=no_such", "no_such"),
    ("--config.run.spike=0", "config.run.spike"), ("--config.run.keep_best=loss", "config.run.keep_best"),
    ("--config.run.hang_s=-1", "config.run.hang_s"), ("--config.run.on_bad_step=retry", "config.run.on_bad_step"),
    ("--workdir", "workdir"),
    ("--nosuch=3", "nosuch"), ("--noconfig", "noconfig"), ("stray", "stray"), ("-", "-"), ("--=3", "--=3"),
    ("--processes=two", "processes"), ("--processes=", "processes"), ("--process=1.5", "process"),
    ("--flagfile=/no/such/file", "/no/such/file"),
]


def cases() -> Iterator[Case]:
    for kind, n in N.items():
        yield from mutations(kind, n)
    for name, changes, names in CONTRADICTIONS:
        conf = copy.deepcopy(BASE[name])
        for path, value in changes.items():
            *parents, key = path.split(".")
            (at(conf, ".".join(parents)) if parents else conf)[key] = copy.deepcopy(value)
        yield Case("contradiction", name, f"{changes}", conf, names)


CASES = list(cases())


@pytest.fixture
def nothing_compiles():
    """Fails the test if XLA compiles."""
    compiled: list[str] = []

    def note(event: str, _: float, **names: Any) -> None:
        if event == COMPILED:
            compiled.append(str(names))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield
    jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


def until_the_workdir_is_claimed(conf: ml_collections.ConfigDict) -> None:
    """What a run does before it writes anything and compiles."""
    built = experiment.build(conf)
    with jax.set_mesh(built.mesh):
        batch = next(built.batches(0, 1))[0]
        unborn = state.abstract(built.objective, built.optimizer, built.run.seed, batch)
        train.count_flops(built.objective, unborn, batch)


def check_readable(error: UserError, names: tuple[str, ...]) -> None:
    message = str(error)
    assert any(name in message for name in names), message
    assert error.status == 2 and 20 < len(message) < 1000, message
    assert not re.search(r"Traceback|File \"|<[\w.]+ object at 0x", message), message


def test_there_are_300():
    assert len(CASES) + len(FLAGS) >= 300 and len({(c.config, c.edit) for c in CASES}) == len(CASES)


@pytest.mark.parametrize("domain", [d for d in DOMAINS if d != "evals"])
def test_the_table_has_every_field(domain):
    made: Any
    match domain:
        case "mesh":
            made = experiment.make_mesh
        case "run":
            made = experiment.Run
        case "data":
            made = experiment.Data
        case "optim":
            made = experiment.optim.make
        case "experts":
            from sslx.models.transformer import mixture as made
        case "view":
            from sslx.views.image import augmentation as made
        case _:
            made = config.load(*domain.split("/"))
    parameters = inspect.signature(made).parameters
    of_table = {key for key in fields(domain) if not domain.startswith("evals/") or key != "source"}
    assert of_table == set(parameters) - (SUPPLIED if domain != "data" else set())
    assert {k for k in of_table if fields(domain)[k][1]} == {
        k for k, p in parameters.items() if p.default is p.empty and k in of_table}


@pytest.mark.parametrize("name", ["causal_text", "moe_8x7b", "mlm_text", "span_text", "mae_fashion_mnist"])
def test_what_is_sound_is_not_refused(name, corpus, nothing_compiles):
    until_the_workdir_is_claimed(ml_collections.ConfigDict(placed(BASE[name], str(corpus))))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.config}-{c.edit}"[:80])
def test_a_malformed_config_is_refused(case, corpus, nothing_compiles):
    with pytest.raises(UserError) as error:
        until_the_workdir_is_claimed(ml_collections.ConfigDict(placed(case.conf, str(corpus))))
    check_readable(error.value, case.names)


@pytest.mark.parametrize("flags, name", FLAGS, ids=[f for f, _ in FLAGS])
def test_a_malformed_flag_is_refused(flags, name, tmp_path, corpus, nothing_compiles):
    arguments = [f"--config={CONFIGS / 'quickstart.py'}:debug", f"--workdir={tmp_path}"]
    with pytest.raises(UserError) as error:
        conf, _ = command.parse("main", main.__doc__, main.FLAGS, [*arguments, *flags.split(" ")])
        experiment.build(conf)
    check_readable(error.value, (name,))


@pytest.mark.parametrize("text", [
    "", "get_config = 3", "def get_config(): return None", "def get_config(): return {'mesh': {}}",
    "def get_config(a, b): return 1", "def get_config(:", "\x00",
])
def test_a_file_that_is_no_config_is_named(text, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # what a config before this one was loaded as
    path = tmp_path / "no_config.py"
    path.write_text(text)
    with pytest.raises(UserError, match=r"no_config\.py|null bytes") as error:
        command.parse("main", main.__doc__, main.FLAGS, [f"--config={path}", f"--workdir={tmp_path}"])
    check_readable(error.value, ("no_config.py", "null bytes"))


@pytest.mark.parametrize("flags, name", [
    (("--config.model.width=0",), "config.model.width"),
    (("--config.model.heads=5",), "model.heads"),
    (("--config.objective.name=causal_lm",), "config.objective"),
    (("--coordinator=host", "--processes=2", "--process=0"), "--coordinator"),
    (("--coordinator=localhost:99999", "--processes=1", "--process=1"), "--process"),
    (("--processes=2",), "--coordinator"),
])
def test_the_command_ends_with_status_2_and_writes_nothing(flags, name, tmp_path):
    workdir = tmp_path / "w"
    status, _, err = process.run(f"--config={CONFIGS / 'mae_fashion_mnist.py'}:debug",
                                 f"--workdir={workdir}", *flags)
    assert status == 2 and "Traceback" not in err and name in err, err
    assert not workdir.exists()


def test_secrets_are_nowhere_in_the_workdir_and_on_the_terminal(tmp_path, corpus):
    """A password in the URL that is read, and a section whose name is one of a secret."""
    host = tmp_path / "s3:" / "me:hunter2@host"
    host.mkdir(parents=True)
    (host / "documents.jsonl").write_text(corpus.read_text())
    path = process.variant(tmp_path, "quickstart", f"""
    source = dict(name="text", path="{tmp_path}/s3://me:hunter2@host/documents.jsonl", length=16)
    config.data.train = dict(name="mixture", sources=dict(api_key=source), weights=dict(api_key=1.0))
    config.model.update(depth=1, max_length=16, width=16, heads=1)
    config.evals, config.run.steps, config.optim.steps, config.optim.warmup = {{}}, 1, 1, 0
    """.strip())
    workdir = tmp_path / "w"
    status, out, err = process.run(f"--config={path}", f"--workdir={workdir}")
    assert status == 0, err
    record = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert record["config"]["data"]["train"] == dict(name="mixture", sources={"api_key": "***"},
                                                     weights={"api_key": "***"})
    assert "s3://***@host/documents.jsonl" in record["dataset"]
    written = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    assert {"config.json", "metrics.jsonl", "report.html"} <= {p.name for p in written}
    assert [p for p, content in written.items() if b"hunter2" in content] == []
    assert "hunter2" not in out + err
