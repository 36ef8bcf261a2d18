"""The encoder of another run, with which a run begins: that of a locked tower, or weights to train on.

In the state of every objective on images, parameters of the backbone lie under "encoder", those that are evaluated or
follow too, and its batch statistics under "stats" and "encoder". A run that begins with an encoder has it in all these
places; heads, queues and the optimizer are new.
"""

import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from sslx.checkpoint import sound_step
from sslx.config import UserError
from sslx.experiment import Run
from sslx.state import TrainState

STATS = ("stats", "encoder")
PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "student": {"params": ("params", "encoder"), "stats": ("aux", *STATS)},
    "teacher": {"params": ("aux", "teacher", "params", "encoder"), "stats": ("aux", "teacher", *STATS)},
}


class Encoder(NamedTuple):
    """That of the student or teacher in a checkpoint of the run in `workdir`."""

    workdir: pathlib.Path
    step: int
    of: Literal["student", "teacher"]

    @property
    def folder(self) -> pathlib.Path:
        return self.workdir.absolute() / "checkpoints" / str(self.step)

    def adopted(self, state: TrainState) -> TrainState:
        """A state at step 0 with this encoder in place of the random one, sharded as that."""
        own = self.own(state)
        wanted = unflatten_dict({place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                                 for place, x in own.values()})
        part = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
        with reader() as checkpointer:
            found = flatten_dict(checkpointer.restore(self.folder, ocp.args.Composite(default=part))["default"])
        # Copies, because a step takes the memory of its state, and a student and its teacher begin with the same.
        values = {path: jnp.copy(found[place]) for path, (place, _) in own.items()}
        return jax.tree_util.tree_map_with_path(lambda path, x: values.get(path, x), state)

    def own(self, state: TrainState) -> dict[Any, tuple[tuple[str, ...], Any]]:
        """{path: (where the other run's state has the value that belongs there, the value)} of a state's encoders."""
        leaves = jax.tree_util.tree_leaves_with_path(state._replace(opt_state=None))
        return {path: (place, x) for path, x in leaves if (place := self.place(keys(path)))}

    def place(self, path: tuple[str, ...]) -> tuple[str, ...] | None:
        """Where the other run's state has what belongs at a path of this run's; None if that is in no encoder."""
        if "encoder" not in path:
            return None
        before, after = path[:path.index("encoder")], path[path.index("encoder") + 1:]
        return *PLACES[self.of]["stats" if "stats" in before else "params"], *after


def encoder_of(run: Run, unborn: TrainState) -> Encoder | None:
    """What a run of this abstract state begins with, if it says so. Raises UserError if it does not fit."""
    if run.encoder_from is None:
        if "locked" in unborn.aux:
            raise UserError("config.objective.locked=True takes the image tower of another run, and there is none: set"
                            " config.run.encoder_from to its workdir")
        return None
    workdir, named = pathlib.Path(run.encoder_from), f"config.run.encoder_from={run.encoder_from!r}"
    encoder = Encoder(workdir, sound_step(workdir, run.encoder_step, "run.encoder_from"), run.encoder_of)
    with reader() as checkpointer:
        tree = checkpointer.metadata(encoder.folder).item_metadata["default"].tree
    saved = {keys(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    theirs = {place: shape for place, shape in saved.items()
              if any(place[:len(root)] == root for root in PLACES[encoder.of].values())}
    mine = {place: x.shape for place, x in encoder.own(unborn).values()}
    if not mine:
        raise UserError(f"{named}: the network of this objective has no encoder to begin with")
    if not theirs:
        raise UserError(f"{named} has no encoder of a {encoder.of} (config.run.encoder_of)")
    for place in sorted(theirs.keys() | mine.keys()):
        if theirs.get(place) != mine.get(place):
            there, here = (f"of shape {shapes[place]}" if place in shapes else "missing" for shapes in (theirs, mine))
            raise UserError(f"{named} has another encoder: {'/'.join(place)} is {there} there and {here} here;"
                            f" config.model must be as in {workdir / 'config.json'}")
    return encoder


def reader() -> ocp.Checkpointer:
    """Of parts of a checkpoint."""
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(default=ocp.PyTreeCheckpointHandler()))


def keys(path: Any) -> tuple[str, ...]:
    """A path in a tree, as the names and numbers in it."""
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
