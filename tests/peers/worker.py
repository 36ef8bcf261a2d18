"""One side of a comparison, in a process of its own: `worker.py SIDE CASE DTYPE BEST DATA BEGAN`.

Takes a first step and says when it ended, then for every number on stdin so many steps, and says their seconds. Told
"limits", sslx says the FLOPs of a step and the fastest product's a second.
"""

import importlib
import json
import pathlib
import sys
import time


def main(side: str, case: str, dtype: str, best: str, data: str, began: str) -> None:
    sided = importlib.import_module(side)
    folder = pathlib.Path(data)
    step, limits = (sided.made(case, dtype, folder) if side == "ours" else
                    (getattr(sided, case)(dtype, best == "best", folder), list))
    step()
    print(json.dumps(time.time() - float(began)), flush=True)
    for line in sys.stdin:
        if line == "limits\n":
            print(json.dumps(limits()), flush=True)
            continue
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
