"""Checkpoints and data sets are data: nothing in them is unpickled, imported or run."""

import ast
import gzip
import io
import json
import os
import pathlib
import pickle
import stat
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_formats import FORMATS, survives

import sslx
from sslx.config import UserError
from sslx.data import BadRecord, pixels, tfds

PACKAGE = pathlib.Path(sslx.__file__).parent

# Modules whose reading, or whose only use, runs what it is given.
MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "yaml", "jsonpickle",
           "runpy", "imp", "zipimport", "ctypes", "subprocess", "pty"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"import_module", "exec_module", "load_module", "read_pickle", "extract", "extractall", "system", "popen",
           "startfile", "spawnv", "execv", "execve", "execvp", "execl", "execlp"}

# (file, what is used): why it is no danger.
ALLOWED = {
    ("config.py", "import_module"): "a section of the config, which is code that the user runs, names a file of sslx",
    ("data/tfds.py", "import_module"): "the name is a literal",
    ("experiment.py", "subprocess"): "asks git for the commit; the arguments are literals",
    ("platforms.py", "ctypes"): "calls mallopt of the C library that runs already; the arguments are literals",
    ("scaling/jobs.py", "subprocess"): "starts the runs of a sweep: sslx.main on configs that it wrote itself",
}


def uses(source):
    """The dangerous modules and calls of a program."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from MODULES & {part for name in names for part in name.name.split(".")}
            case ast.ImportFrom(module=str(module), names=names):
                yield from MODULES & {module.split(".")[0], *(name.name for name in names)}
                yield from METHODS & {name.name for name in names}
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS | METHODS:
                yield name
            case ast.Call(func=ast.Attribute(attr=name)) if name in METHODS:
                yield name
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=value)) if value is not False:
                yield "allow_pickle"


def test_nothing_in_the_package_runs_what_it_reads():
    found = {(path.relative_to(PACKAGE).as_posix(), use) for path in PACKAGE.rglob("*.py")
             for use in uses(path.read_text())}
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) <= found  # no reason outlives its use


@pytest.mark.parametrize("program, use", [
    ("import pickle", "pickle"), ("from pickle import loads", "pickle"), ("import torch.nn", "torch"),
    ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"), ("eval('1')", "eval"),
    ("archive.extractall()", "extractall"), ("os.system('x')", "system"), ("from os import system", "system"),
    ("import yaml\nyaml.load(f)", "yaml"), ("def f():\n    import marshal", "marshal")])
def test_what_would_is_seen(program, use):
    assert use in set(uses(program))


# ---- bombs


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def bombs(mark):
    """Bytes that make the folder `mark` if a reader runs what it reads."""
    array = np.empty(1, object)
    array[0] = Bomb(mark)
    npy = io.BytesIO()
    np.save(npy, array, allow_pickle=True)
    code = f"__import__('os').mkdir({str(mark)!r})"
    return {"pickle": pickle.dumps(Bomb(mark)), "npy": npy.getvalue(), "python": code.encode(),
            "gzip": gzip.compress(pickle.dumps(Bomb(mark))),
            "json": json.dumps({"py/reduce": [{"py/type": "os.mkdir"}, [str(mark)]]}).encode(),
            "yaml": f"!!python/object/apply:os.mkdir [{str(mark)!r}]".encode()}


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path):
    mark = tmp_path / "mark"
    found = bombs(mark)
    for load in (lambda: pickle.loads(found["pickle"]), lambda: np.load(io.BytesIO(found["npy"]), allow_pickle=True),
                 lambda: pickle.loads(gzip.decompress(found["gzip"])), lambda: eval(found["python"])):
        load()
        mark.rmdir()


FOLDERS = {(write, read): name for name, (write, _, read) in FORMATS.items()}  # of several formats, some


@pytest.mark.parametrize("name", FOLDERS.values())
def test_no_bomb_in_a_folder_goes_off(name, tmp_path):
    """In place of each of its files in turn."""
    write, _, read = FORMATS[name]
    folder, mark = tmp_path / "data", tmp_path / "mark"
    folder.mkdir()
    write(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for bomb in bombs(mark).values():
            path.write_bytes(bomb)
            survives(read, folder)
            assert not mark.exists()
        path.write_bytes(content)


@pytest.mark.filterwarnings("ignore")  # of what the failed reads leave behind
def test_no_bomb_in_a_checkpoint_goes_off(tmp_path):
    """As the newest step is restored from it, by the part that restores it."""
    state, mark = {"params": {"w": jnp.arange(6.0)}, "step": jnp.int32(1)}, tmp_path / "mark"
    folder = tmp_path / "checkpoints"
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.StandardSave(state), custom_metadata={"bad_records": 0})
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) > 5
    failed = 0
    for path in files:
        content = path.read_bytes()
        path.write_bytes(bombs(mark)["pickle"])
        try:
            with ocp.CheckpointManager(folder) as manager:
                manager.restore(1, args=ocp.args.StandardRestore(state))
                manager.metadata(1)
        except Exception:  # of many types; the manifest of a checkpoint is why none reaches a user
            failed += 1
        assert not mark.exists()
        path.write_bytes(content)
    assert failed > 2


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    """Pillow hands PostScript to an interpreter."""
    mark, program = tmp_path / "mark", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\nmkdir {mark}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(BadRecord, match="not an image"):
        pixels.decode(script, 4, "x")
    assert not mark.exists()
    with pytest.raises(Exception), pixels.Image.open(io.BytesIO(script)) as image:  # noqa: B017
        image.load()
    assert mark.exists()  # by Pillow, left to itself


@pytest.mark.parametrize("features", [{"pythonClassName": "evil_feature.Image", "jsonFeature": {"json": "{}"}},
                                      {"type": "evil_feature.Image", "content": {}}])
def test_no_module_is_imported_for_a_tfds_feature(tmp_path, monkeypatch, features):
    """TFDS imports the module of the class that features.json names, from wherever Python finds it."""
    library = pytest.importorskip("tensorflow_datasets")
    folder, mark = tmp_path / "evil" / "1.0.0", tmp_path / "mark"
    folder.mkdir(parents=True)
    (tmp_path / "evil_feature.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (folder / "features.json").write_text(json.dumps(features))
    info = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil_feature", raising=False)
    for dataset in ("evil", "evil:1.0.0", "evil/x:1.0.0", str(folder)):
        with pytest.raises(UserError, match="evil_feature"):
            tfds.make(dataset=dataset, data_dir=str(tmp_path))
        assert "evil_feature" not in sys.modules and not mark.exists()
    with pytest.raises(Exception):  # noqa: B017
        library.builder_from_directory(str(folder))
    assert mark.exists()  # by TFDS, left to itself
