"""Images with captions: what a folder says, and the emoji that are made into one."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from sslx.config import UserError
from sslx.data import BadRecord, captions, digits, openmoji, tokenize

ENCODER = tokenize.load("bytes")


@pytest.fixture
def folder(tmp_path):
    lines = []
    for i in range(40):
        Image.new("RGB", (10, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "caption": f"number {i}", "class": f"c{i % 3}", "key": f"k{i // 2}"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_pair_is_an_image_and_its_caption(folder):
    source = captions.make(path=str(folder), size=4, length=12)
    assert len(source.examples) == 40 and source.info.modality == "image_text"
    assert source.info.classes == ("c0", "c1", "c2")
    found = source.examples[7]
    assert found["image"].shape == (4, 4, 3) and (found["image"] == (7, 0, 0)).all() and found["label"] == 1
    said = found["tokens"][found["segment_ids"] == 1]
    assert ENCODER.decode(said[:-1]) == "number 7" and said[-1] == ENCODER.special["eod"]
    assert (found["tokens"][found["segment_ids"] == 0] == ENCODER.special["pad"]).all()
    tokens, segments = source.info.encode(["number 7"])
    np.testing.assert_array_equal(tokens[0], found["tokens"])
    np.testing.assert_array_equal(segments[0], found["segment_ids"])


def test_long_captions_are_cut_and_end(folder):
    tokens, segments = captions.padded(["a" * 50], ENCODER, 8)
    assert segments.all() and tokens[0, -1] == ENCODER.special["eod"] and ENCODER.decode(tokens[0, :-1]) == "a" * 7


def test_pairs_of_a_key_are_held_out_together(folder):
    parts = [captions.make(path=str(folder), size=4, length=12, split=split, heldout=0.3)
             for split in ("train", "heldout")]
    numbers = [{int(name.removesuffix(".png")) for name in part.examples.images} for part in parts]
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == set(range(40)) and all(numbers)
    assert not {n // 2 for n in numbers[0]} & {n // 2 for n in numbers[1]}
    assert parts[0].info.classes == parts[1].info.classes and parts[0].info.fingerprint != parts[1].info.fingerprint


@pytest.mark.parametrize("line, words", [
    ("{", "line 2, is no"), ('{"image": "0.png"}', "KeyError"), ('{"image": 3, "caption": "x"}', "no string"),
    ('{"image": "../0.png", "caption": "x"}', "outside the folder"),
    ('{"image": "/etc/x.png", "caption": "x"}', "outside the folder")])
def test_a_damaged_line_is_named(folder, line, words):
    path = folder / "captions.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{line}\n")
    with pytest.raises(UserError, match=words):
        captions.make(path=str(folder), size=4, length=12)


def test_a_missing_folder_and_a_damaged_image(folder, tmp_path):
    with pytest.raises(UserError, match="config.data.path='nowhere'"):
        captions.make(path="nowhere", size=4, length=12)
    (folder / "3.png").write_bytes(b"no image")
    source = captions.make(path=str(folder), size=4, length=12)
    with pytest.raises(BadRecord, match="3.png"):
        source.examples[3]


def test_digits_say_what_they_are():
    source = digits.make(split="test", captions=24)
    example = source.examples[3]
    said = ENCODER.decode(example["tokens"][example["segment_ids"] == 1][:-1])
    assert digits.WORDS[example["label"]] in said and source.info.classes == digits.WORDS


def package(path, svgs):
    records = [{"hexcode": f"1F60{i}", "annotation": "grinning face", "tags": "smile, grinning",
                "openmoji_tags": "smile", "group": "smileys-emotion",
                "skintone_base_hexcode": "1F600" if i else ""} for i in range(len(svgs))]
    files = {openmoji.INDEX: json.dumps(records)}
    files |= {f"package/color/svg/1F60{i}.svg": svg for i, svg in enumerate(svgs)}
    folder = path / "files"
    with tarfile.open(path / "openmoji.tgz", "w:gz") as archive:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
            archive.add(folder / name, name)
    return path / "openmoji.tgz"


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="72" height="72" fill="#ff0000"/></svg>'


def test_emoji_become_a_folder_of_pairs(tmp_path):
    pytest.importorskip("resvg_py")
    out = tmp_path / "emoji"
    openmoji.main([str(package(tmp_path, [SVG] * 3)), str(out), "--size", "16"])
    source = captions.make(path=str(out), size=16, length=32)
    assert len(source.examples) == 3 and (source.examples[0]["image"] == (255, 0, 0)).all()
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert lines[0]["caption"] == "grinning face, smile" and {line["key"] for line in lines} == {"1F600"}


def test_a_damaged_package_is_named(tmp_path):
    pytest.importorskip("resvg_py")
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    done = subprocess.run([sys.executable, "-m", "sslx.data.openmoji", tmp_path / "x.tgz", tmp_path / "out"],
                          capture_output=True, text=True)
    assert done.returncode and "npm pack openmoji" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "captions.jsonl").exists()
