"""Every file format that the project reads, damaged at random: a named error or a result, in bounded time and memory.

What a damaged file gives is for test_records.py. Examples are drawn alike in every run.
"""

import datetime
import functools
import gzip
import io
import itertools
import json
import math
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
from bounds import within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sslx import log, manifest, report, workdir
from sslx.config import UserError
from sslx.data import BadRecord, arrayrecord, gcide, idx, pipeline, pixels, prepare, spam_assassin, tokenize, tokens

FUZZ = settings(derandomize=True, database=None, max_examples=50, deadline=datetime.timedelta(seconds=5),
                suppress_health_check=list(HealthCheck))

ABSURD = ["[" * 20_000, '{"a":' * 20_000, "9" * 5000, "1e999", "NaN", "", "\0" * 64, '"\\ud800"', "\ufeff{}", "0"]


# ---- damages


@st.composite
def damaged(draw, content):
    """Bytes of a file after one to four damages."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("flip", "flip", "cut", "zero", "insert", "number", "number", "repeat"))):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "zero":
                data[at : at + 16] = bytes(len(data[at : at + 16]))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "number":  # a length or a size, if one stands there
                number = draw(st.sampled_from((b"\xff" * 4, b"\x7f" + b"\xff" * 7, b"\x00\x00\x00\x80", b"999999999")))
                data[at : at + len(number)] = number
            case "repeat":
                data[at:at] = data[at : at + 32]
    return bytes(data)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=8),
              st.sampled_from((0, -1, 2**31, 2**40, 10**299, 1e308, 5e-324, "../../etc/passwd", "/dev/zero", "|O8"))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5)


@st.composite
def altered(draw, value):
    """A JSON value with one value in it replaced, left out or doubled."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    changed = value.copy()
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    match draw(st.sampled_from(("inside", "inside", "inside", "left out", "doubled"))):
        case "inside":
            changed[key] = draw(altered(value[key]))
        case "left out":
            del changed[key]
        case "doubled" if isinstance(value, dict):
            changed[draw(st.text(max_size=4))] = value[key]
        case "doubled":
            changed.append(value[key])
    return changed


# ---- formats: (the file in the folder, what reads it)


def rows(**section):
    source = pipeline.source(section, "config.data", "skip")
    stream = pipeline.stream(source, seed=0)
    return stream.rows(np.arange(min(8, len(source.examples))))


def write_idx(folder):
    for name, array in (("t10k-images-idx3-ubyte", np.ones((9, 4, 5), np.uint8)),
                        ("t10k-labels-idx1-ubyte", np.arange(9, dtype=np.uint8))):
        content = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / name).write_bytes(content)


def write_idx_gz(folder):
    write_idx(folder)
    for path in list(folder.iterdir()):
        path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def write_records(folder):
    rng = np.random.default_rng(0)
    examples = [{"tokens": rng.integers(0, 99, 16, np.int32), "label": np.int32(i % 3)} for i in range(9)]
    arrayrecord.write(str(folder), examples, num_classes=3, vocab_size=99)


def write_images(folder):
    (folder / "a").mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 8, 3), i, np.uint8)).save(folder / "a" / f"{i}.png")


def write_text(folder):
    lines = [json.dumps({"text": f"document {i}\n" * 3, "label": i % 2}) + "\n" for i in range(9)]
    (folder / "x.jsonl").write_text("".join(lines))
    (folder / "y.txt").write_text("line é of text\n" * 9)


def write_tokenizer(folder):
    write_text(folder)
    tokenize.train([str(folder / "y.txt")], 370, str(folder / "bpe.json"))


def write_tokens(folder):
    write_tokenizer(folder)
    prepare.prepare(inputs=[str(folder / "x.jsonl"), str(folder / "y.txt")], out=str(folder / "out"), shard_tokens=90,
                    tokenizer=str(folder / "bpe.json"), heldout=0.3)


def begin_tokens(folder):
    write_tokens(folder)
    (folder / "out" / "manifest.json").unlink()


def write_log(folder):
    run = {"kind": "run", "schema_version": 1, "run_id": "r", "config": {"model": {"width": 8}}, "total_steps": 9,
           "n_params": 12, "flops_per_example": {"encoder": 3.0}, "versions": {"jax": "0"}, "seed": 0}
    points = [{"kind": "point", "step": s, "split": split, "tokens_seen": 8 * s, "flops_model": 10**13 * s, "lr": 1e-3,
               "wall_s": float(s), "spent": {"step": s / 2}, "tokens_per_s": 7.0, "mfu": 0.1,
               "metrics": {name: 1 / s, f"{name}@raw": 2.0}}
              for s in (1, 2, 3) for split, name in (("train", "loss"), ("eval", "knn/accuracy"))]
    events = [{"kind": "event", "event": "skipped", "step": 2, "why": "the loss of step 2 is not finite"},
              {"kind": "event", "event": "rolled back", "step": 1, "lost_s": 1.0, "bad_step": 3, "passed_over": [2, 3],
               "why": "the loss of step 3 is not finite"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (run, *points, *events)))
    report.save_samples(folder, 3, {"views": np.ones((2, 4, 4, 1)), "text": np.ones((2, 3), np.int32)})


def read_log(folder):
    log.summary(folder)
    report.write(folder)


def write_checkpoint(folder):
    (folder / "array").write_bytes(b"12345678")
    (folder / manifest.NAME).write_text(manifest.of(folder))


def write_workdir(folder):
    workdir.claim(folder, {"run": {"steps": 3}, "mesh": {"data": 1}}, "f")


def write_mails(folder):
    with tarfile.open(folder / "mails.tgz", "w:gz") as archive:
        for i in range(5):
            content = json.dumps({"group": "spam-1", "text": f"Subject: {i}\n\nmoney {i}"}).encode()
            member = tarfile.TarInfo(f"package/data/spam-1/{i}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_dictionary(folder):
    entries = "".join(f"Word{i} \\Word{i}\\, n.\n   A word.\n\n" for i in range(50))
    (folder / "gcide.dict.dz").write_bytes(gzip.compress(entries.encode()))


def read_tokens(folder):
    tokens.damage(folder / "out")
    for split in ("train", "heldout"):
        rows(name="tokens", path=str(folder / "out"), split=split, length=8, documents=True)


def prepare_again(folder):
    """From the plan and the records of the shards that are written."""
    prepare.prepare(inputs=[str(folder / "x.jsonl"), str(folder / "y.txt")], out=str(folder / "out"), shard_tokens=90,
                    tokenizer=str(folder / "bpe.json"), heldout=0.3)


def prepare_text(folder, shard_tokens):
    shutil.rmtree(folder / "out", ignore_errors=True)
    files = [path for path in folder.iterdir() if path.stat().st_size]
    prepare.prepare(inputs=[str(path) for path in files], out=str(folder / "out"), shard_tokens=shard_tokens)


FORMATS = {
    "idx": (write_idx, "t10k-images-idx3-ubyte", lambda f: rows(name="idx", path=str(f), split="test")),
    "idx.gz": (write_idx_gz, "t10k-labels-idx1-ubyte.gz", lambda f: rows(name="idx", path=str(f), split="test")),
    "array record": (write_records, "00000.array_record", lambda f: rows(name="arrayrecord", path=str(f))),
    "info.json": (write_records, "info.json", lambda f: rows(name="arrayrecord", path=str(f))),
    "folder": (write_images, "a/1.png", lambda f: rows(name="folder", path=str(f), size=4)),
    "text": (write_text, "y.txt", lambda f: rows(name="text", path=str(f), split="all", length=8)),
    "jsonl": (write_text, "x.jsonl", lambda f: rows(name="text", path=str(f / "x.jsonl"), split="all", length=8,
                                                    labels="field")),
    "jsonl to prepare": (write_text, "x.jsonl", lambda f: prepare_text(f, 5000)),
    "text to prepare": (write_text, "y.txt", lambda f: prepare_text(f, 50)),
    "tokenizer": (write_tokenizer, "bpe.json", lambda f: tokenize.load(str(f / "bpe.json")).encode("a line é 你")),
    "manifest.json": (write_tokens, "out/manifest.json", read_tokens),
    "tokens": (write_tokens, "out/train-00000.bin", read_tokens),
    "tokenizer.json": (write_tokens, "out/tokenizer.json", read_tokens),
    "plan.json": (begin_tokens, "out/plan.json", prepare_again),
    "shard.json": (begin_tokens, "out/shard-00001.json", prepare_again),
    "metrics.jsonl": (write_log, "metrics.jsonl", read_log),
    "captions.json": (write_log, "samples/3/captions.json", read_log),
    "sample": (write_log, "samples/3/views.png", read_log),
    "checkpoint manifest": (write_checkpoint, manifest.NAME, manifest.damage),
    "config.json": (write_workdir, "config.json", write_workdir),
    "dictionary": (write_dictionary, "gcide.dict.dz", lambda f: list(gcide.documents(str(f / "gcide.dict.dz")))),
    "mails": (write_mails, "mails.tgz", lambda f: list(spam_assassin.mails(str(f / "mails.tgz")))),
}
JSON = ("info.json", "jsonl", "jsonl to prepare", "tokenizer", "manifest.json", "tokenizer.json", "plan.json",
        "shard.json", "metrics.jsonl", "captions.json", "config.json")


def survives(read, *arguments):
    """Whether `read` gives a result; a named error is none. Anything else raised is a crash."""
    try:
        read(*arguments)
    except (UserError, BadRecord) as error:
        assert len(str(error)) > 20
        return False
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_at_random(name, tmp_path):
    write, file, read = FORMATS[name]
    write(tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    assert survives(read, tmp_path)

    @FUZZ
    @given(damaged(content))
    def fuzz(found):
        path.write_bytes(found)
        survives(read, tmp_path)

    with within(mebibytes=400, seconds=30):
        fuzz()


@pytest.mark.parametrize("name", JSON)
def test_json_at_random(name, tmp_path):
    """Well-formed, with other values; or absurd as a whole."""
    write, file, read = FORMATS[name]
    write(tmp_path)
    path = tmp_path / file
    lines = file.endswith(".jsonl")
    content = [json.loads(line) for line in (path.read_text().splitlines() if lines else [path.read_text()])]

    @FUZZ
    @given(altered(content) if lines else altered(content[0]))
    def fuzz(found):
        found = found if lines and isinstance(found, list) else [found]
        path.write_text("".join(json.dumps(value) + "\n" for value in found))
        survives(read, tmp_path)

    with within(mebibytes=400, seconds=30):
        fuzz()
        for text in ABSURD:
            path.write_bytes(text.encode() + b"\n")
            survives(read, tmp_path)
            if lines:
                path.write_bytes(b"\n".join([text.encode(), *(json.dumps(c).encode() for c in content)]) + b"\n")
                survives(read, tmp_path)


def rewrite_log(folder, change):
    """Changes the records of the log: the run and its points."""
    path = folder / "metrics.jsonl"
    run, *points = map(json.loads, path.read_text().splitlines())
    events = [points.pop(), points.pop()]
    change(run, points)
    path.write_text("".join(json.dumps(r) + "\n" for r in (run, *points, *events)))


@pytest.mark.parametrize("change, wrong", [
    (lambda run, points: points[0]["metrics"].update(loss="low"), "its loss"),
    (lambda run, points: points[0]["metrics"].update(loss=[1]), "its loss"),
    (lambda run, points: points[0].update(step="1"), "no point with step"),
    (lambda run, points: points[0].update(step=int("9" * 400)), "400 digits"),
    (lambda run, points: points[0].update(wall_s="long"), "its wall_s"),
    (lambda run, points: points[0].pop("split"), "no point with step"),
    (lambda run, points: run.update(config=[1]), "its config"),
    (lambda run, points: run.update(flops_per_example="many"), "its flops_per_example"),
    (lambda run, points: run.update(resumed_from="1"), "its resumed_from"),
    (lambda run, points: run.update(kind="ran"), "it is no run"),
])
def test_a_record_that_cannot_be_computed_with_is_named(change, wrong, tmp_path):
    write_log(tmp_path)
    rewrite_log(tmp_path, change)
    with pytest.raises(UserError, match=f"metrics.jsonl line [12] is no record of a run .*{wrong}"):
        read_log(tmp_path)


@pytest.mark.parametrize("values", [(1e308, -1e308), (5e-324, 0.0), (1e300, 1e-300), (math.nan, math.inf), (10**299, 0),
                                    (1e149, -1e149), (1e-149, 2e-149), (1e149, 1e-149), (0.1, 0.1 + 1e-16)])
def test_a_report_of_extreme_numbers(values, tmp_path):
    """On every axis, logarithmic ones too."""
    def change(run, points):
        for point, value in zip(points, itertools.cycle(values), strict=False):
            point["metrics"] = dict.fromkeys(point["metrics"], value)
            point |= dict.fromkeys(("tokens_seen", "flops_model", "lr", "tokens_per_s", "mfu", "wall_s"), value)
        run["flops_per_example"] = dict(zip("abc", values, strict=False))
        run["n_params"] = run["total_steps"] = values[0]
    write_log(tmp_path)
    rewrite_log(tmp_path, change)
    with within(mebibytes=64, seconds=5):
        read_log(tmp_path)


# ---- images and records in memory


def picture(kind, **options):
    file = io.BytesIO()
    gradient = np.linspace(0, 255, 24 * 18 * 3).astype(np.uint8).reshape(18, 24, 3)
    Image.fromarray(gradient).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow says what it does without
@pytest.mark.parametrize("kind", pixels.FORMATS)
def test_images_at_random(kind):
    content = picture(kind)
    assert pixels.decode(content, 8, "x").shape == (8, 8, 3)

    @FUZZ
    @given(damaged(content))
    def fuzz(found):
        survives(lambda: pixels.decode(found, 8, "x"))

    with within(mebibytes=600, seconds=30):  # MAX_PIXELS of a mode with four bytes, and as RGB
        fuzz()


def test_records_at_random():
    record, fields = arrayrecord.pack({"image": np.ones((3, 4, 1), np.uint8), "label": np.int32(1)})
    (length,) = struct.unpack_from("<I", record)
    written = json.loads(record[4 : 4 + length])

    @FUZZ
    @given(st.one_of(damaged(record), st.binary(max_size=64), altered(written).map(
        lambda head: struct.pack("<I", len(json.dumps(head))) + json.dumps(head).encode() + record[4 + length :])))
    def fuzz(found):
        if survives(arrayrecord.unpack, found, "r", fields):
            assert arrayrecord.unpack(found, "r", fields)["image"].shape == (3, 4, 1)

    with within(mebibytes=100, seconds=30):
        fuzz()


# ---- bombs: small on the disk, large if believed


@functools.cache
def gzip_of_zeros(mebibytes):
    packer = zlib.compressobj(1, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()


def tar_header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def idx_header(*sizes):
    return struct.pack(f">4B{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)


@pytest.mark.parametrize("sizes, zeros", [
    ((9, 4, 5), 400), ((2**32 - 1,) * 3, 1), ((1000, 1000, 1000), 1), ((0, 9, 9), 9)])
def test_idx_bombs(sizes, zeros, tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_header(*sizes)) + gzip_of_zeros(zeros))
    with within(mebibytes=16 + zeros * (zeros < 400), seconds=10), pytest.raises(UserError, match="t10k-images"):
        idx.read(path, 3)


@pytest.mark.parametrize("head", [
    b"", tar_header("package/data/spam-1/1.json", 2**60), tar_header("package/data/spam-1/1.json", 400 << 20),
    tar_header("x", 400 << 20, tarfile.GNUTYPE_LONGNAME), tar_header("x", 400 << 20, tarfile.XHDTYPE)])
def test_tar_bombs(head, tmp_path):
    path = tmp_path / "mails.tgz"
    path.write_bytes(gzip.compress(head) + gzip_of_zeros(400))
    most = 1.3 * spam_assassin.MAX_BYTES / 2**20
    with within(mebibytes=most, seconds=20), pytest.raises(UserError, match="mails.tgz"):
        list(spam_assassin.mails(str(path)))


def test_a_png_whose_text_is_a_bomb(tmp_path):
    content = picture("PNG")
    text = b"zTXt" + b"comment\0\0" + zlib.compress(bytes(200 << 20), 1)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    with within(mebibytes=32, seconds=10):
        survives(lambda: pixels.decode(content[:33] + chunk + content[33:], 8, "x"))


def test_a_sliver_is_scaled_in_bounds():
    """To 8 pixels for its shorter side, all of it would be 8 x 32,000,000."""
    file = io.BytesIO()
    Image.new("L", (4_000_000, 1), 7).save(file, "PNG")
    with within(mebibytes=64, seconds=10):
        assert (pixels.decode(file.getvalue(), 8, "x") == 7).all()


def test_damages_change_the_file():
    """Else the tests above would hold for any reader."""
    changed = []

    @FUZZ
    @given(damaged(b"0123456789"), altered({"a": [1, 2], "b": {"c": 3}}))
    def fuzz(found, value):
        changed.append((found != b"0123456789", value != {"a": [1, 2], "b": {"c": 3}}))

    fuzz()
    assert np.mean(changed, axis=0).min() > 0.8
