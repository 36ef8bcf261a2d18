"""Configs: a section of a ConfigDict is splatted into the `make` function it configures.

The keyword arguments of `make`, with their annotations and defaults, are the schema of the section;
there is no other. A key that `make` does not take, or a value of another type or out of the range that the
annotation says (`Count`, `Share`, ...), is an error that names the field and what fits, raised before anything is
compiled.
"""

import contextlib
import difflib
import importlib
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

LARGEST_INT = 2**31 - 1  # what devices count with: int32, float32
LARGEST_FLOAT = 3.4028235e38


class UserError(Exception):
    """A mistake in a config, a flag or a file: one paragraph that names it and says what to do."""

    status = 2  # with which the process exits

    def __init__(self, message: str):
        super().__init__(redacted(message))


class Only(NamedTuple):
    """In `Annotated[type, Only(holds, words)]`: the values of the type for which `holds`, and what they are called."""

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Only(lambda n: 1 <= n <= LARGEST_INT, "a positive integer below 2**31")]
Natural = Annotated[int, Only(lambda n: 0 <= n <= LARGEST_INT, "an integer from 0 to below 2**31")]
# Of a run: one of k times as many steps has k times as many, but for rounding (sslx/scaling/grid.py).
Steps = Annotated[int, Only(lambda n: 0 <= n <= LARGEST_INT, "a number of steps from 0 to below 2**31")]
Seed = Annotated[int, Only(lambda n: 0 <= n < 2**32, "an integer from 0 to 2**32 - 1")]
Positive = Annotated[float, Only(lambda x: x > 0, "a positive number")]
Nonnegative = Annotated[float, Only(lambda x: x >= 0, "a number of at least 0")]
Share = Annotated[float, Only(lambda x: 0 <= x <= 1, "a share from 0 to 1")]
Part = Annotated[float, Only(lambda x: 0 < x < 1, "a share between 0 and 1, which excludes both")]


def changed(conf: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy with some fields, such as "model.width", set. Raises UserError for a section that is not there."""
    conf = conf.copy_and_resolve_references()
    try:
        with conf.unlocked():
            conf.update_from_flattened_dict(changes)
    except (KeyError, TypeError) as error:
        raise UserError(f"a field cannot be set in this config: {error.args[0]}") from error
    return conf


def plain(section: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """Nested dicts of a config. Raises UserError for a field that is required and has no value, and for odd keys."""
    values: dict[str, Any] = {}
    try:
        keys = list(section)
    except TypeError as error:  # a ConfigDict sorts them
        raise UserError(f"{where} has a key that is no string; keys are the names of fields") from error
    for key in keys:
        try:
            value = section[key]
        except RequiredValueError as error:
            raise UserError(f"{where}.{key} is missing: its file leaves it to a flag, --{where}.{key}=VALUE") from error
        values[key] = plain(value, f"{where}.{key}") if hasattr(value, "items") else value
    return values


def load(folder: str, name: str) -> Callable[..., Any]:
    """The `make` of `sslx/<folder>/<name>.py`."""
    here = pathlib.Path(__file__).parent / folder
    names = sorted(p.stem for p in here.glob("*.py") if not p.stem.startswith("_") and has_make(p))
    if name not in names:
        raise UserError(f"there is no {name!r} in sslx/{folder}{nearest(name, names)}")
    return importlib.import_module(f"sslx.{folder}.{name}").make


def has_make(path: pathlib.Path) -> bool:
    text = path.read_text()
    return "\ndef make(" in text or "\nmake = " in text


def call(make: Callable[..., Any], section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """`make(**given, **section)` after checking the section against the signature of `make`.

    `where` is the section's name in the config, for messages; `given` are the arguments that sslx
    itself supplies and a config may not: what was built of other sections.
    """
    if not isinstance(section, Mapping) and not hasattr(section, "items"):
        raise UserError(f"{where} is {shown(where, section)}; it takes a section, as dict(...) makes one")
    parameters = inspect.signature(make).parameters
    hints = typing.get_type_hints(make, include_extras=True)
    for key, value in given.items():
        hint = hints.get(key)
        if isinstance(hint, type) and not isinstance(value, hint):
            raise UserError(f"{where}{named(section)} takes a {key} that is a {hint.__name__}, and config.{key} makes a"
                            f" {type(value).__name__}; choose another {where}.name or config.{key}.name")
    valid = [k for k in parameters if k not in given and k not in ("parent", "name")]
    arguments = {}
    for key, value in section.items():
        if key == "name" and key not in valid:
            continue
        if key not in valid:
            raise UserError(f"unknown key {where}.{key}{nearest(key, valid)}")
        arguments[key] = checked(value, hints.get(key, Any), f"{where}.{key}")
    for key, parameter in parameters.items():
        missing = key in valid and key not in arguments and parameter.default is parameter.empty
        if missing and parameter.kind is not parameter.VAR_KEYWORD:
            raise UserError(f"{where}.{key} is missing: it takes {describe(hints.get(key, Any))}")
    wanted = {k: v for k, v in given.items() if k in parameters}
    return make(**wanted, **arguments)


def build(folder: str, section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Builds what `section.name` names in `sslx/<folder>`, with the rest of the section."""
    if not isinstance(section, Mapping) and not hasattr(section, "items"):
        raise UserError(f"{where} is {shown(where, section)}; it takes a section with a name of sslx/{folder}")
    if "name" not in section:
        raise UserError(f"{where}.name is missing: it names a file of sslx/{folder}")
    return call(load(folder, section["name"]), section, where, **given)


def fields(make: Callable[..., Any], hint: Any) -> list[str]:
    """The arguments of `make` with this annotation."""
    return [name for name, own in typing.get_type_hints(make, include_extras=True).items() if own == hint]


def named(section: Mapping[str, Any]) -> str:
    return f".name={section['name']!r}" if "name" in section else ""


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if it fits the annotation `hint` (an int fits a float; a list fits a tuple)."""
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(UserError):
                return checked(value, option, where)
    elif origin is Annotated:
        with contextlib.suppress(UserError):
            fitting = checked(value, arguments[0], where)
            if all(only.holds(fitting) for only in arguments[1:]):
                return fitting
    elif origin is typing.Literal:
        if any(type(value) is type(option) and value == option for option in arguments):
            return value
        raise UserError(f"{where} is {shown(where, value)}; it takes {describe(hint)}"
                        + (nearest(value, arguments) if isinstance(value, str) else ""))
    elif origin is tuple and isinstance(value, (tuple, list)):
        any_length = arguments[1:] == (...,)
        inner = arguments[:1] * len(value) if any_length else arguments
        if len(inner) == len(value) > 0:
            return tuple(checked(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))
    elif hint is float and type(value) in (int, float) and abs(value) <= LARGEST_FLOAT:
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif isinstance(origin or hint, type) and not isinstance(value, bool | int | float | str):
        if isinstance(value, origin or hint) or (hasattr(value, "items") and issubclass(dict, origin or hint)):
            return value
    raise UserError(f"{where} is {shown(where, value)}; it takes {describe(hint)}")


def describe(hint: Any) -> str:
    """A type annotation in words."""
    words = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string",
             type(None): "None", None: "None"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Annotated:
        return arguments[1].words
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"a tuple of one or more, each {describe(arguments[0])}"
        return "a tuple of " + " and ".join(map(describe, arguments))
    if isinstance(origin or hint, type) and issubclass(dict, origin or hint):
        return "a section, as dict(...) makes one"
    return getattr(hint, "__name__", str(hint))


def shown(where: str, value: Any) -> str:
    """A value for a message: in short, and without what is secret."""
    key = where.rpartition(".")[2].partition("[")[0]
    text = repr(redacted({key: value})[key])
    return text if len(text) <= 100 else f"{text[:80]}...{text[-17:]}"


def nearest(name: object, names: typing.Iterable[object]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all of them."""
    options = [str(n) for n in names]
    close = difflib.get_close_matches(str(name), options, 1, 0.5)
    listing = f" (valid: {', '.join(options)})" if options else ""
    return f": did you mean {close[0]!r}?{listing}" if close else f"{listing}"


# As a word of a key: hf_token, api_key, client_secret; but not tokens, tokenizer, token_rate.
SECRET = re.compile(r"(?:^|_)(?:pass(?:word|wd|phrase)|pwd|secrets?|credentials?|auth|authorization"
                    r"|(?:api|access|private|secret)_?key)(?:_|$)|(?:^|_)token$", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redacted(value: Any) -> Any:
    """A config, or a message, as it may be written down: "***" for values of keys that are secret, and in URLs."""
    if isinstance(value, str):
        return PASSWORD_IN_URL.sub("***", value)
    if isinstance(value, tuple):
        return tuple(map(redacted, value))
    if isinstance(value, list):
        return list(map(redacted, value))
    if not hasattr(value, "items"):
        return value
    return {key: "***" if SECRET.search(str(key)) and v is not None and type(v) is not bool else redacted(v)
            for key, v in value.items()}
