"""Pairs of pictures and captions: the emoji of the npm package openmoji, rendered, for the source `captions`.

    npm pack openmoji
    pip install -e '.[emoji]'
    python -m sslx.data.openmoji openmoji-*.tgz emoji --size 64

Captions are an emoji's annotation and its tags. Skin tones of one emoji have one key, and so are held out together; the
class is the group ("animals-nature"). The pictures are CC BY-SA 4.0 of the OpenMoji project.
"""

import argparse
import io
import json
import pathlib
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

from sslx.config import UserError
from sslx.data.bounded import gunzipped

INDEX = "package/data/openmoji.json"
MAX_BYTES = 1 << 28  # the package has 40 MB
HOW = "get it with npm pack openmoji"


def emoji(package: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, SVG) of every emoji in color. Raises UserError for a package that is damaged, or something else."""
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzipped(package, MAX_BYTES)), mode="r:") as archive:
            members = {m.name: m for m in archive if m.isfile()}

            def content(name: str) -> str:
                return cast(IO[bytes], archive.extractfile(members[name])).read().decode()

            for record in json.loads(content(INDEX)):
                name = f"package/color/svg/{record['hexcode']}.svg"
                if name in members:
                    yield record, content(name)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{package} cannot be read ({type(error).__name__}: {error}): {HOW}") from error


def caption(record: dict[str, Any]) -> str:
    """The annotation, then the tags that say something else."""
    said = record["annotation"]
    tags = [tag.strip() for tag in f"{record['tags']},{record['openmoji_tags']}".split(",")]
    return ", ".join([said, *dict.fromkeys(tag for tag in tags if tag and tag not in said)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslx.data.openmoji", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="the .tgz of npm pack")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    options = parser.parse_args(argv)
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("rendering takes resvg: pip install -e '.[emoji]', or resvg-py") from error
    out, lines = pathlib.Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for record, svg in emoji(options.package):
        name = f"{record['hexcode']}.png"
        picture = resvg_py.svg_to_bytes(svg_string=svg, width=options.size, height=options.size, background="white")
        (out / name).write_bytes(bytes(picture))
        lines.append(json.dumps({"image": name, "caption": caption(record), "class": record["group"],
                                 "key": record["skintone_base_hexcode"] or record["hexcode"]}) + "\n")
    if not lines:
        raise UserError(f"{options.package} holds no emoji: {HOW}")
    (out / "captions.jsonl").write_text("".join(lines))  # last: without it the folder is none
    print(f"{out}: {len(lines)} pairs")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
