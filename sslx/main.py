"""python -m sslx.main --config configs/X.py[:arg] --workdir W [--config.a.b=value]
                    [--coordinator HOST:PORT --processes N --process I]

Trains, evaluates, and goes on from W if it holds a checkpoint. Several processes make one run where SLURM, Open MPI
or a TPU pod starts this command in each, or where the last three flags say who takes part; W is one folder for all.
"""

import errno
import os
import sys
import time
import traceback

BUG, INTERRUPTED = 1, 130
# Not a bug: a folder that cannot be written, a disk that is full.
OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT,
                  errno.EFBIG)


def main(arguments: list[str]) -> int:
    """Parses flags, sets the platform up, trains. Returns the exit status:

    0    the last step is done.
    2    a mistake in the command line, the config, the data or the workdir, or a full disk.
    3    the loss or its gradient is not finite.
    130  stopped by Ctrl-C or SIGTERM, with the state saved; a second one stops at once, without saving (of several
         processes, where SIGTERM is a notice to all, a second Ctrl-C).

    In every case the same command goes on from the newest checkpoint. An exception that is nobody's mistake
    but the code's shows its traceback, with status 1. The first of several processes that fails ends them all.
    """
    began = time.monotonic()
    process = workdir = None
    from sslx import platforms

    try:
        config, workdir, processes = parse(arguments)
        prepared = platforms.prepare()
        from sslx import distributed

        process = distributed.start(*processes)
        if process == 0:
            print(f"platform {prepared}", flush=True)
        from sslx import train

        platforms.enable_compilation_cache()
        finished = train.run(config, workdir)
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:
        status, reason = ending(error, workdir)
        sys.stdout.flush()
        if process is not None:
            distributed.fail(status, reason)
        print(f"\n{reason}", file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            os._exit(status)  # Python would wait for the threads of compilers and readers, or crash in them
        return status
    if process == 0:
        print(f"{'finished' if finished else 'stopped'} after {time.monotonic() - began:.0f} s")
    return 0 if finished else INTERRUPTED


def ending(error: BaseException, workdir: str | None) -> tuple[int, str]:
    """(exit status, what the user is told) of a run that ends in `error`."""
    from sslx.config import UserError

    match error:
        case UserError():
            return error.status, f"error: {error}"
        case OSError() if error.errno in OF_THE_MACHINE:
            return UserError.status, (f"error: {error.filename or workdir}: {error.strerror}. Make it writable or free"
                                      " some space, or choose another --workdir.")
        case KeyboardInterrupt():
            return INTERRUPTED, "stopped at once; the same command goes on from the newest checkpoint"
    return BUG, "".join(traceback.format_exception(error)).rstrip()


def parse(arguments: list[str]):
    """(config, workdir, (coordinator, processes, process)) of a command line.

    Raises UserError for what cannot be read.
    """
    from absl import flags
    from ml_collections import config_flags

    from sslx.config import UserError

    command = ["sslx.main", *arguments]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "File of the experiment, with its argument: X.py[:arg].",
                                             flag_values=values, sys_argv=command)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: logs, checkpoints, report.", flag_values=values)
    processes = (
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, the same for all.", flag_values=values),
        flags.DEFINE_integer("processes", None, "How many processes make the run.", flag_values=values),
        flags.DEFINE_integer("process", None, "The number of this process, from 0.", flag_values=values),
    )
    if {"--help", "-h", "-help"} & set(arguments):
        print(__doc__, values.main_module_help(), sep="\n")
        raise SystemExit(0)
    file = config_file(command)
    try:
        rest = values(command)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        if raised_in(file, error):
            raise
        reason = f"no field {error.args[0]}" if isinstance(error, (AttributeError, KeyError)) else str(error)
        raise UserError(f"the command line cannot be read: {' '.join(reason.split())}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: everything is a flag, --config.a.b=value or --workdir W")
    for name, flag in (("config", config), ("workdir", workdir)):
        if flag.value is None:
            raise UserError(f"--{name} is missing.\n{__doc__}")
    return config.value, workdir.value, tuple(flag.value for flag in processes)


def config_file(command: list[str]) -> str | None:
    """The file that --config names, without the argument. Raises UserError if there is none of this name."""
    from absl import flags

    from sslx.config import UserError

    values = flags.FlagValues()
    config = flags.DEFINE_string("config", None, "", flag_values=values)
    try:
        values(command, known_only=True)
    except flags.Error as error:
        raise UserError(f"the command line cannot be read: {error}") from error
    if config.value is None:
        return None
    file = config.value.partition(":")[0]
    if not os.path.isfile(file):
        raise UserError(f"--config names {file!r}, where there is no file. It takes the path of a config, such as"
                        f" configs/quickstart.py; paths are relative to {os.getcwd()}")
    return file


def raised_in(file: str | None, error: Exception) -> bool:
    """Whether `error` is one of the code in the config file, whose author wants to see the traceback."""
    frames = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    return file in frames or "Error whilst parsing config file" in str(error)  # what ml_collections makes of it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
