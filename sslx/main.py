"""python -m sslx.main --config configs/X.py[:arg] --workdir W [--config.a.b=value]

Trains, evaluates, and goes on from W if it holds a checkpoint.
"""

import sys
import time


def main(arguments: list[str]) -> int:
    """Parses flags, sets the platform up, trains; returns 0, 2 for a user's mistake, 3 for a diverged run."""
    began = time.monotonic()
    from sslx import platforms
    from sslx.config import UserError

    try:
        config, workdir = parse(arguments)
        print(f"platform {platforms.prepare()}", flush=True)
        from sslx import train

        platforms.enable_compilation_cache()
        train.run(config, workdir)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 3 if type(error).__name__ == "Diverged" else 2
    except OSError as error:
        print(f"\nerror: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}.", file=sys.stderr)
        return 2
    print(f"finished in {time.monotonic() - began:.0f} s")
    return 0


def parse(arguments: list[str]):
    """(config, workdir) of a command line. Raises UserError for what cannot be read."""
    from absl import flags
    from ml_collections import config_flags

    from sslx.config import UserError

    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "File of the experiment, with its argument: X.py[:arg].",
                                             flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: logs, checkpoints, report.", flag_values=values)
    if {"--help", "-h", "-help"} & set(arguments):
        print(__doc__, values.main_module_help(), sep="\n")
        raise SystemExit(0)
    try:
        rest = values(["sslx.main", *arguments])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError, SyntaxError) as error:
        raise UserError(f"the command line cannot be read: {error}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: everything is a flag, --config.a.b=value or --workdir W")
    for name, flag in (("config", config), ("workdir", workdir)):
        if flag.value is None:
            raise UserError(f"--{name} is missing.\n{__doc__}")
    return config.value, workdir.value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
