"""papermill in a process that ends, with its kernel, when the process that started it does, however
that ends: `python -m kit.lab.child ARGUMENTS OF PAPERMILL`, its input a pipe that is never written.
"""

import os
import threading

import psutil
from papermill.__main__ import papermill


def follow() -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os.kill(os.getpid(), 9)


if __name__ == "__main__":
    threading.Thread(target=follow, daemon=True).start()
    papermill()
