"""Configs: a section of a ConfigDict is splatted into the `make` function it configures.

The keyword arguments of `make`, with their annotations and defaults, are the schema of the section;
there is no other. A key that `make` does not take, or a value of another type, is an error that
names the field and the nearest valid one, raised before anything is compiled.
"""

import difflib
import importlib
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


class UserError(Exception):
    """A mistake in a config, a flag or a file: one paragraph that names it and says what to do."""

    status = 2  # with which the process exits


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
    itself supplies and a config may not.
    """
    parameters = inspect.signature(make).parameters
    hints = typing.get_type_hints(make)
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
        raise UserError(f"{where} is {section!r}; it takes a section with a name of sslx/{folder}")
    if "name" not in section:
        raise UserError(f"{where}.name is missing: it names a file of sslx/{folder}")
    return call(load(folder, section["name"]), section, where, **given)


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if it fits the annotation `hint` (an int fits a float; a list fits a tuple)."""
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return checked(value, option, where)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{where} is {value!r}; it takes one of {', '.join(map(repr, arguments))}"
                        + (nearest(value, arguments) if isinstance(value, str) else ""))
    elif origin is tuple and isinstance(value, (tuple, list)):
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) == len(value):
            return tuple(checked(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif isinstance(origin or hint, type) and not isinstance(value, bool | int | float | str):
        if isinstance(value, origin or hint) or (hasattr(value, "items") and issubclass(dict, origin or hint)):
            return value
    raise UserError(f"{where} is {value!r}; it takes {describe(hint)}")


def describe(hint: Any) -> str:
    """A type annotation in words."""
    words = {int: "an integer", float: "a number", bool: "True or False", str: "a string",
             type(None): "None", None: "None"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(describe, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a tuple of " + " and ".join(describe(h) for h in typing.get_args(hint) if h is not ...)
    return getattr(hint, "__name__", str(hint))


def nearest(name: object, names: typing.Iterable[object]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all of them."""
    options = [str(n) for n in names]
    close = difflib.get_close_matches(str(name), options, 1, 0.5)
    listing = f" (valid: {', '.join(options)})" if options else ""
    return f": did you mean {close[0]!r}?{listing}" if close else f"{listing}"
