"""Compiled functions and their threads, and what importing the kit costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kit
from kit.core.compiled import compiled, in_threads

ROOT = Path(kit.__file__).parent


@compiled()
def twice(x):
    return 2 * x


@compiled()
def twice_and_one(x):
    return twice(x) + 1


def len_of(x):
    return len(x)


def test_functions_compile_at_the_first_call_with_those_they_call():
    assert not hasattr(twice, "signatures")
    assert twice_and_one(3) == 7 and twice_and_one(0.25) == 1.5
    assert hasattr(twice, "signatures") and twice(4) == 8


def test_compiles_without_a_cache_directory(monkeypatch):
    def njit(cache=False, **settings):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, settings)

    monkeypatch.setattr("numba.njit", njit)
    function, settings = compiled(fastmath=True)(len_of).machine_code
    assert function is len_of and settings["nogil"] and settings["fastmath"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_one_supply_and_errors_come_out(threads):
    supply, done = iter(range(1000)), []
    in_threads(lambda: done.extend(supply), threads)
    assert sorted(done) == list(range(1000))
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda: 1 / 0, threads)


HEAVY = ("numba", "pandas", "scipy", "sklearn", "tokenizers", "torch_pruning", "onnx", "matplotlib")


def test_artifact_loads_only_what_it_needs():
    code = f"import sys; from kit import artifact; print(set({HEAVY}) & set(sys.modules) or '')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_idle_threads_of_torch_leave_the_cores_to_others():
    """After a parallel loop with torch imported first, its other thread soon uses no CPU time."""
    code = """
import os, time, torch
torch.set_num_threads(2)
from kit.core.compiled import rest_idle_threads
if rest_idle_threads(2):
    x, used = torch.ones(10**6), []
    for _ in range(20):
        x.add_(1)
        start = time.process_time()
        time.sleep(0.002)
        used.append(time.process_time() - start)
    print(sorted(used)[10])
"""
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    environment["PYTHONPATH"] = str(ROOT.parent)
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout or 0) < 0.0005, done.stdout
