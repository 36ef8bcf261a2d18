"""Command lines: flags, those of a config among them, and errors that say what cannot be read."""

import argparse
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from sslx.config import UserError, redacted

FIELD = re.compile(r"config(\.[A-Za-z_]\w*(\[\d+\])*)+")
DEFINE: dict[type, Any] = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float,
                           bool: flags.DEFINE_boolean}


def told(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`main` of a command, which tells a mistake of the user's in a line and returns its status."""
    @functools.wraps(main)
    def run(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            return error.status

    return run


class Parser(argparse.ArgumentParser):
    """Raises UserError, with what explains the command, for what cannot be read."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"the command line cannot be read: {message}.\n{self.description or self.usage}")


class Flag(NamedTuple):
    """A flag beside --config; without a value it is None, or False if it is a bool."""

    kind: type
    help: str
    required: bool = False


def parse(module: str, doc: str | None, wanted: Mapping[str, Flag], arguments: list[str],
          needs_config: bool = True) -> tuple[Any, dict[str, Any]]:
    """(config, {flag: value}) of `python -m sslx.<module> <arguments>`, which `doc` explains.

    Raises UserError for what cannot be read; prints the help and exits if asked for it.
    """
    command = [f"sslx.{module}", *arguments]
    helping = bool({"--help", "-h", "-help"} & set(arguments))
    file = None if helping else config_file(command)
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config.") and not FIELD.fullmatch(name):
            raise UserError(f"--{name} names no field of a config: a flag is --config.a.b=value")
    values = flags.FlagValues()
    # A flag may set what the file leaves at its default; whether a section takes it is for `config.call` to say.
    config = config_flags.DEFINE_config_file("config", None, "File of the experiment, with its argument: X.py[:arg].",
                                             flag_values=values, sys_argv=command, lock_config=False,
                                             accept_new_attributes=True)
    holders = {name: DEFINE[flag.kind](name, False if flag.kind is bool else None, flag.help, flag_values=values)
               for name, flag in wanted.items()}
    if helping:
        print(doc, values.module_help(__name__), sep="\n")
        raise SystemExit(0)
    try:
        rest = values(command)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, SyntaxError) as error:
        if raised_in(file, error):
            raise
        if "get_config" in str(error):
            raise UserError(f"{file} is no config: {str(error).splitlines()[-1]}. It defines get_config(arg=''), which"
                            " returns an ml_collections.ConfigDict") from error
        reason = f"no field {innermost(error)}" if isinstance(error, (AttributeError, LookupError)) else str(error)
        raise UserError(f"the command line cannot be read: {without_secrets(' '.join(reason.split()), arguments)}"
                        ) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: everything is a flag, such as --config.a.b=value")
    if file is not None and not isinstance(config.value, ConfigDict):
        raise UserError(f"get_config() in {file} returns {config.value!r:.100}; it must return an"
                        " ml_collections.ConfigDict")
    given = {name: holder.value for name, holder in holders.items()}
    needed = {"config": config.value} if needs_config else {}
    for name, value in (needed | {n: given[n] for n, flag in wanted.items() if flag.required}).items():
        if value is None:
            raise UserError(f"--{name} is missing.\n{doc}")
    return config.value, given


def named_config(command: list[str]) -> str | None:
    """What --config names, X.py[:arg]."""
    values = flags.FlagValues()
    config = flags.DEFINE_string("config", None, "", flag_values=values)
    try:
        values(command, known_only=True)
    except flags.Error as error:
        raise UserError(f"the command line cannot be read: {error}") from error
    return config.value


def config_file(command: list[str]) -> str | None:
    """The file that --config names, without the argument. Raises UserError if there is none of this name."""
    named = named_config(command)
    if named is None:
        return None
    file = named.partition(":")[0]
    if not os.path.isfile(file):
        raise UserError(f"--config names {file!r}, where there is no file. It takes the path of a config, such as"
                        f" configs/quickstart.py; paths are relative to {os.getcwd()}")
    return file


def without_secrets(message: str, arguments: list[str]) -> str:
    """What a message about these flags may show of their values."""
    for argument in arguments:
        flag, _, value = argument.partition("=")
        message = message.replace(value, redacted({flag.rpartition(".")[2]: value}).popitem()[1]) if value else message
    return message


def innermost(error: Exception) -> str:
    """What an error says that was made of other errors."""
    said = error.args[0] if error.args else error
    if isinstance(said, Exception) and said is not error:
        return innermost(said)
    return str(said).rpartition("Attempting to lookup: ")[2]  # of what is no section


def raised_in(file: str | None, error: Exception) -> bool:
    """Whether `error` is one of the code in the config file, whose author wants to see the traceback."""
    frames = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    return file in frames or f'File "{file}"' in str(error)  # what ml_collections makes of it
