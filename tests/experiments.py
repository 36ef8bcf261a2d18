"""What is in sslx/objectives and configs/, and how a test builds a tiny experiment of it on some of 8 devices."""

import importlib.util
import pathlib

import jax
import ml_collections

from sslx import config, state, train
from sslx.data import pipeline
from sslx.experiment import Experiment, build
from sslx.sharding import batch_sharding

ROOT = pathlib.Path(__file__).parent.parent
OBJECTIVES = sorted(path.stem for path in (ROOT / "sslx" / "objectives").glob("*.py") if config.has_make(path))

BATCH = 16
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def debug_config(path: pathlib.Path) -> ml_collections.ConfigDict:
    """The smallest form of a config, in float32 and without evaluations."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    conf = module.get_config("debug")
    conf.model.dtype = "float32"
    conf.data.batch_size = BATCH
    conf.evals = {}
    return conf


CONFIGS = {path.stem: debug_config(path) for path in sorted((ROOT / "configs").glob("*.py"))}


def experiment(name: str, shape: tuple[int, int, int] = (1, 1, 1), **model) -> Experiment:
    """configs/<name>.py on a mesh of `shape` (data, fsdp, tensor), with changes of its model."""
    conf = CONFIGS[name].copy_and_resolve_references()
    conf.mesh = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    conf.model.update(model)
    return build(conf, jax.devices()[:shape[0] * shape[1] * shape[2]])


def first_batch(built: Experiment) -> dict[str, jax.Array]:
    """The global batch of step 0, without labels."""
    stream = pipeline.stream(built.source, seed=0)
    batch, _ = next(pipeline.batches(stream, batch_size=BATCH, sharding=batch_sharding(built.mesh), first_step=0,
                                     last_step=1, workers=0))
    return {field: x for field, x in batch.items() if field != "label"}


def abstract_state(built: Experiment, batch: dict[str, jax.Array]) -> state.TrainState:
    """Shapes, dtypes and shardings of the state at step 0; the mesh must be set."""
    born = jax.jit(lambda batch: state.create(built.objective, built.optimizer.tx, 0, batch))
    return train.abstract(born, batch, built.mesh)
