"""Where the time of a compiled step goes: operations of a trace by the source line that asked for them."""

import pathlib
import re
from collections import Counter
from typing import NamedTuple

import jax

from sslx.config import UserError

TABLES = {"names": re.compile(r'(\d+) "(.*)"'),
          "locations": re.compile(r"(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)"),
          "frames": re.compile(r"(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")}
OP = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{.*?op_name="([^"]*)"(?:.*?stack_frame_id=(\d+))?')
LIBRARIES = ("site-packages", "dist-packages", "/lib/python3")


class Line(NamedTuple):
    """where:   "layers.py:120", the innermost line outside of libraries; "" if the compiler tells none.
    does:    what it asks for, such as "dot_general".
    share:   of the time of all operations. seconds: of a step.
    """

    where: str
    does: str
    seconds: float
    share: float


def dearest(folder: pathlib.Path, program: str, steps: int, n: int = 10) -> list[Line]:
    """The n dearest lines of a trace of `steps` steps in `folder`, by `program`, the text of the compiled module.

    Raises UserError if the trace holds no operation of it.
    """
    spent = Counter[str]()
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (e for line in plane.lines for e in line.events):
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    spent[str(stats["hlo_op"])] += event.duration_ns / 1e9
    asked = origins(program)
    of_lines = Counter[tuple[str, str]]()
    for op, seconds in spent.items():
        if op in asked:
            of_lines[asked[op]] += seconds
    total = sum(of_lines.values())
    if not total:
        raise UserError(f"the trace in {folder} has no operation of the step: this backend does not name them")
    return [Line(where, does, seconds / steps, seconds / total) for (where, does), seconds in of_lines.most_common(n)]


def origins(program: str) -> dict[str, tuple[str, str]]:
    """{operation of a module: (line, primitive) that it was made for}."""
    header = program.partition("\n%")[0]
    files = {found[1]: found[2] for found in TABLES["names"].finditer(header.partition("FunctionNames")[0])}
    places = {found[1]: (files.get(found[2], ""), found[3]) for found in TABLES["locations"].finditer(header)}
    frames = {found[1]: (found[2], str(int(found[3]) - 1)) for found in TABLES["frames"].finditer(header)}

    def line(frame: str | None) -> str:
        while frame in frames:
            location, frame = frames[frame]
            file, number = places.get(location, ("", ""))
            if file and not any(library in file for library in LIBRARIES):
                return f"{pathlib.Path(file).name}:{number}"
        return ""

    found = filter(None, map(OP.match, program.splitlines()))
    return {op[1]: (line(op[3]), op[2].rpartition("/")[2]) for op in found}
