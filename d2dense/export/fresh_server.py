"""Run saved models one after the other, each in a child that is forked from a process which has
imported torch and torchvision and can import nothing of this project: as fresh as
:mod:`d2dense.export.fresh_run`, without the seconds of these imports.

Started by :mod:`d2dense.export.verification` as a script; it must not import anything of this
project.

usage: fresh_server.py, and on its input lines of MODEL, IMAGES, RESULTS and THREADS, separated by
tabs. Each is answered by one line: empty, or what went wrong.
"""

import os
import runpy
import sys
from pathlib import Path

fresh_run = runpy.run_path(str(Path(__file__).with_name("fresh_run.py")))


def answer(job: list[str]) -> str:
    """Run one job in a child and return what went wrong."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            fresh_run["main"](*job)
        except BaseException as error:
            lines = f"{type(error).__name__}: {error}".splitlines()
            message = (lines or ["it failed"])[-1]
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    return message or ("" if status == 0 else f"signal {status}")


def main() -> None:
    sys.meta_path.insert(0, fresh_run["_Block"]())
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(answer(line.rstrip("\n").split("\t")), flush=True)


if __name__ == "__main__":
    main()
