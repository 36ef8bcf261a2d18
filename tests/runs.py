"""Short runs on small sources, what they leave in their workdir, and that two have left the same."""

import json
import pathlib
import random
import re

import command
import jax
import numpy as np
import orbax.checkpoint as ocp

from sslx import log, manifest
from sslx.checkpoint import UNSEALED
from sslx.data.prepare import prepare
from sslx.workdir import LOCK

SOURCES = ("text", "mixture", "packed")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "no", "dog", "ran", "far", "away")
# An edit: steps of a tenth of a second, so that a test can do something between two of them.
UNHURRIED = """
    import time
    from sslx import log
    point = log.Logger.point
    log.Logger.point = lambda *logger, **record: (time.sleep(0.1), point(*logger, **record))[1]
""".strip()


def config(folder: pathlib.Path, source: str = "text", edit: str = "pass") -> pathlib.Path:
    """A config file: the quickstart in small, in float32, on text that lies in `folder`.

    source: "text" is read from files; "packed" is prepared tokens, documents apart; "mixture" two of the latter.
    """
    for name, n in dict(books=60, letters=20).items():
        if not (folder / name).exists():
            write(folder / name, n)
            prepare(inputs=[str(folder / name)], out=str(folder / f"{name}.tokens"), shard_tokens=4000)
    text = dict(name="text", path=str(folder / "books"), split="all", length=32)
    books, letters = (dict(name="tokens", path=str(folder / f"{name}.tokens"), length=32, documents=True)
                      for name in ("books", "letters"))
    train = {"text": text, "packed": books,
             "mixture": dict(name="mixture", sources=dict(a=books, b=letters), weights=(0.7, 0.3))}[source]
    return command.variant(folder, "quickstart", f"""
    config.model.update(depth=1, width=32, heads=1, dtype="float32")
    config.objective.sample_length = 32
    config.data = dict(batch_size=8, train={train!r})
    config.evals = dict(batch_size=8, heldout=dict(source={train!r}, batches=1))
    config.run.record_examples = True
    {edit}""")


def write(folder: pathlib.Path, n: int) -> None:
    """`n` documents of a few hundred bytes, the same each time."""
    draw = random.Random(n)
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i:02}.txt").write_text(" ".join(draw.choices(WORDS, k=draw.randrange(5, 90))))


def with_steps(steps: int, save_every: int) -> tuple[str, ...]:
    """Flags of a run that logs every step and evaluates in the middle and at the end."""
    return (f"--config.run.steps={steps}", f"--config.optim.steps={steps}", "--config.run.log_every=1",
            f"--config.run.save_every={save_every}", f"--config.run.eval_every={steps // 2}")


def points(workdir) -> dict:
    """{(step, split): what a run computes} of a log that has each point once."""
    found = log.read(workdir)[1]
    computed = {(p["step"], p["split"]): {k: p.get(k) for k in ("metrics", "tokens_seen", "lr", "epochs", "examples",
                                                                "flops_model", "bad_records", "phase")} for p in found}
    assert len(computed) == len(found)
    return computed


def newest_checkpoint(workdir) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    sealed = (path.parent.name for path in (workdir / "checkpoints").glob(f"*/{manifest.NAME}"))
    return max((int(name) for name in sealed if name.isdigit()), default=0)


def newest_step(workdir) -> int:
    """The newest training step in the log, 0 if there is none yet."""
    path = workdir / "metrics.jsonl"
    return max((p["step"] for p in log.read(workdir)[1] if p["split"] == "train"), default=0) if path.exists() else 0


def saved_state(workdir) -> dict[str, np.ndarray]:
    """The newest checkpoint, whatever devices it was saved from."""
    folder = workdir / "checkpoints" / str(newest_checkpoint(workdir)) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                             checkpointer.metadata(folder).item_metadata.tree)
        state = checkpointer.restore(folder, restore_args=whole)
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree_util.tree_leaves_with_path(state)}


def assert_identical(one, other):
    """The same log and, to the bit, the same final state: parameters, aux, optimizer."""
    assert points(one) == points(other)
    state, expected = saved_state(one), saved_state(other)
    assert state.keys() == expected.keys() and len(state) > 10
    for name, x in state.items():
        assert x.dtype == expected[name].dtype and x.tobytes() == expected[name].tobytes(), name


def examples(workdir) -> dict[int, dict[int, int]]:
    """{step: {row of the global batch: example}} of what all processes recorded.

    A step that was done again must have read the same again, whichever process it was then.
    """
    found: dict[int, dict[int, int]] = {}
    for path in (workdir / "examples").glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            rows = found.setdefault(record["step"], {})
            for row, index in zip(record["rows"], record["index"], strict=True):
                assert rows.setdefault(row, index) == index, (path, record)
    return found


def leftovers(workdir) -> list[str]:
    """What a run must not leave behind: locks, marks, temporary names, and checkpoints that it took for damaged."""
    temporary = re.compile(rf"{LOCK}|{UNSEALED}|damaged|.*\.orbax-checkpoint-tmp.*|.*\.removed|.*\.partial|\..*\.\d+")
    return sorted(str(p.relative_to(workdir)) for p in workdir.rglob("*") if temporary.fullmatch(p.name))
