"""English prose: the Collaborative International Dictionary of English of the Debian package dict-gcide to JSONL.

    apt-get install dict-gcide
    python -m sslx.data.gcide /usr/share/dictd/gcide.dict.dz prose.jsonl

33 MB under the GPL, quotations and definitions, one paragraph a line. A document is {"text": entries of about 16 kB},
in the order of their checksums. Pronunciations are left out.

Both keep copying small, a skill that a small network learns all at once, sooner or later by chance. Pronunciations
spell the headword once more: with them two seeds ended 8.9 % apart (173 thousand parameters, 3e12 FLOPs), without them
.04 %. In the order of the alphabet entries begin as the one before: two seeds ended 3.2 % apart (102 thousand
parameters, 1e13 FLOPs), so mixed .3 %.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys
import zlib
from collections.abc import Iterator, Sequence

from sslx.config import UserError
from sslx.data.bounded import gunzipped

MAX_BYTES = 1 << 27  # the dictionary has 40 MB
DOCUMENT_BYTES = 1 << 14
PRONUNCIATION = re.compile(r" *\\[^\\\n]*\\")


def documents(dictionary: str) -> Iterator[dict[str, str]]:
    """{"text"} of all entries after the licence. Raises UserError for a file that is damaged, or no dictionary."""
    try:
        content = gunzipped(dictionary, MAX_BYTES)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{dictionary} cannot be read ({type(error).__name__}: {error}): it is gcide.dict.dz of the"
                        " Debian package dict-gcide") from error
    # An entry begins in the first column after an empty line, with its headword once more between backslashes.
    entries = [e for e in re.split(r"\n\n(?=\S)", content.decode(errors="replace")) if re.match(r"[^\n\\]+\\", e)]
    if not entries:
        raise UserError(f"{dictionary} holds no dictionary: it is gcide.dict.dz of the Debian package dict-gcide")
    prose = [PRONUNCIATION.sub("", "\n".join(" ".join(paragraph.split()) for paragraph in entry.split("\n\n")))
             for entry in entries]
    text = ""
    for entry in sorted(prose, key=lambda entry: hashlib.sha256(entry.encode()).digest()):
        text += entry + "\n\n"
        if len(text) >= DOCUMENT_BYTES:
            yield {"text": text}
            text = ""
    if text:
        yield {"text": text}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslx.data.gcide", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", help="gcide.dict.dz")
    parser.add_argument("out", help="the JSONL file to write")
    options = parser.parse_args(argv)
    lines = [json.dumps(document) + "\n" for document in documents(options.dictionary)]
    pathlib.Path(options.out).write_text("".join(lines))
    print(f"{options.out}: {len(lines)} documents")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
