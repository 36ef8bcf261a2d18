"""python -m sslx.checkpoint verify W | list W | prune W --keep N

verify  reads every checkpoint of the workdir W and compares it with its manifest. Status 1 if one is damaged.
list    shows their steps, sizes and times.
prune   removes all but the newest N sound ones, and what is in W/damaged; refused while W is trained in.

Checkpoints: Orbax, saved in the background, restored onto any mesh.

W/checkpoints/STEP is complete when its manifest (sslx/manifest.py) is written, after all processes have written their
files; until then W/checkpoints/UNSEALED names the step, so that a save that was cut off is told from a manifest that
was lost. What run.keep leaves no room for goes only when the newest step is complete.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import errno
import itertools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping

import jax
import orbax.checkpoint as ocp

from sslx import distributed, manifest
from sslx.command import Parser, told
from sslx.config import UserError, nearest
from sslx.state import TrainState
from sslx.workdir import content, locked, write_atomically

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNSEALED = "UNSEALED"  # holds the step that is being saved


class Checkpoints:
    """The checkpoints of one workdir, of which the newest is sound.

    The newest `keep` stay, those of multiples of `keep_every` and of the steps `keep_at`, and the one of the best value
    of a metric: `keep_best` is "min:METRIC" or "max:METRIC". Raises UserError if all are damaged.
    """

    def __init__(self, workdir: pathlib.Path, keep: int, keep_every: int | None = None, keep_best: str | None = None,
                 keep_at: Collection[int] = ()):
        self.workdir, self.keep, self.keep_every, self.keep_at = workdir, keep, keep_every, keep_at
        self.best, _, self.metric = (keep_best or "").partition(":")
        self.folder = workdir.absolute() / "checkpoints"
        self.repaired()
        # All are kept as far as Orbax knows: it would remove the old before the new has its manifest.
        self.manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=True))
        self.sealer = concurrent.futures.ThreadPoolExecutor(1)
        self.sealing: concurrent.futures.Future[None] | None = None
        self.saved_at = time.monotonic()

    def repaired(self) -> None:
        """Leaves a sound step as the newest, if there is any, on the disk that all processes share."""
        if jax.process_index() == 0:
            repair(self.workdir)
        distributed.barrier("the newest checkpoint is sound")

    def latest(self) -> int | None:
        """The newest step that was saved completely."""
        return self.manager.latest_step()

    def newest_sound(self) -> int | None:
        """The newest step, waited for and compared with its manifest."""
        with self.explained():
            self.wait()
        distributed.barrier("the last checkpoint is complete")
        self.repaired()
        self.manager.reload()
        return self.latest()

    def save(self, state: TrainState, bad_records: int = 0, score: float | None = None) -> None:
        """Starts saving; the device buffers are copied before this returns, so the state may be donated.

        bad_records: passed over so far. score: of `keep_best`. Raises UserError, here or later, if no space is left.
        """
        step = int(state.step)
        if step not in self.manager.all_steps():
            with self.explained():
                self.wait()
                if jax.process_index() == 0:
                    write_atomically(self.folder / UNSEALED, str(step))
                self.manager.save(step, args=ocp.args.StandardSave(state._asdict()),
                                  custom_metadata={"bad_records": bad_records, "score": score})
                if jax.process_index() == 0:
                    self.sealing = self.sealer.submit(self.seal, step)
        self.saved_at = time.monotonic()

    def seal(self, step: int) -> None:
        """When all processes have saved `step`: writes its manifest, and removes the steps that are too many."""
        self.manager.wait_until_finished()
        saved = self.folder / str(step)
        write_atomically(saved / manifest.NAME, manifest.of(saved))
        (self.folder / UNSEALED).unlink()
        there = steps(self.folder)
        scores = {s: score for s in there if self.best and (score := self.scored(s)) is not None}
        for old in set(there) - kept(there, self.keep, self.keep_every, self.best, scores, self.keep_at):
            remove(self.folder / str(old))

    def scored(self, step: int) -> float | None:
        """What `save` was told of a step."""
        found = json.loads((self.folder / str(step) / "_CHECKPOINT_METADATA").read_text())
        return found["custom_metadata"].get("score")

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The metric that `keep_best` is about, None if nothing was evaluated. Raises UserError if it is not there."""
        if not self.best or not metrics:
            return None
        if self.metric not in metrics:
            raise UserError(f"config.run.keep_best names {self.metric!r}, which no evaluation of config.evals gives"
                            f"{nearest(self.metric, metrics)}")
        return float(metrics[self.metric])

    def wait(self) -> None:
        """Returns when what was started is complete."""
        sealing, self.sealing = self.sealing, None
        if sealing:
            sealing.result()
        self.manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, sharded as `abstract` says, whatever mesh it was saved from."""
        return TrainState(**self.manager.restore(step, args=ocp.args.StandardRestore(abstract._asdict())))

    def bad_records(self, step: int) -> int:
        """How many bad records had been passed over by `step`."""
        return self.manager.metadata(step).custom_metadata["bad_records"]

    def close(self) -> None:
        """Waits until what was started is saved. Raises UserError if no space is left."""
        with self.explained():
            self.wait()
            self.manager.close()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A full disk as a UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not no_space(error):
                raise
            saved = max(complete(self.folder), default=None)
            last = "no checkpoint is complete" if saved is None else f"the last complete checkpoint is of step {saved}"
            raise UserError(f"a checkpoint could not be saved in {self.workdir}: there is no space left; {last}."
                            " Free some space (or keep fewer checkpoints: run.keep), then run the same command"
                            " again") from error


def no_space(error: Exception) -> bool:
    """Whether a disk, a quota or a limit on the size of files was full. Orbax hands on TensorStore's words."""
    return getattr(error, "errno", None) in NO_SPACE or any(f"[os_error_code='{n}']" in str(error) for n in NO_SPACE)


def steps(folder: pathlib.Path) -> list[int]:
    """The steps saved in `folder`, oldest first, complete or not."""
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit() and p.is_dir())


def kept(steps: list[int], keep: int, keep_every: int | None, best: str, scores: Mapping[int, float],
         at: Collection[int] = ()) -> set[int]:
    """Which of the steps, oldest first, stay: the newest, multiples, those of `at`, the "min" or "max" of `scores`."""
    chosen = {"min": min, "max": max}[best](scores, key=scores.__getitem__) if scores else None
    return {step for step in steps
            if step in steps[-keep:] or step in at or step == chosen
            or (keep_every is not None and step % keep_every == 0)}


def unsealed(folder: pathlib.Path) -> int | None:
    """The step whose saving has not ended: it goes on in another process, or was cut off."""
    step = content(folder / UNSEALED) or ""
    return int(step) if step.isdigit() and not (folder / step / manifest.NAME).exists() else None


def complete(folder: pathlib.Path) -> list[int]:
    """The steps saved in `folder` whose saving has ended, oldest first."""
    return [step for step in steps(folder) if step != unsealed(folder)]


def config_of(workdir: pathlib.Path, field: str) -> pathlib.Path:
    """The file with the config of the run that config.`field` names. Raises UserError if there is no such run."""
    if not (path := workdir / "config.json").exists():
        raise UserError(f"config.{field}={str(workdir)!r} is no workdir of a run: {path} does not exist")
    return path


def sound_step(workdir: pathlib.Path, step: int | None, field: str) -> int:
    """`step`, or the newest, of the checkpoints of a run that config.`field` names.

    Raises UserError if there is no such run or checkpoint, or if it is damaged.
    """
    config_of(workdir, field)
    folder, named = workdir / "checkpoints", f"config.{field}={str(workdir)!r}"
    saved = complete(folder)
    if not saved or (step is not None and step not in saved):
        which = "" if step is None else (f" of step {step}; it has {', '.join(map(str, saved)) or 'none'}. Keep it with"
                                         f" --config.run.keep_at=({step},)")
        raise UserError(f"{named} has no checkpoint{which}")
    step = saved[-1] if step is None else step
    if jax.process_index() == 0 and (damage := manifest.damage(folder / str(step))):
        raise UserError(f"the checkpoint of step {step} in {named} is damaged ({'; '.join(damage)}): take another step,"
                        " or put the files back from a copy")
    return step


def remove(folder: pathlib.Path) -> None:
    """Removes a checkpoint; half removed, it has a name that is no step's."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.removed")))


def repair(workdir: pathlib.Path) -> None:
    """Leaves the newest sound step as the newest: removes what was cut off, moves damaged ones to W/damaged.

    Says so on the terminal. Raises UserError if there are steps and none is sound: nothing is moved then.
    """
    folder = workdir / "checkpoints"
    cut_off = unsealed(folder)
    if cut_off is not None and (folder / str(cut_off)).exists():
        remove(folder / str(cut_off))
        print(f"the checkpoint of step {cut_off} was cut off before it was complete: removed", flush=True)
    for leftover in (*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob("*.removed")):
        shutil.rmtree(leftover)
    (folder / UNSEALED).unlink(missing_ok=True)

    damaged: dict[int, str] = {}
    for step in reversed(steps(folder)):
        found = manifest.damage(folder / str(step))
        if not found:
            break
        damaged[step] = "; ".join(found)
    else:
        if damaged:
            raise UserError(f"every checkpoint in {folder} is damaged: "
                            + ", ".join(f"step {step} ({what})" for step, what in damaged.items())
                            + ". Put back the files that are named, from a copy, or begin anew in another --workdir")
    for step, what in damaged.items():
        print(f"the checkpoint of step {step} is damaged and is not used: {what}. Moved to"
              f" {set_aside(workdir, folder / str(step))}", flush=True)


def set_aside(workdir: pathlib.Path, checkpoint: pathlib.Path) -> pathlib.Path:
    """Moves a checkpoint to W/damaged/STEP, or STEP.2, STEP.3 ... if there is one. Returns where it is."""
    (workdir / "damaged").mkdir(exist_ok=True)
    names = itertools.chain([checkpoint.name], (f"{checkpoint.name}.{i}" for i in itertools.count(2)))
    free = next(path for path in (workdir / "damaged" / name for name in names) if not path.exists())
    return checkpoint.rename(free)


def verify(workdir: pathlib.Path) -> int:
    """Prints what is wrong with each step. Returns 1 if one is damaged, else 0."""
    folder, status = workdir / "checkpoints", 0
    for step in steps(folder):
        found = manifest.damage(folder / str(step))
        if not found:
            print(f"step {step}: sound")
        elif step == unsealed(folder):
            print(f"step {step}: not complete, it is being saved or was cut off")
        else:
            status = 1
            print(f"step {step}: damaged", *found, sep="\n    ")
    return status


def show(workdir: pathlib.Path) -> int:
    """Prints step, MB and time of each checkpoint."""
    for step in steps(workdir / "checkpoints"):
        saved = workdir / "checkpoints" / str(step)
        megabytes = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()) / 1e6
        date = datetime.datetime.fromtimestamp(saved.stat().st_mtime)  # its last entry is the manifest
        print(f"step {step:>9}  {megabytes:>12,.1f} MB  {date:%Y-%m-%d %H:%M:%S}")
    return 0


def prune(workdir: pathlib.Path, keep: int) -> int:
    """Removes all steps but the newest `keep` sound ones, and W/damaged. Raises UserError if no step is sound."""
    folder = workdir / "checkpoints"
    saved = complete(folder)[::-1]
    sound = list(itertools.islice((s for s in saved if not manifest.damage(folder / str(s))), keep))
    if not sound:
        raise UserError(f"no checkpoint in {folder} is sound: nothing was removed")
    for path in (*(folder / str(step) for step in saved if step not in sound), *(workdir / "damaged").glob("*")):
        remove(path)
        print(f"removed {path}")
    return 0


@told
def main(arguments: list[str]) -> int:
    """Parses the command and does it. Returns 1 if `verify` finds damage, 2 for a mistake, else 0."""
    parser = Parser(prog="python -m sslx.checkpoint", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("verify", "list", "prune"))
    parser.add_argument("workdir", type=pathlib.Path, help="the --workdir of a run")
    parser.add_argument("--keep", type=int, metavar="N", help="how many sound checkpoints prune leaves")
    given = parser.parse_args(arguments)
    if (given.keep is None) == (given.command == "prune"):
        parser.error("prune takes --keep=N, and only prune does")
    if given.keep is not None and given.keep < 1:
        parser.error(f"--keep is {given.keep}; it takes a number of checkpoints, at least 1")
    if not steps(given.workdir / "checkpoints"):
        raise UserError(f"there is no checkpoint in {given.workdir / 'checkpoints'}: the command takes the"
                        " --workdir of a run that has saved one")
    match given.command:
        case "verify":
            return verify(given.workdir)
        case "list":
            return show(given.workdir)
    with locked(given.workdir):
        return prune(given.workdir, given.keep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
