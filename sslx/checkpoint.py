"""Checkpoints: Orbax, saved in the background, restored onto any mesh; and the config a workdir belongs to."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from sslx import distributed
from sslx.config import UserError
from sslx.state import TrainState

# What may differ between a run and its resumption: nothing of it changes what is computed.
FREE = ("mesh", "evals", "data.workers", "run.overlap", "run.log_every", "run.eval_every", "run.save_every", "run.keep")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        self.workdir = workdir
        self.manager = ocp.CheckpointManager(
            workdir.absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True))

    def latest(self) -> int | None:
        """The newest step that was saved completely."""
        return self.manager.latest_step()

    def save(self, state: TrainState, bad_records: int = 0) -> None:
        """Starts saving; the device buffers are copied before this returns, so the state may be donated.

        bad_records: passed over so far. Raises UserError, here or later, if no space is left.
        """
        step = int(state.step)
        if step not in self.manager.all_steps():
            with self.explained():
                self.manager.save(step, args=ocp.args.StandardSave(state._asdict()),
                                  custom_metadata={"bad_records": bad_records})

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, sharded as `abstract` says, whatever mesh it was saved from."""
        return TrainState(**self.manager.restore(step, args=ocp.args.StandardRestore(abstract._asdict())))

    def bad_records(self, step: int) -> int:
        """How many bad records had been passed over by `step`."""
        return self.manager.metadata(step).custom_metadata["bad_records"]

    def close(self) -> None:
        """Waits until what was started is saved. Raises UserError if no space is left."""
        with self.explained():
            self.manager.wait_until_finished()
            self.manager.close()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A full disk as a UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not no_space(error):
                raise
            saved = self.latest()
            last = "no checkpoint is complete" if saved is None else f"the last complete checkpoint is of step {saved}"
            raise UserError(f"a checkpoint could not be saved in {self.workdir}: there is no space left; {last}."
                            " Free some space (or keep fewer checkpoints: run.keep), then run the same command"
                            " again") from error


def no_space(error: Exception) -> bool:
    """Whether a disk, a quota or a limit on the size of files was full. Orbax hands on TensorStore's words."""
    return getattr(error, "errno", None) in NO_SPACE or any(f"[os_error_code='{n}']" in str(error) for n in NO_SPACE)


def claim(workdir: pathlib.Path, config: dict[str, Any], fingerprint: str) -> None:
    """Binds a new workdir to its config and data, or checks that an old one belongs to them.

    Process 0 binds it; the others find it bound, and so are told if their config or their folder is another. Raises
    UserError with the differences if it holds a run of another config or of other data.
    """
    path = workdir / "config.json"
    mine = flat(config) | {"data fingerprint": fingerprint}
    if jax.process_index() == 0 and not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(mine, indent=2))
    distributed.barrier("the workdir is bound")
    if not path.exists():
        raise UserError(f"process 0 has just written {path}, and here it does not exist: --workdir takes a folder that"
                        " all processes share, such as one on NFS or a mounted bucket")
    theirs = json.loads(path.read_text())
    changed = {k: (theirs.get(k), mine.get(k)) for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k)}
    changed = {k: v for k, v in changed.items() if not any(k == f or k.startswith(f + ".") for f in FREE)}
    if changed:
        lines = "; ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in changed.items())
        raise UserError(f"{workdir} holds a run of another config ({lines}). Use another --workdir, or the config"
                        f" of that run ({path})")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested dicts, tuples as lists, as JSON would give them back."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[prefix + key] = list(value) if isinstance(value, tuple) else value
    return items


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
