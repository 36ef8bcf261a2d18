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

from sslx import command
from sslx.command import Flag

BUG, INTERRUPTED = 1, 130
# Not a bug: a folder that cannot be written, a disk that is full.
OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT,
                  errno.EFBIG)


FLAGS = {
    "workdir": Flag(str, "Folder of the run: logs, checkpoints, report.", required=True),
    "coordinator": Flag(str, "HOST:PORT of process 0, the same for all."),
    "processes": Flag(int, "How many processes make the run."),
    "process": Flag(int, "The number of this process, from 0."),
}


def main(arguments: list[str]) -> int:
    """Parses flags, sets the platform up, trains. Returns the exit status:

    0    the last step is done.
    2    a mistake in the command line, the config, the data or the workdir; a disk that is full or has gone away.
    3    the run diverged: a loss or gradient that is not finite or a spike, or collapsed features, as configured.
    4    it hung: a step took longer than run.hang_s.
    5    a device computed something else than it should have.
    130  stopped by Ctrl-C or SIGTERM, with the state saved; a second one stops at once, without saving (of several
         processes, where SIGTERM is a notice to all, a second Ctrl-C).

    In every case the same command goes on from the newest checkpoint. An exception that is nobody's mistake
    but the code's shows its traceback, with status 1. The first of several processes that fails ends them all.
    """
    began = time.monotonic()
    process = workdir = None
    from sslx import platforms

    try:
        config, flags = command.parse("main", __doc__, FLAGS, arguments)
        workdir = flags.pop("workdir")
        prepared = platforms.prepare()
        from sslx import distributed

        process = distributed.start(**flags)
        if process == 0:
            print(f"platform {prepared}", flush=True)
        from sslx import train

        platforms.enable_compilation_cache()
        finished = train.run(config, workdir, began)
        distributed.finish()
    except (Exception, KeyboardInterrupt) as error:
        status, reason = ending(error, workdir)
        if process is not None:
            # At once: Python would wait for the threads that compile, read and save, or they would fail once more.
            distributed.abort(status, reason)
        print(f"\n{reason}", file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            os._exit(status)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
