"""What is in sslx/objectives and configs/, and how a test builds a tiny experiment of it on some of 8 devices."""

import importlib.util
import math
import pathlib
import types

import jax
import ml_collections

from sslx import config, state
from sslx.experiment import Experiment, build

ROOT = pathlib.Path(__file__).parent.parent
OBJECTIVES = sorted(path.stem for path in (ROOT / "sslx" / "objectives").glob("*.py") if config.has_make(path))

BATCH = 16
AXES = ("data", "fsdp", "tensor", "context", "expert")
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def axes(conf: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The mesh axes that an objective supports as it is configured: time is cut of text, experts are of a mixture."""
    text, mixture = "vocab_size" in conf.model, "experts" in conf.model
    return "data", "fsdp", "tensor", *["context"] * text, *["expert"] * mixture


def meshes(conf: ml_collections.ConfigDict) -> list[tuple[int, ...]]:
    """Meshes of 8 devices, two along each of three axes, that together have all axes which a config supports."""
    supported = axes(conf)
    return [tuple(1 + (axis in cut) for axis in AXES) for cut in dict.fromkeys((supported[:3], supported[-3:]))]


def config_module(path: pathlib.Path) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def debug_config(path: pathlib.Path) -> ml_collections.ConfigDict:
    """The smallest form of a config, in float32 and without evaluations."""
    conf = config_module(path).get_config("debug")
    conf.model.dtype = "float32"
    conf.data.batch_size = BATCH
    conf.evals = {}
    return conf


FILES = sorted((ROOT / "configs").glob("*.py"))
# Those for pods come with rows to compile for; tests/test_aot.py is about them.
CONFIGS = {path.stem: conf for path in FILES if not (conf := debug_config(path)).data.get("synthetic")}
PODS = [path for path in FILES if path.stem not in CONFIGS]


def experiment(name: str, shape: tuple[int, ...] = (1, 1, 1), **model) -> Experiment:
    """configs/<name>.py on a mesh of `shape`, the first of AXES, with changes of its model."""
    conf = CONFIGS[name].copy_and_resolve_references()
    conf.mesh = dict(zip(AXES, shape, strict=False))
    conf.model.update(model)
    return build(conf, jax.devices()[:math.prod(shape)])


def first_batch(built: Experiment) -> dict[str, jax.Array]:
    """The global batch of step 0."""
    return next(built.batches(0, 1))[0]


def abstract_state(built: Experiment, batch: dict[str, jax.Array]) -> state.TrainState:
    """Shapes, dtypes and shardings of the state at step 0; the mesh must be set."""
    return state.abstract(built.objective, built.optimizer, 0, batch)
