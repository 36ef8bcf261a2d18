"""Branches: runs that go on from a step of another run, their trunk, as if they had been one run from the start.

While its learning rate is constant a run with schedule="wsd" is the beginning of every shorter and longer one. So one
trunk that keeps the right steps (run.keep_at) gives a fully annealed run for each budget of tokens, and a branch pays
for its decay alone (Hu et al. 2024, Hägele et al. 2024).
"""

import math
import pathlib
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from sslx import log, workdir
from sslx.checkpoint import config_of, sound_step
from sslx.config import UserError
from sslx.experiment import Run
from sslx.log import Record
from sslx.state import TrainState

# What a branch may have otherwise than its trunk: where it ends, and how.
FREE = (*workdir.FREE, "run.steps", "optim.steps", "optim.schedule", "optim.decay", "optim.final")


class Trunk(NamedTuple):
    """A step of the run in `workdir` that another run begins with."""

    workdir: pathlib.Path
    step: int

    @property
    def folder(self) -> pathlib.Path:
        return self.workdir.absolute() / "checkpoints"

    def restore(self, abstract: TrainState) -> tuple[TrainState, int]:
        """(state, bad records passed over) at the step, sharded as `abstract` says; nothing is changed there."""
        with ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
            state = manager.restore(self.step, args=ocp.args.StandardRestore(abstract._asdict()))
            return TrainState(**state), manager.metadata(self.step).custom_metadata["bad_records"]

    def history(self) -> list[Record]:
        """Events and points of the trunk's log up to the step."""
        return [r for r in log.records(self.workdir) if r["kind"] != "run" and r["step"] <= self.step]


def trunk_of(run: Run) -> Trunk | None:
    """What a run branches from, if it does. Raises UserError for a half of it."""
    if run.trunk is None and run.trunk_step is None:
        return None
    if run.trunk is None or run.trunk_step is None:
        raise UserError(f"config.run.trunk is {run.trunk!r} and config.run.trunk_step {run.trunk_step!r}: a branch"
                        " takes both, the workdir of a run and a step that is saved there; another run takes neither")
    if run.trunk_step >= run.steps:
        raise UserError(f"config.run.trunk_step={run.trunk_step} leaves nothing to train: a branch takes more steps"
                        f" (config.run.steps={run.steps}) than its trunk has done")
    return Trunk(pathlib.Path(run.trunk), run.trunk_step)


def check(trunk: Trunk, config: dict[str, Any], fingerprint: str) -> None:
    """Raises UserError if a run of this config and data would not have come to the trunk's step as the trunk did."""
    theirs, mine = workdir.bound(config_of(trunk.workdir, "run.trunk")), workdir.identity(config, fingerprint)
    if changed := workdir.difference(theirs, mine, FREE):
        raise UserError(f"config.run.trunk={str(trunk.workdir)!r} is a run of another config ({changed}). A branch has"
                        " the config of its trunk up to run.steps and optim.steps, schedule, decay and final")
    for whose, conf in {"the trunk": theirs, "this branch": mine}.items():
        if trunk.step > (last := stable_until(conf)):
            raise UserError(f"config.run.trunk_step={trunk.step} is not in the stable phase of {whose}, whose learning"
                            f" rate decays from step {last} on (optim.schedule={conf.get('optim.schedule')!r}); branch"
                            " at an earlier step of a run with optim.schedule='wsd' or 'constant'")
    sound_step(trunk.workdir, trunk.step, "run.trunk")


def stable_until(conf: dict[str, Any]) -> float:
    """The last step before the learning rate of a flat config decays."""
    match conf.get("optim.schedule"):
        case "constant":
            return math.inf
        case "wsd":
            return conf["optim.steps"] - conf.get("optim.decay", 0)
    return conf.get("optim.warmup", 0)
