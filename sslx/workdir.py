"""The folder of a run: which config it belongs to, and who writes in it."""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import jax

from sslx import distributed
from sslx.config import UserError

# What may differ between a run and its resumption: it changes nothing of what is computed (a branch computes what a run
# without a trunk does), or only what is done about a bad step.
FREE = ("mesh", "evals", "data.workers", "run.overlap", "run.log_every", "run.eval_every", "run.eval_first",
        "run.save_every", "run.save_minutes", "run.keep", "run.keep_every", "run.keep_best", "run.keep_at",
        "run.trunk", "run.trunk_step", "run.on_bad_step", "run.spike", "run.max_bad_steps", "run.on_collapse",
        "run.hang_s", "run.check_replicas_every", "run.recompute_every", "run.record_examples")

TEMPORARY = re.compile(r"\..+\.\d+")  # of `write_atomically`
LOCK = "LOCK"
VANISHED = "is gone: the workdir was removed, moved or unmounted. Put it back, then run the same command again"
BEAT_S = 2.0    # how often the owner of a lock says that it is alive
STALE_S = 20.0  # after how long a silence it is taken for dead: a file server may be slow


def claim(workdir: pathlib.Path, config: dict[str, Any], fingerprint: str) -> None:
    """Binds a new workdir to its config and data, or checks that an old one belongs to them.

    Process 0 binds it; the others find it bound, and so are told if their config or their folder is another. Raises
    UserError with the differences if it holds a run of another config or of other data.
    """
    path, checkpoints = workdir / "config.json", workdir / "checkpoints"
    mine = identity(config, fingerprint)
    if jax.process_index() == 0 and not path.exists():
        if checkpoints.exists() and any(checkpoints.iterdir()):
            raise UserError(f"{checkpoints} holds checkpoints, and {path}, which says of what, is missing. Put it back,"
                            " or use another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(mine, indent=2))
    distributed.barrier("the workdir is bound")
    if not path.exists():
        raise UserError(f"process 0 has just written {path}, and here it does not exist: --workdir takes a folder that"
                        " all processes share, such as one on NFS or a mounted bucket")
    if changed := difference(bound(path), mine, FREE):
        raise UserError(f"{workdir} holds a run of another config ({changed}). Use another --workdir, or the config"
                        f" of that run ({path})")


def identity(config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What a workdir is bound to."""
    return flat(config) | {"data fingerprint": fingerprint}


def difference(theirs: dict[str, Any], mine: dict[str, Any], free: Collection[str]) -> str:
    """In words, which fields outside of `free` differ between two flat configs; "" if none does."""
    changed = [k for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k)
               and not any(k == f or k.startswith(f + ".") for f in free)]
    return "; ".join(f"{k} was {theirs.get(k)!r}, now {mine.get(k)!r}" for k in changed)


def bound(path: pathlib.Path) -> dict[str, Any]:
    """The config in W/config.json, flat. Raises UserError if it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Put it back, or use another --workdir") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object. Put it back, or use another --workdir")
    return found


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
    """Writes a file whole or not at all. What a kill leaves of it goes when the workdir is locked again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes this process the only writer of `workdir` meanwhile; of several processes of a run, process 0.

    W/LOCK holds host, process and time of the owner, who touches it every BEAT_S. A lock is taken over if its process
    is known to be dead, or was not touched for STALE_S. Raises UserError if another run holds it, and for whatever
    fails when the folder has vanished.
    """
    path, mine = workdir / LOCK, owner()
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        while not created(path, mine):
            take_over(path)
        for leftover in (*workdir.glob(".*"), *workdir.glob("checkpoints/.*")):
            if TEMPORARY.fullmatch(leftover.name):
                leftover.unlink()
        done = threading.Event()
        threading.Thread(target=beat, args=(path, mine, done), daemon=True).start()
    distributed.barrier("the workdir is locked")
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or path.exists():
            raise
        raise UserError(f"{path} {VANISHED}") from error
    finally:
        if jax.process_index() == 0:
            done.set()
            if content(path) == mine:
                path.unlink()


def owner() -> str:
    """Host, process, the time this began as the kernel counts it, and as people do."""
    return f"{socket.gethostname()} {os.getpid()} {started(os.getpid())} {time.strftime('%Y-%m-%dT%H:%M:%S%z')}"


def started(process: int) -> str:
    """When a process of this machine began, in ticks of its kernel: numbers of processes come again. "" if it is none.

    "?" where the kernel does not tell.
    """
    try:
        # The name of the program, in parentheses, may hold anything.
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "" if pathlib.Path("/proc/self/stat").exists() else "?"


def created(path: pathlib.Path, text: str) -> bool:
    """Whether `path` did not exist, and now holds `text`."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def content(path: pathlib.Path) -> str | None:
    """What is in a file, None if there is none."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def take_over(path: pathlib.Path) -> None:
    """Removes the lock of a dead owner, after a wait if it cannot be asked. Raises UserError if it lives."""
    theirs, touched = content(path), modified(path)
    if theirs is None:
        return  # given back meanwhile
    host, process, began, *_ = *theirs.split(" "), "", ""
    if host == socket.gethostname() and process.isdigit():
        alive = started(int(process)) == began
    else:
        print(f"{path} is of {described(theirs)}: waiting {STALE_S:.0f} s for a sign of life", flush=True)
        end = time.monotonic() + STALE_S
        while not (alive := modified(path) != touched) and time.monotonic() < end:
            time.sleep(BEAT_S / 4)
    if content(path) != theirs:
        return
    if alive:
        age = max(0.0, time.time() - modified(path))
        raise UserError(f"another run writes in {path.parent}: {described(theirs)}, alive {age:.0f} s ago ({path})."
                        " Stop it, or use another --workdir")
    path.unlink(missing_ok=True)


def described(lock: str) -> str:
    host, process, _, began, *_ = *(lock or "nobody").split(" "), "?", "?", "?"
    return f"process {process} on {host}, begun {began}"


def modified(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def beat(path: pathlib.Path, mine: str, done: threading.Event) -> None:
    """In a thread: touches the lock until `done`. Ends the run if it cannot, or if the lock became another's."""
    touched = time.monotonic()
    while not done.wait(BEAT_S):
        try:
            theirs = content(path)
            if theirs == mine:
                os.utime(path)
                touched = time.monotonic()
                continue
            lost = (VANISHED if theirs is None else "is no longer of this run: another one began to write here while"
                    " this one did not answer. It goes on; this one ends")
        except OSError as error:
            if time.monotonic() - touched < STALE_S:  # a file server may come back
                continue
            lost = f"cannot be touched ({error.strerror}), and another run may take {path.parent} over: this one ends"
        if not done.is_set():
            distributed.abort(UserError.status, f"error: {path} {lost}")
        return
