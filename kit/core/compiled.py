"""Functions that numba compiles, and threads for them that do not fight those of torch."""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Compiled:
    """A function that numba compiles at its first call, so that importing it does not import numba.

    It may call others of its module. Machine code is kept on disk where numba finds a writable
    place. `settings` are those of `numba.njit`; the function runs without the GIL.
    """

    def __init__(self, function: Callable, **settings):
        self.function, self.settings = function, settings
        functools.update_wrapper(self, function)

    def __call__(self, *arguments):
        return self.machine_code(*arguments)

    @functools.cached_property
    def machine_code(self) -> Callable:
        import numba

        scope = self.function.__globals__
        for name in self.function.__code__.co_names:  # numba knows its own functions only
            if isinstance(scope.get(name), Compiled):
                scope[name] = scope[name].machine_code
        settings = {"nogil": True, "error_model": "numpy", **self.settings}
        try:
            return numba.njit(cache=True, **settings)(self.function)
        except RuntimeError:  # no writable cache directory
            return numba.njit(**settings)(self.function)


def compiled(**settings) -> Callable[[Callable], Compiled]:
    """Decorator: see `Compiled`."""
    return functools.partial(Compiled, **settings)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kit")


def in_threads(work: Callable[[], object], threads: int) -> None:
    """Runs `work` in this thread and in up to `threads` - 1 more at once.

    `work` takes pieces of one supply until none is left: a thread that comes late finds less to do,
    and none waits for one that has not begun. A forked process makes threads of its own.
    """
    if threads > 1:
        rest_idle_threads(threads)
    helpers = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@functools.cache
def rest_idle_threads(threads: int) -> bool:
    """Lets torch's idle threads sleep at once, from now on; False where its OpenMP is not GNU's.

    GNU's OpenMP lets threads spin for milliseconds after every parallel loop, on the cores that
    others could use, unless OMP_WAIT_POLICY was PASSIVE when torch was loaded or it has more
    threads than there are cores. So one more team of `threads` is started here, and sleeps.
    """
    team_function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    try:  # a symbol of the libraries that torch itself has loaded
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return False
    nothing, started = team_function(lambda _: None), threading.Event()

    def team():
        parallel(nothing, None, ctypes.c_uint(threads), ctypes.c_uint(0))
        started.set()
        threading.Event().wait()

    threading.Thread(target=team, name="kit idle team", daemon=True).start()
    return started.wait(1)
