"""JSON files beside data that say what it holds, read against the NamedTuple that lists their fields."""

import json
import pathlib
from typing import Annotated, Any

from sslx import config
from sslx.config import Only, UserError

MAX_BYTES = 1 << 26  # a manifest names a shard in 200 bytes

Size = Annotated[int, Only(lambda n: 0 <= n < 2**63, "an integer from 0 to below 2**63")]


def load(kind: Any, path: pathlib.Path) -> Any:
    """A `kind` of the file's fields. Raises UserError that names the file, and the field that does not fit."""
    return config.call(kind, mapping(path), str(path))


def mapping(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found
